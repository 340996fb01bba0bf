"""Every word the model reads that is not the user's: chat templates, placeholders, task-guided suffixes, questions.

The words lie in ``templates/prompts.toml``. Training, evaluation and the predictor all take them from here, so a
question asked of the model is a question it was trained on. Nothing here needs torch. Paper: §3.2 and Table 1.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.storage import is_unicode

_WORDS: Final = tomllib.loads((Path(__file__).parent / "templates" / "prompts.toml").read_text(encoding="utf-8"))

IMAGE_TOKEN: Final = "<image>"
"""Stands for the whole image, once, at the start of the first user turn; becomes one token per image feature."""

REGION_TOKEN: Final = "<region>"
"""The one token in the vocabulary whose embedding is replaced by that of a region."""

PLACEHOLDER: Final = re.compile(r"<region([1-9][0-9]{0,5})>|(?i:<region)[^<>]{0,20}>?")
"""A region's placeholder, group 1 its number; without a group 1, something that only looks like one."""

CHAT_TEMPLATES: Final[dict[str, str]] = {name: family["template"] for name, family in _WORDS["chat"].items()}
"""One jinja template per family of language models; ``plain`` is for models without a chat format of their own."""

CONTROL_TOKENS: Final[dict[str, tuple[str, ...]]] = {
    name: tuple(family["control"]) for name, family in _WORDS["chat"].items()
}
"""What a template writes between turns besides the begin and end tokens, and a user may therefore not write."""

QUESTIONS: Final[dict[str, tuple[str, ...]]] = {task: tuple(texts) for task, texts in _WORDS["questions"].items()}
"""Ten wordings per task, one of the paper's first where it has any (Figures 1 and 4, Table 1, §3.3)."""

COMMON: Final[dict[str, tuple[str, ...]]] = {kind: tuple(texts) for kind, texts in _WORDS["common"].items()}
"""What people ask besides, by kind; ``{r}`` and ``{s}`` are regions, ``{a}`` a class, ``{ns}`` its plural."""

OFF_TOPIC: Final[dict[str, tuple[str, ...]]] = {use: tuple(texts) for use, texts in _WORDS["off_topic"].items()}
"""Questions that no image answers: ``trained`` on, and others to be ``asked`` in evaluation."""

LABEL_SETS: Final[dict[str, tuple[str, ...]]] = {name: tuple(names) for name, names in _WORDS["label_sets"].items()}
"""Closed sets known by name, as :func:`closed_set_suffix` names them."""

COCO_80: Final = LABEL_SETS["COCO-80"]
"""The 80 category names of COCO in their official order."""

COCO_IDS: Final = tuple(k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The identifiers of :data:`COCO_80` in COCO's annotation files, which number 91 kinds and use 80."""

NO_MATCH: Final = "No corresponding options found."
"""The answer to a choice among regions of which none fits. Paper: Table 1."""

REC_SUFFIX: Final = "Answer the question using the template Region [x]."
"""Asks for the number of a region as the answer. Paper: Table 1."""

_FAMILY_OF_NAME = (
    (r"vicuna|llava-?v?1\.5", "vicuna_v1"),
    (r"llama-?_?3|llama3", "llama3"),
    (r"llama-?_?2.*chat|llama2.*chat|mistral.*instruct", "llama2"),
    (r"qwen|chatml|smollm.*instruct|hermes|orca", "chatml"),
)


def template_family(tokenizer: Any) -> str:
    """The chat template that a language model was probably tuned with, ``"plain"`` without evidence.

    A tokenizer's own chat template is the best evidence, then its name, then the control tokens it knows.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for mark, family in (("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama3"), ("[INST]", "llama2")):
        if mark in template:
            return family
    if "USER:" in template:
        return "vicuna_v1"
    for pattern, family in _FAMILY_OF_NAME:
        if re.search(pattern, str(tokenizer.name_or_path).lower()):
            return family
    for family in ("chatml", "llama3"):
        if CONTROL_TOKENS[family][0] in tokenizer.get_added_vocab():
            return family
    return "plain"


def chat_template(family: str) -> str:
    """The jinja template of ``family``; raises ConfigError where there is none."""
    if not isinstance(family, str) or family not in CHAT_TEMPLATES:
        raise ConfigError(f"expected a chat template among {', '.join(CHAT_TEMPLATES)}, got {family!r}")
    return CHAT_TEMPLATES[family]


def placeholders(text: str) -> list[int]:
    """Numbers of the ``<regionN>`` placeholders in ``text``, from 1, in order of appearance, repeats included.

    RegionError for what begins like a placeholder and is none: ``<region>``, ``<region0>``, ``<region1``. Paper: §3.2
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
    """Warnings, one for each of ``n_regions`` regions that neither the text nor any of the texts mentions.

    RegionError where a placeholder is malformed or stands for a region that was not given.
    """
    mentioned = {number for text in ([texts] if isinstance(texts, str) else texts) for number in placeholders(text)}
    for number in sorted(mentioned):
        if number > n_regions:
            given = {0: "no region was", 1: "1 region was"}.get(n_regions, f"{n_regions} regions were")
            raise RegionError(f"<region{number}> stands for region {number}, but {given} given; give it, or drop it")
    return [
        f"region {number} was given but <region{number}> is never mentioned, so it has no influence on the answer"
        for number in range(1, n_regions + 1)
        if number not in mentioned
    ]


def check_text(text: Any, expected: str) -> None:
    """Raise DataError for what no tokenizer reads: no text, blank, or bytes that are not UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"expected {expected}, got {text!r:.80}")
    if not is_unicode(text):
        raise DataError(f"expected {expected} in UTF-8, got {text!r:.80}")


def closed_set_suffix(label_set: str = "COCO-80") -> str:
    """Ask for one of the names of ``label_set``, a name the model was trained to know. Paper: Table 1."""
    return f"Answer the question using {label_set} category names."


def region_answer(number: int) -> str:
    """Cite region ``number`` (1-based) as the answer to a choice among regions. Paper: Table 1."""
    return f"Region [{number}]"


_ANSWER = re.compile(r"region\s*\[?\s*([1-9][0-9]{0,5})\s*\]?\s*\.?", re.IGNORECASE)


def parse_region_answer(text: str) -> int | Literal["invalid"] | None:
    """The 1-based region of an answer to a choice among regions, None for :data:`NO_MATCH`, or ``"invalid"``.

    Case, brackets, blanks and a final full stop are forgiven; anything else is not.
    """
    text = text.strip()
    if text.rstrip(" .").lower() == NO_MATCH.rstrip(".").lower():
        return None
    match = _ANSWER.fullmatch(text)
    return int(match[1]) if match else "invalid"


def renumber(text: str, numbers: Mapping[int, int], unknown: str | None = None) -> str:
    """Replace numbers in brackets; those that are not in ``numbers`` become ``unknown``, or stay."""

    def replaced(match: re.Match[str]) -> str:
        number = numbers.get(int(match[1]))
        return (unknown or match[0]) if number is None else f"[{number}]"

    return re.sub(r"\[(\d{1,6})\]", replaced, text)


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
    names = [f"<region{number}>" for number in regions] or [""]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    slots = {"expression": expression.strip(), "category": indefinite(category) if category else ""}
    text = text.format(regions=listed, first=names[0], second=names[-1], **slots)
    suffix = {"classify": closed_set_suffix(label_set), "locate": REC_SUFFIX}.get(task) if guided else None
    return f"{text} {suffix}" if suffix else text


def indefinite(noun: str) -> str:
    """``noun`` with its indefinite article: a cat, an airplane, a pair of skis, some broccoli."""
    noun = noun.strip()
    if noun in ("skis", "scissors"):
        return f"a pair of {noun}"
    if noun == "broccoli":
        return f"some {noun}"
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def definite(name: str) -> str:
    """``name`` with the definite article instead of another or none: the cat."""
    return f"the {re.sub('^(an?|the) ', '', name.strip(), flags=re.IGNORECASE)}"


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
