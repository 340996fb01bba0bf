"""Set an image once, then ask about its regions as often as you like."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Unpack, overload

import torch

from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError, naming, short
from regiongpt.images import ImageSource, load_image
from regiongpt.inference.choices import Classified, Located, classify_regions, locate_expressions
from regiongpt.inference.conversation import Conversation
from regiongpt.inference.engine import (
    Answer,
    Engine,
    Prompt,
    Scene,
    Scenes,
    Turn,
    check_regions,
    notes,
    pick_device,
    pick_dtype,
    question_turns,
)
from regiongpt.inference.options import ROWS, WAYS, By, Classification, ClassifyOptions, Generation, Memory, Options
from regiongpt.inference.quantization import to_int8
from regiongpt.model import weights
from regiongpt.prompts import check_choices, check_placeholders, check_text
from regiongpt.prompts import question as task_question
from regiongpt.regions import Region


@dataclass(frozen=True, kw_only=True)
class Question:
    """One of many questions, for :meth:`RegionPredictor.ask_many`; its options as for :meth:`RegionPredictor.ask`.

    Attributes:
        text: in it ``<regionN>`` stands for the N-th region (from 1), any number of times.
        regions: in pixels of the image.
        image: what :func:`regiongpt.load_image` takes; None for the image that is set.
        history: earlier turns, the oldest first.
        seed: one given to all questions is made another one for each.
    """

    text: str
    regions: Region | Sequence[Region] = ()
    image: ImageSource | None = None
    history: Sequence[Turn] = ()
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None


@dataclass(kw_only=True)
class _Group:
    """The questions about one image: the place, regions, prompt without features, and options of each."""

    source: ImageSource | None
    members: list[tuple[int, list[Region], Prompt, Options]] = field(default_factory=list)


class RegionPredictor:
    """Ask a model about regions of an image.

    Examples:
        >>> predictor = RegionPredictor.from_pretrained()
        >>> predictor.set_image("photo.jpg")
        >>> predictor.ask("What is <region1> doing?", [Region.box(40, 60, 300, 280)]).text

    Several threads may use one predictor, each with an image of its own: a thread asks about the image that it set
    itself, or, if it never set one, about the last that any thread has set. What they ask at the same time is answered
    in one batch. While a predictor is at work, nobody else may call its language model.

    Args:
        model: a :class:`RegionGPTForConditionalGeneration`, already on its device.
        processor: the :class:`RegionGPTProcessor` that belongs to it.
        images: encoded images to keep, found again by their pixels; 0 keeps none but those set.
        token_budget: bounds the memory of the answers being written: the longest question with its answer, in tokens
            without the shared beginning, times their number. By default 1 GiB on a CPU and half of the free memory on
            a CUDA device.
        rows: answers written at a time, unless the budget allows fewer.
    """

    def __init__(
        self, model: Any, processor: Any, *, images: int = 4, token_budget: int | None = None, rows: int = ROWS
    ) -> None:
        memory = Memory(images=images, token_budget=token_budget, rows=rows)
        self.engine = Engine(model, processor, memory.token_budget, memory.rows)
        self._scenes = Scenes(self.engine, memory.images)
        self._last: Scene | None = None
        self._own = threading.local()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        int8: bool = False,
        untrained: bool = False,
        images: int = 4,
        token_budget: int | None = None,
        rows: int = ROWS,
    ) -> "RegionPredictor":
        """Load a checkpoint folder, by default the small model that ships in this package.

        Args:
            path: the folder.
            device: ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``; default: the first of CUDA, MPS, CPU there is.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default: bfloat16 on CUDA devices that have it, else
                float32.
            int8: keep the language model's weights in int8, on the CPU in float32 alone; answers change a little.
            untrained: load a checkpoint that has not been trained, too; its answers mean nothing.
            images: as above, and so are ``token_budget`` and ``rows``.
            token_budget: see above.
            rows: see above.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the others, or the model is untrained.
            ConfigError: an option is out of its range, not there on this machine, or does not go with another.
        """
        if path is not None and not isinstance(path, str | Path):
            raise ConfigError(f"expected path as a checkpoint folder, got {path!r:.80}")
        for name, flag in (("int8", int8), ("untrained", untrained)):
            if not isinstance(flag, bool):
                raise ConfigError(f"expected {name} as True or False, got {short(flag)}")
        memory = Memory(images=images, token_budget=token_budget, rows=rows)
        chosen = pick_device(device)
        model, processor = weights.load(path, device=chosen, dtype=pick_dtype(dtype, chosen))
        if model.untrained and not untrained:
            raise CheckpointError(
                f"{path}: refinement and connector are untrained; train them, or give --untrained (untrained=True)"
            )
        predictor = cls(model, processor, **dict(memory))
        if int8:  # now that the engine has tried, in full precision, whether the language model shares prefixes
            to_int8(model)
        return predictor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.engine.device

    def set_image(self, image: ImageSource) -> "RegionPredictor":
        """Encode an image, of any kind that :func:`regiongpt.load_image` takes, and return this predictor.

        Every later question of this thread is about it, until the next one is set. The same pixels are not encoded
        again while they are kept. Paper: §3.1

        Raises:
            DataError: the image cannot be read.
        """
        self._last = self._own.scene = self._scenes.get(load_image(image))
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # Open questions

    def ask(
        self,
        question: str,
        regions: Region | Sequence[Region] = (),
        *,
        history: Sequence[Turn] = (),
        **generation: Unpack[Generation],
    ) -> Answer:
        """Ask one question about the image.

        Args:
            question: text in which ``<regionN>`` stands for the N-th region (from 1), any number of times.
            regions: in pixels of the image; the same list for the whole conversation.
            history: earlier turns, ``{"role": "user" | "assistant", "content": ...}``, the oldest first.
            **generation: any of ``max_new_tokens`` (128); ``temperature`` (0), which takes the likeliest token each
                time, and above 0 draws; with it ``top_p`` (1), which draws from the likeliest tokens of this joint
                probability, and ``seed``, which makes the answer repeatable; ``stop``, one text or several that end the
                answer and are not part of it.

        Raises:
            RegionError: a region does not fit the image, or a placeholder stands for none.
            DataError: the question is empty, or with its history longer than the model can read.
            ConfigError: no image was set, an option is out of its range, or the token budget is too small for it.
        """
        began, options, scene = time.perf_counter(), Options(**generation), self._here()
        prompt = self._prompt(scene, question, regions, history, options)
        job = self.engine.job(scene, prompt, options)
        for _ in self.engine.scheduler.run([job]):
            pass
        return self.engine.finish(job, prompt, began)

    def stream(
        self,
        question: str,
        regions: Region | Sequence[Region] = (),
        *,
        history: Sequence[Turn] = (),
        **generation: Unpack[Generation],
    ) -> Iterator[str]:
        """Ask as :meth:`ask` does, which checks at once, and yield the answer in pieces as they are generated.

        Leaving the iteration early ends the generation.
        """
        options, scene = Options(**generation), self._here()
        prompt = self._prompt(scene, question, regions, history, options)

        def pieces() -> Iterator[str]:
            yield from self.engine.scheduler.stream(self.engine.job(scene, prompt, options, streams=True))

        return pieces()

    def ask_many(self, questions: Iterable[Question], **generation: Unpack[Generation]) -> list[Answer]:
        """Ask many questions at once, each with regions of its own, about one image or several.

        Each image is encoded once and its tokens are stored once. Everything that can be wrong with a question is found
        before the first is answered.

        Args:
            questions: any number. One that names no image is about the image set.
            **generation: as for :meth:`ask`; a question's own come first. With a ``seed`` each question draws by
                itself: an answer depends on the seed and the question's place, not on the others.

        Returns:
            The answers, in the order of the questions.

        Raises:
            RegionError, DataError, ConfigError: as :meth:`ask`, with the number of the question, from 1.
        """
        return [answer for _, answer in sorted(self.answers(questions, **generation), key=lambda found: found[0])]

    def answers(self, questions: Iterable[Question], **generation: Unpack[Generation]) -> Iterator[tuple[int, Answer]]:
        """Ask as :meth:`ask_many` does; yield each question's place, from 0, and its answer as it is finished."""
        began, options, here = time.perf_counter(), Options(**generation), self._scene
        if isinstance(questions, Question) or not isinstance(questions, Iterable):
            raise ConfigError(f"expected questions as a list of Question, got {type(questions).__name__}")
        groups = self._checked(questions, options, here)
        order: list[int] = []

        def asked() -> Iterator[tuple[Scene, Prompt, Options]]:
            for group in groups:
                scene = here if group.source is None else self._scenes.get(load_image(group.source))
                assert scene is not None
                pooled = self.engine.pool(scene, [region for _, regions, *_ in group.members for region in regions])
                sizes = [len(regions) * self.engine.processor.tokens_per_region for _, regions, *_ in group.members]
                alike = len({id(prompt.ids) for *_, prompt, _ in group.members}) == 1 < len(group.members)
                for (place, _, prompt, own), features in zip(group.members, torch.split(pooled, sizes), strict=True):
                    if alike:
                        prompt = prompt.for_many(self.engine.model.config.region_token_id)
                    order.append(place)
                    yield scene, replace(prompt, pooled=features), own

        return ((order[place], answer) for place, answer in self.engine.answers(asked(), began))

    def _checked(self, questions: Iterable[Question], options: Options, here: Scene | None) -> list[_Group]:
        """The questions by image, the images in the order of their first question."""
        groups: dict[Any, _Group] = {}
        known: dict[Any, Prompt] = {}
        nothing = self.engine.model.connector.mean.new_empty(0)
        for place, question in enumerate(questions):
            with naming(f"question {place + 1}"):
                if not isinstance(question, Question):
                    raise ConfigError(f"expected a Question(text=..., regions=[...]), got {type(question).__name__}")
                if question.image is None and here is None:
                    raise ConfigError("expected an image; call set_image(...) first, or give the question its own")
                own = {name: value for name in Options.model_fields if (value := getattr(question, name)) is not None}
                if "seed" not in own and options.seed is not None:
                    digest = blake2b(f"{options.seed} {place}".encode(), digest_size=8).digest()
                    own["seed"] = int.from_bytes(digest) >> 1
                settings = options.replace(**own)
                turns, regions = question_turns(question.history, question.text), Region.list_of(question.regions)
                same = (repr(turns), len(regions), settings.max_new_tokens)
                if same not in known:
                    known[same] = self.engine.prompt(turns, nothing, len(regions), settings.max_new_tokens)
            prompt = replace(known[same], warnings=(*notes(regions), *known[same].warnings))
            source = question.image
            key = str(source) if isinstance(source, str | Path) else id(source)
            groups.setdefault(key, _Group(source=source)).members.append((place, regions, prompt, settings))
        for group in groups.values():
            size = (here.width, here.height) if here else (0, 0)
            if group.source is not None:
                with naming(f"question {group.members[0][0] + 1}"):
                    photo = load_image(group.source)
                size = photo.size
                if not isinstance(group.source, str | Path):  # a stream cannot be read twice
                    group.source = photo
            for place, regions, *_ in group.members:
                with naming(f"question {place + 1}"):
                    check_regions(regions, *size)
        return list(groups.values())

    def conversation(self, regions: Region | Sequence[Region] = ()) -> "Conversation":
        """Begin a conversation about the image set now, whose turns all speak of the same regions."""
        scene, listed = self._here(), Region.list_of(regions)
        pooled = self.engine.pool(scene, listed)
        return Conversation(engine=self.engine, scene=scene, regions=tuple(listed), pooled=pooled)

    # -----------------------------------------------------------------------------------------------------------------
    # Tasks

    @overload
    def describe(self, regions: Region, *, brief: bool = ..., max_new_tokens: int = ...) -> Answer: ...

    @overload
    def describe(self, regions: Sequence[Region], *, brief: bool = ..., max_new_tokens: int = ...) -> list[Answer]: ...

    def describe(
        self, regions: Region | Sequence[Region], *, brief: bool = False, max_new_tokens: int = 128
    ) -> Answer | list[Answer]:
        """Describe regions, each on its own, in one batch; ``brief`` asks for a caption of a few words.

        Returns:
            An answer for a region, a list of them for a list. In each, ``Region [1]`` is the region described.

        Raises:
            RegionError: a region does not fit the image.
            ConfigError: no image was set, or an option is out of its range.
        """
        if not isinstance(brief, bool):
            raise ConfigError(f"expected brief as True or False, got {brief!r:.80}")
        text = task_question("caption" if brief else "describe", regions=[1])
        options = Options(max_new_tokens=max_new_tokens)
        found = self.engine.answer_each(self._here(), text, Region.list_of(regions), options)
        return found[0] if isinstance(regions, Region) else found

    @overload
    def classify(
        self, regions: Region, choices: Sequence[str] | None = ..., **options: Unpack[Classification]
    ) -> Classified: ...

    @overload
    def classify(
        self, regions: Sequence[Region], choices: Sequence[str] | None = ..., **options: Unpack[Classification]
    ) -> list[Classified]: ...

    def classify(
        self,
        regions: Region | Sequence[Region],
        choices: Sequence[str] | None = None,
        **options: Unpack[Classification],
    ) -> Classified | list[Classified]:
        """Choose the class of each region from a closed set; nothing off the list can come out.

        A choice's score is the log likelihood of all its tokens and of the end of the answer, so the scores, divided
        by their sum, are the probability of each answer given that it is on the list.

        Args:
            regions: one region or several, each classified on its own.
            choices: at least one name, none twice. Default: the names of ``label_set``.
            **options: any of ``label_set`` ("COCO-80"), the set named in the question; ``generate``: also generate the
                answer freely, as the paper's exact-match protocol does; ``length_normalized``: divide each score by its
                number of tokens; ``calibrated``: subtract the score of the same answer about a region of which nothing
                is known (https://arxiv.org/abs/2102.09690), which does harm with the model that ships
                (``docs/performance.md``); ``top_k``: keep only so many of the likeliest choices in the result.

        Returns:
            A result for a region, a list of them for a list.

        Raises:
            RegionError: a region does not fit the image.
            ConfigError: choices are empty, blank or repeated; an option is out of its range; no image was set.

        Paper: §3.2, Table 1 (the prompt), §4.1 (region classification)
        """
        settings = ClassifyOptions(**options)
        names, listed = check_choices(choices, settings.label_set), Region.list_of(regions)
        found = classify_regions(self.engine, self._here(), listed, names, settings)
        return found[0] if isinstance(regions, Region) else found

    @overload
    def locate(self, expression: str, regions: Region | Sequence[Region], *, by: By = ...) -> Located: ...

    @overload
    def locate(
        self, expression: list[str] | tuple[str, ...], regions: Region | Sequence[Region], *, by: By = ...
    ) -> list[Located]: ...

    def locate(
        self, expression: str | list[str] | tuple[str, ...], regions: Region | Sequence[Region], *, by: By = "both"
    ) -> Located | list[Located]:
        """Choose the region that an expression, or each of several, refers to, or none.

        Args:
            expression: such as ``"the red cup"``, or several of them.
            regions: at least one region to choose from.
            by: ``"answer"``, the paper's way: one question about all regions, with ``Region [N]`` and the no-match
                sentence scored as :meth:`classify` scores choices; ``"words"``: how likely the model is to call each
                region, by itself, by the expression, which always chooses a region; or ``"both"``: by the answer
                whether any of them fits, and by the words which.

        Raises:
            RegionError: a region does not fit the image, or none was given.
            DataError: an expression is empty.
            ConfigError: no image was set, or there is no such way.

        Paper: §3.2, Table 1; §4.3
        """
        if not isinstance(expression, str | list | tuple):
            raise DataError(f"expected expression as a text or a list of texts, got {expression!r:.80}")
        expressions = [expression] if isinstance(expression, str) else list(expression)
        scene, listed = self._here(), Region.list_of(regions)
        for each in expressions:
            check_text(each, "an expression such as 'the red cup'")
            check_placeholders(each, len(listed))
        if not isinstance(by, str) or by not in WAYS:
            raise ConfigError(f"by: expected one of {', '.join(WAYS)}, got {short(by)}")
        if not listed:
            raise RegionError("expected at least one region to choose from, got none")
        pooled = self.engine.pool_each(scene, listed)
        found = locate_expressions(self.engine, scene, pooled, [each.strip() for each in expressions], by)
        return found[0] if isinstance(expression, str) else found

    @property
    def _scene(self) -> Scene | None:
        own: Scene | None = getattr(self._own, "scene", None)
        return own or self._last

    def _here(self) -> Scene:
        scene = self._scene
        if scene is None:
            raise ConfigError("expected an image before the first question; call set_image(...) first")
        return scene

    def _prompt(
        self,
        scene: Scene,
        question: str,
        regions: Region | Sequence[Region],
        history: Sequence[Turn],
        options: Options,
    ) -> Prompt:
        turns, listed = question_turns(history, question), Region.list_of(regions)
        pooled = self.engine.pool(scene, listed)
        return self.engine.prompt(turns, pooled, len(listed), options.max_new_tokens, notes(listed))
