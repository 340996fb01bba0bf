"""Every word the model reads that is not the user's: chat templates, placeholders, task-guided suffixes, questions.

Training, evaluation and the predictor all import them from here, so a question asked of the model is a question it was
trained on. Nothing in this module needs torch.

Paper: §3.2 and Table 1.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

from regiongpt.errors import ConfigError, DataError, RegionError

IMAGE_TOKEN: Final = "<image>"
"""Stands for the whole image, once, at the start of the first user turn; becomes one token per image feature."""

REGION_TOKEN: Final = "<region>"
"""The one token in the vocabulary whose embedding is replaced by that of a region."""

PLACEHOLDER: Final = re.compile(r"<region([1-9][0-9]{0,5})>|(?i:<region)[^<>]{0,20}>?")
"""A region's placeholder, group 1 its number; without a group 1, what looks like one and is none."""

# ---------------------------------------------------------------------------------------------------------------------
# Chat templates (jinja, in the sandbox and with the variables of transformers). `generation` marks the response and its
# end-of-turn token: exactly what the loss is taken on.

_HEAD = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = 'SYSTEM' -%}{%- set turns = messages -%}
{%- endif -%}
{{- bos_token or '' -}}
"""

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions."
)

_VICUNA_V1 = (
    _HEAD.replace("SYSTEM", _VICUNA_SYSTEM)
    + """\
{%- if system -%}{{- system + ' ' -}}{%- endif -%}
{%- for turn in turns -%}
{%- if turn['role'] == 'user' -%}
{{- 'USER: ' + turn['content'] + ' ' -}}
{%- else -%}
{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + turn['content'] + (eos_token or '') -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)

_LLAMA2 = (
    _HEAD.replace("{{- bos_token or '' -}}\n", "").replace("SYSTEM", "")
    + """\
{%- for turn in turns -%}
{%- if turn['role'] == 'user' -%}
{{- (bos_token or '') + '[INST] ' -}}
{%- if loop.first and system -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
{{- turn['content'] + ' [/INST]' -}}
{%- else -%}
{%- generation -%}{{- ' ' + turn['content'] + ' ' + (eos_token or '') -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
)

_LLAMA3 = """\
{{- bos_token or '' -}}
{%- for turn in messages -%}
{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if turn['role'] == 'assistant' -%}
{%- generation -%}{{- turn['content'] + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}
{{- turn['content'] + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# Some chatml tokenizers name the opener of a turn as their begin token; it must not come twice.
_CHATML = """\
{%- if bos_token and bos_token != '<|im_start|>' -%}{{- bos_token -}}{%- endif -%}
{%- for turn in messages -%}
{{- '<|im_start|>' + turn['role'] + '\\n' -}}
{%- if turn['role'] == 'assistant' -%}
{%- generation -%}{{- turn['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- turn['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_PLAIN = """\
{{- bos_token or '' -}}
{%- for turn in messages -%}
{%- if turn['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + turn['content'] + (eos_token or '') -}}{%- endgeneration -%}
{%- else -%}
{{- turn['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

CHAT_TEMPLATES: Final[dict[str, str]] = {
    "vicuna_v1": _VICUNA_V1,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "chatml": _CHATML,
    "plain": _PLAIN,
}
"""One jinja template per family of language models; ``plain`` is for models without a chat format of their own."""

CONTROL_TOKENS: Final[dict[str, tuple[str, ...]]] = {
    "vicuna_v1": (),
    "llama2": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "plain": (),
}
"""What a template writes between turns besides the begin and end tokens, and a user may therefore not write."""

_FAMILY_OF_NAME = (
    (r"vicuna|llava-?v?1\.5", "vicuna_v1"),
    (r"llama-?_?3|llama3", "llama3"),
    (r"llama-?_?2.*chat|llama2.*chat|mistral.*instruct", "llama2"),
    (r"qwen|chatml|smollm.*instruct|hermes|orca", "chatml"),
)


def template_family(tokenizer_or_name: Any) -> str:
    """Guess which chat template a language model was tuned with; ``"plain"`` where nothing speaks for another.

    A tokenizer's own chat template is the best evidence, then its name, then the control tokens it knows.
    """
    name = tokenizer_or_name if isinstance(tokenizer_or_name, str) else str(tokenizer_or_name.name_or_path)
    template = str(getattr(tokenizer_or_name, "chat_template", None) or "")
    for mark, family in (("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama3"), ("[INST]", "llama2")):
        if mark in template:
            return family
    if "USER:" in template:
        return "vicuna_v1"
    for pattern, family in _FAMILY_OF_NAME:
        if re.search(pattern, name.lower()):
            return family
    vocabulary: Callable[[], dict[str, int]] = getattr(tokenizer_or_name, "get_added_vocab", dict)
    for family in ("chatml", "llama3"):
        if CONTROL_TOKENS[family][0] in vocabulary():
            return family
    return "plain"


def chat_template(family: str) -> str:
    """The jinja template of ``family``; raises ConfigError where there is none."""
    if not isinstance(family, str) or family not in CHAT_TEMPLATES:
        raise ConfigError(f"expected a chat template among {', '.join(CHAT_TEMPLATES)}, got {family!r}")
    return CHAT_TEMPLATES[family]


# ---------------------------------------------------------------------------------------------------------------------
# Placeholders


def placeholders(text: str) -> list[int]:
    """Numbers of the ``<regionN>`` placeholders in ``text``, from 1, in order of appearance, repeats included.

    Raises:
        RegionError: something begins like a placeholder and is none: ``<region>``, ``<region0>``, ``<region1``.

    Paper: §3.2
    """
    return [placeholder_number(match) for match in PLACEHOLDER.finditer(text)]


def placeholder_number(match: re.Match[str]) -> int:
    """The region number of one match of the placeholder pattern; raises RegionError as :func:`placeholders` does."""
    if match[1] is None:
        raise RegionError(f"expected <region1>, <region2>, ... numbered from 1, got {match[0]!r}")
    return int(match[1])


def replace_placeholders(text: str, replacement: Callable[[int], str]) -> str:
    """Replace each ``<regionN>`` of ``text`` by ``replacement(N)``; raises RegionError as :func:`placeholders` does."""
    return PLACEHOLDER.sub(lambda match: replacement(placeholder_number(match)), text)


def check_placeholders(texts: str | Iterable[str], n_regions: int) -> list[str]:
    """Compare the placeholders of a text, or of the texts of a conversation, with the number of regions given.

    Returns:
        Warnings, one for each region that no turn mentions.

    Raises:
        RegionError: a placeholder is malformed or stands for a region that was not given.
    """
    mentioned = {number for text in ([texts] if isinstance(texts, str) else texts) for number in placeholders(text)}
    for number in sorted(mentioned):
        if number > n_regions:
            given = {0: "no region was", 1: "1 region was"}.get(n_regions, f"{n_regions} regions were")
            raise RegionError(
                f"<region{number}> stands for region {number}, but {given} given; "
                f"give region {number} too, or leave <region{number}> out of the text"
            )
    return [
        f"region {number} was given but <region{number}> is never mentioned, so it has no influence on the answer"
        for number in range(1, n_regions + 1)
        if number not in mentioned
    ]


def check_text(text: Any, expected: str) -> None:
    """Raise DataError for what no tokenizer reads: no text, blank, or bytes that are not UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"expected {expected}, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"expected {expected} in UTF-8, got {text!r:.80}") from None


def region_list(regions: Sequence[int]) -> str:
    """``[1, 2, 3]`` as the paper writes it: ``<region1>, <region2> and <region3>``."""
    names = [f"<region{number}>" for number in regions]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Task-guided prompts

REC_SUFFIX: Final = "Answer the question using the template Region [x]."
"""Asks for the number of a region as the answer. Paper: Table 1."""

NO_MATCH: Final = "No corresponding options found."
"""The answer to a choice among regions of which none fits. Paper: Table 1."""


def closed_set_suffix(label_set: str = "COCO-80") -> str:
    """Ask for one of the names of ``label_set``, a name the model was trained to know. Paper: Table 1."""
    return f"Answer the question using {label_set} category names."


def region_answer(number: int) -> str:
    """Cite region ``number`` (1-based) as the answer to a choice among regions. Paper: Table 1."""
    return f"Region [{number}]"


_ANSWER = re.compile(r"region\s*\[?\s*([1-9][0-9]*)\s*\]?\s*\.?", re.IGNORECASE)


def parse_region_answer(text: str) -> int | Literal["invalid"] | None:
    """The 1-based region of an answer to a choice among regions, None for :data:`NO_MATCH`, or ``"invalid"``.

    Case, brackets, blanks and a final full stop are forgiven; anything else is not.
    """
    text = text.strip()
    if text.rstrip(" .").lower() == NO_MATCH.rstrip(".").lower():
        return None
    match = _ANSWER.fullmatch(text)
    return int(match[1]) if match else "invalid"


QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "classify": (
        "What category name best describes the region represented by {regions}?",
        "How would you label the section {regions}?",
        "What is the class name of {regions}?",
        "What is present in {regions}?",
        "What is {regions}?",
        "Which category does {regions} belong to?",
        "Name the object in {regions}.",
        "What kind of object is shown in {regions}?",
        "Identify the object located at {regions}.",
        "Give the category of the area marked by {regions}.",
    ),
    "describe": (
        "Describe in detail the object located at {regions} in the image.",
        "Provide a detailed description of {regions}.",
        "Share a thorough analysis of {regions}.",
        "Describe the region {regions} in detail.",
        "What can you tell me about {regions}?",
        "Explain in detail what {regions} looks like and where it is.",
        "Give a full description of the object in {regions}.",
        "Tell me everything you can see in {regions}.",
        "Describe {regions} and its surroundings.",
        "Please give a detailed account of what {regions} shows.",
    ),
    "caption": (
        "Describe {regions} briefly.",
        "Give a short description of {regions}.",
        "Write a short caption for {regions}.",
        "Describe {regions} in one short phrase.",
        "What does {regions} show, in a few words?",
        "Summarize {regions} in a few words.",
        "Provide a brief caption of the region {regions}.",
        "How would you refer to {regions} in a few words?",
        "In short, what is in {regions}?",
        "Caption the area {regions}.",
    ),
    "refer": (
        "Refer to {regions} so that nothing else in the image is meant.",
        "Which words single out {regions}?",
        "Give an expression that fits {regions} alone.",
        "How would you point out {regions} in words?",
        "Tell {regions} from everything else in the image.",
        "Name {regions} so that it can be found.",
        "What is the object in {regions} to be called among the others?",
        "Write a referring expression for {regions}.",
        "By which words is {regions} found in the image?",
        "Say which object {regions} is.",
    ),
    "relation": (
        "Describe the relationship between {first} and {second}.",
        "How does {first} relate to {second}?",
        "Where is {first} relative to {second}?",
        "What is the relation between {first} and {second}?",
        "How is {first} placed with respect to {second}?",
        "Where is {first} compared with {second}?",
        "In what relation does {first} stand to {second}?",
        "Explain how {first} and {second} lie to each other.",
        "What is the position of {first} relative to {second}?",
        "How are {first} and {second} related?",
    ),
    "locate": (
        'From the provided masks denoted by {regions}, which one fits "{expression}"?',
        "Match the object with its description: {expression}. The options are {regions}.",
        'Which of {regions} is "{expression}"?',
        'Among {regions}, which one represents "{expression}"?',
        'Given {regions}, which one is best described as "{expression}"?',
        'Which region shows "{expression}": {regions}?',
        'Find "{expression}" among {regions}.',
        'The regions are {regions}. Which one does "{expression}" refer to?',
        'Choose from {regions} the one that fits "{expression}".',
        'Of the regions {regions}, which corresponds to "{expression}"?',
    ),
    "locate_each": (
        "Find each of these among {regions}: {expression}.",
        "Which of {regions} is which of these: {expression}?",
        "Match each name with its region: {expression}. The regions are {regions}.",
        "The regions are {regions}. Where are these: {expression}?",
        "Among {regions}, find {expression}.",
        "Where are {expression} among {regions}?",
        "Give the region of each: {expression}. Choose from {regions}.",
        "Of the regions {regions}, name the one that shows each of {expression}.",
        "Assign to each of these one of {regions}: {expression}.",
        "Given {regions}, locate each of {expression}.",
    ),
    "presence_each": (
        "Which of these are in the image: {expression}?",
        "Say of each whether the image shows it: {expression}.",
        "Are these in the picture: {expression}?",
        "Does the image show these: {expression}?",
        "Check the photo for each of these: {expression}.",
        "Go through this list and say what can be seen: {expression}.",
        "Which of these does the photo show: {expression}?",
        "For each of these, is it in the image: {expression}?",
        "Can these be seen in the image: {expression}?",
        "Is each of these there: {expression}?",
    ),
    "presence": (
        "Is there {category} in the image?",
        "Does the image contain {category}?",
        "Can you see {category} in this picture?",
        "Is {category} present in the image?",
        "Does this photo show {category}?",
        "Is {category} visible in the picture?",
        "Do you see {category} in the image?",
        "Is there {category} anywhere in this photo?",
        "Can {category} be found in the image?",
        "Would you say that there is {category} in this image?",
    ),
    "image_caption": (
        "Describe the image in detail.",
        "Provide a detailed description of the given image.",
        "Share a thorough analysis of the image.",
        "What does this image show?",
        "Describe this picture.",
        "Write a caption for the image.",
        "What is happening in the photo?",
        "Give a description of the whole image.",
        "What can be seen in this picture?",
        "Tell me what this image is about.",
    ),
}
"""Ten wordings per task, the paper's own first where it has one (Figures 1 and 4, Table 1, §3.3)."""


def question(
    task: str,
    index: int = 0,
    *,
    regions: Sequence[int] = (),
    expression: str = "",
    category: str = "",
    label_set: str = "COCO-80",
    guided: bool = True,
) -> str:
    """The user's text for one task, task-guided suffix included.

    Args:
        task: a key of :data:`QUESTIONS`.
        index: which wording; taken modulo their number, so any counter or random integer will do.
        regions: 1-based numbers of the regions asked about (``relation``: exactly two; ``locate``: the options).
        expression: what to find, for ``locate``; names, separated by commas, for ``locate_each`` and ``presence_each``.
        category: the class asked for, for ``presence``; its article is added.
        label_set: the closed set named in the suffix of ``classify``.
        guided: end ``classify`` and ``locate`` with the suffix that fixes the format of the answer.

    Returns:
        Text with ``<regionN>`` placeholders, without ``<image>``.

    Raises:
        ConfigError: no such task.
        DataError: a slot that the task needs is missing.

    Paper: §3.2, Table 1
    """
    if task not in QUESTIONS:
        raise ConfigError(f"expected a task among {', '.join(QUESTIONS)}, got {task!r}")
    text = QUESTIONS[task][index % len(QUESTIONS[task])]
    needs = {"relation": 2, "presence": 0, "presence_each": 0, "image_caption": 0}.get(task, 1)
    if len(regions) < needs or (task == "relation" and len(regions) != 2):
        raise DataError(f"a {task!r} question needs {needs} region number(s), got {list(regions)}")
    for slot, value in (("expression", expression), ("category", category)):
        if f"{{{slot}}}" in text and not (isinstance(value, str) and value.strip()):
            raise DataError(f"a {task!r} question needs {slot}=..., got {value!r}")
    text = text.format(
        regions=region_list(regions) if regions else "",
        first=f"<region{regions[0]}>" if regions else "",
        second=f"<region{regions[1]}>" if len(regions) > 1 else "",
        expression=expression.strip(),
        category=indefinite(category) if category else "",
    )
    suffix = {"classify": closed_set_suffix(label_set), "locate": REC_SUFFIX}.get(task) if guided else None
    return f"{text} {suffix}" if suffix else text


_PAIRS = {"skis", "scissors"}
_UNCOUNTED = {"broccoli"}


def indefinite(noun: str) -> str:
    """``noun`` with its indefinite article: a cat, an airplane, a pair of skis, some broccoli."""
    noun = noun.strip()
    if noun in _PAIRS:
        return f"a pair of {noun}"
    if noun in _UNCOUNTED:
        return f"some {noun}"
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


# ---------------------------------------------------------------------------------------------------------------------
# COCO's closed set

COCO_80: Final[tuple[str, ...]] = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
    bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
    snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,
    fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
    potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
    refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n    ", "").split(",")
)
"""The 80 category names of COCO in their official order."""

_UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

COCO_IDS: Final[tuple[int, ...]] = tuple(number for number in range(1, 91) if number not in _UNUSED_COCO_IDS)
"""The identifiers of :data:`COCO_80` in COCO's annotation files, which number 91 kinds and use 80."""

LABEL_SETS: Final[dict[str, tuple[str, ...]]] = {"COCO-80": COCO_80}
"""Closed sets known by name, as :func:`closed_set_suffix` names them."""


def check_choices(choices: Sequence[str] | None, label_set: str) -> list[str]:
    """The names of a closed set without blanks around them; those of ``label_set`` where ``choices`` is None.

    Raises:
        ConfigError: there are no choices, one is repeated, or there are none and the label set is unknown.
        DataError: a choice is no text, or blank.
        RegionError: a choice speaks of a region.
    """
    if choices is None:
        if label_set not in LABEL_SETS:
            raise ConfigError(f"expected choices, or a label_set among {', '.join(LABEL_SETS)}, got {label_set!r}")
        return list(LABEL_SETS[label_set])
    if isinstance(choices, str) or not isinstance(choices, Iterable):
        raise ConfigError(f"expected choices as a list of names, got {choices!r:.80}")
    names = list(choices)
    for name in names:
        check_text(name, "choices that are names")
        check_placeholders(name, 0)
    names = [name.strip() for name in names]
    if not names:
        raise ConfigError("expected at least one choice, got none")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ConfigError(f"expected every choice once, got {', '.join(map(repr, repeated[:5]))} more than once")
    return names
