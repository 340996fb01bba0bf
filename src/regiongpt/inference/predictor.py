"""Set an image once, then ask about its regions as often as you like."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import torch

from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError, naming
from regiongpt.images import ImageSource, load_image
from regiongpt.inference.choices import Classified, Located, answer_scores, classified, locate_expressions
from regiongpt.inference.engine import (
    Answer,
    Engine,
    Latest,
    Prompt,
    Scene,
    TooLong,
    Turn,
    check_regions,
    citation_warnings,
    notes,
    pick_device,
    pick_dtype,
    question_turns,
)
from regiongpt.inference.options import ROWS, ClassifyOptions, DescribeOptions, Detail, LocateOptions, Memory, Options
from regiongpt.model import weights
from regiongpt.prompts import check_choices, check_placeholders, check_text
from regiongpt.prompts import question as task_question
from regiongpt.regions import Region

Regions = Region | Sequence[Region]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question for :meth:`RegionPredictor.ask_many`; options as for :meth:`RegionPredictor.ask`.

    Attributes:
        text: in it ``<regionN>`` stands for the N-th region (from 1), any number of times.
        regions: in pixels of the image.
        image: what :func:`regiongpt.load_image` takes; None for the image that is set.
        history: earlier turns, the oldest first.
    """

    text: str
    regions: Regions = ()
    image: ImageSource | None = None
    history: Sequence[Turn] = ()
    detail: Detail | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None


class RegionPredictor:
    """Ask a model about regions of an image.

    Examples:
        >>> predictor = RegionPredictor.from_pretrained()
        >>> predictor.set_image("photo.jpg")
        >>> predictor.ask("What is <region1> doing?", [Region.box(40, 60, 300, 280)]).text

    Several threads may use one predictor: each asks about the image that it set itself, or else about the last that any
    thread has set; what they ask at the same time is answered in one batch. Nobody else may call its language model
    meanwhile.

    Every method raises RegionError for a region that does not fit the image, DataError for an empty or too long
    question, and ConfigError for an option out of its range or where no image was set.

    Args:
        model: a :class:`RegionGPTForConditionalGeneration`, already on its device.
        processor: its :class:`RegionGPTProcessor`.
        images: encoded images to keep, found again by their pixels; 0 keeps none but those set.
        token_budget: limits memory: tokens of the longest question and answer times the answers in the batch. Default:
            1 GiB on a CPU, half of the free memory on a CUDA device.
        rows: answers generated at a time, unless the budget allows fewer.
    """

    def __init__(
        self, model: Any, processor: Any, *, images: int = 4, token_budget: int | None = None, rows: int = ROWS
    ) -> None:
        memory = Memory(images=images, token_budget=token_budget, rows=rows)
        self.engine = Engine(model, processor, memory.token_budget, memory.rows)
        # An image takes its refined map (37 MiB in float32 for CLIP ViT-L/14 at 336 pixels) and the keys and values of
        # its tokens (300 MiB in half precision for 576 tokens of a 7B Llama).
        self._scenes: Latest[Scene] = Latest(memory.images)
        self._last: Scene | None = None
        self._own = threading.local()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        untrained: bool = False,
        **memory: Any,
    ) -> "RegionPredictor":
        """Load a checkpoint folder, by default the small model that ships in this package.

        Args:
            path: the folder.
            device: ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``; default: the first of CUDA, MPS, CPU there is.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default: bfloat16 where CUDA has it, else float32.
                ``"int8"`` is for the language model's linear layers; all else is as stored.
            untrained: take a model whose answers mean nothing, too.
            **memory: ``images``, ``token_budget`` and ``rows``, as above.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the others, or the model is untrained.
        """
        kept = Memory(**memory)
        chosen = pick_device(device)
        model, processor = weights.load(path, device=chosen, dtype=pick_dtype(dtype, chosen))
        if model.untrained and not untrained:
            raise CheckpointError(
                f"{path}: refinement and connector are untrained; train them, or give --untrained (untrained=True)"
            )
        return cls(model, processor, **dict(kept))

    def set_image(self, image: ImageSource) -> "RegionPredictor":
        """Encode an image, of any kind that :func:`regiongpt.load_image` takes, and return this predictor. Paper: §3.1.

        Every later question of this thread is about it, until the next one is set.
        """
        self._last = self._own.scene = self._encoded(image)
        return self

    def _encoded(self, image: ImageSource) -> Scene:
        photo = load_image(image)
        digest = blake2b(f"{photo.mode} {photo.size} ".encode(), digest_size=16)
        digest.update(photo.tobytes())
        return self._scenes.get(digest.digest(), lambda: self.engine.encode_image(photo))

    def _here(self) -> Scene:
        scene: Scene | None = getattr(self._own, "scene", None) or self._last
        if scene is None:
            raise ConfigError("expected an image before the first question; call set_image(...) first")
        return scene

    def ask(self, question: str, regions: Regions = (), *, history: Sequence[Turn] = (), **generation: Any) -> Answer:
        """Ask one question about the image.

        Args:
            question: text in which ``<regionN>`` stands for the N-th region (from 1), any number of times.
            regions: in pixels of the image; the same list for the whole conversation.
            history: earlier turns, ``{"role": "user" | "assistant", "content": ...}``, the oldest first.
            **generation: fields of :class:`~regiongpt.inference.options.Options`, such as ``max_new_tokens``.
        """
        began, options, scene = time.perf_counter(), Options(**generation), self._here()
        prompt = self._prompt(scene, question, regions, history, options)
        ((_, answer),) = self.engine.answers([(scene, prompt, options)], began)
        return answer

    def stream(
        self, question: str, regions: Regions = (), *, history: Sequence[Turn] = (), **generation: Any
    ) -> Iterator[str]:
        """Ask like :meth:`ask` and yield the answer in pieces; leaving the iteration ends the generation."""
        options, scene = Options(**generation), self._here()
        return self.engine.stream(scene, self._prompt(scene, question, regions, history, options), options)

    def _prompt(
        self, scene: Scene, question: str, regions: Regions, history: Sequence[Turn], options: Options
    ) -> Prompt:
        turns, listed = question_turns(history, question), Region.list_of(regions)
        pooled = self.engine.pool(scene, listed, options.detail)
        return self.engine.prompt(turns, pooled, len(listed), options.max_new_tokens, notes(listed))

    def ask_many(self, questions: Iterable[Question], **generation: Any) -> list[Answer]:
        """Ask many questions in one batch, each with regions of its own, about one image or several.

        All are checked before the first is answered; an error names the question, from 1. A question's own options
        come first. With a ``seed`` an answer depends on the seed and the question's place, not on the others.
        """
        return [answer for _, answer in sorted(self.answers(questions, **generation), key=lambda found: found[0])]

    def answers(self, questions: Iterable[Question], **generation: Any) -> Iterator[tuple[int, Answer]]:
        """Ask as :meth:`ask_many` does; yield each question's place, from 0, and its answer as it is finished."""
        began, options = time.perf_counter(), Options(**generation)
        if isinstance(questions, Question) or not isinstance(questions, Iterable):
            raise ConfigError(f"expected questions as a list of Question, got {type(questions).__name__}")
        listed, nothing = list(questions), self.engine.model.connector.mean.new_empty(0)
        images: dict[Any, tuple[ImageSource | Scene, tuple[int, int]]] = {}  # each with its size
        checked = []
        for place, question in enumerate(listed):
            with naming(f"question {place + 1}"):
                if not isinstance(question, Question):
                    raise ConfigError(f"expected a Question(text=..., regions=[...]), got {type(question).__name__}")
                own = {name: value for name in Options.model_fields if (value := getattr(question, name)) is not None}
                if options.seed is not None:
                    digest = blake2b(f"{options.seed} {place}".encode(), digest_size=8).digest()
                    own.setdefault("seed", int.from_bytes(digest) >> 1)
                settings = options.replace(**own)
                self.engine.processor.check_detail(settings.detail)
                turns, regions = question_turns(question.history, question.text), Region.list_of(question.regions)
                prompt = self.engine.prompt(turns, nothing, len(regions), settings.max_new_tokens, notes(regions))
                is_file = isinstance(question.image, str | Path)
                key = str(question.image) if is_file else id(question.image)
                if key not in images:
                    if question.image is None:
                        scene = self._here()
                        images[key] = scene, (scene.width, scene.height)
                    else:  # a file is read again at its turn
                        photo = load_image(question.image)
                        images[key] = question.image if is_file else photo, photo.size
                image, size = images[key]
                check_regions(regions, *size)
            checked.append((image, regions, prompt, settings))

        def asked() -> Iterator[tuple[Scene, Prompt, Options]]:
            last: Any = None
            for image, regions, prompt, own in checked:
                if image is not last:  # a file is decoded once for all questions about it that follow each other
                    last, scene = image, image if isinstance(image, Scene) else self._encoded(image)
                yield scene, replace(prompt, pooled=self.engine.pool(scene, regions, own.detail)), own

        return self.engine.answers(asked(), began)

    def conversation(self, regions: Regions = ()) -> "Conversation":
        """Begin a conversation about the image set now, whose turns all speak of the same regions."""
        scene, listed = self._here(), Region.list_of(regions)
        check_regions(listed, scene.width, scene.height)
        return Conversation(engine=self.engine, scene=scene, regions=tuple(listed))

    @overload
    def describe(self, regions: Region, **options: Any) -> Answer: ...

    @overload
    def describe(self, regions: Sequence[Region], **options: Any) -> list[Answer]: ...

    def describe(self, regions: Regions, **options: Any) -> Answer | list[Answer]:
        """Describe regions, each on its own as ``Region [1]``, in one batch.

        Options: ``brief=True`` asks for a caption of a few words; ``max_new_tokens`` and ``detail`` as for :meth:`ask`.
        """
        settings = DescribeOptions(**options)
        text = task_question("caption" if settings.brief else "describe", regions=[1])
        generation = Options(max_new_tokens=settings.max_new_tokens, detail=settings.detail)
        found = self.engine.answer_each(self._here(), text, Region.list_of(regions), generation)
        return found[0] if isinstance(regions, Region) else found

    @overload
    def classify(self, regions: Region, choices: Sequence[str] | None = ..., **options: Any) -> Classified: ...

    @overload
    def classify(
        self, regions: Sequence[Region], choices: Sequence[str] | None = ..., **options: Any
    ) -> list[Classified]: ...

    def classify(
        self, regions: Regions, choices: Sequence[str] | None = None, **options: Any
    ) -> Classified | list[Classified]:
        """Choose the class of each region from a closed set; nothing off the list can come out.

        A choice's score is the log likelihood of its tokens and the end of the answer. Paper: §3.2, Table 1, §4.1.

        Args:
            regions: one region or several, each classified on its own.
            choices: at least one name, none twice. Default: the names of ``label_set``.
            **options: ``label_set`` ("COCO-80"), the set named in the question; ``top_k``: keep only this many of the
                most probable choices in the result; ``detail``, as for :meth:`ask`.
        """
        settings = ClassifyOptions(**options)
        names, scene = check_choices(choices, settings.label_set), self._here()
        turns = question_turns((), task_question("classify", regions=[1], label_set=settings.label_set))
        pooled = self.engine.pool_each(scene, Region.list_of(regions), settings.detail)
        scores_BA = answer_scores(self.engine, scene, turns, pooled, names)
        found = [classified(scores_A, names, settings.top_k) for scores_A in scores_BA]
        return found[0] if isinstance(regions, Region) else found

    @overload
    def locate(self, expression: str, regions: Regions, **options: Any) -> Located: ...

    @overload
    def locate(self, expression: list[str] | tuple[str, ...], regions: Regions, **options: Any) -> list[Located]: ...

    def locate(
        self, expression: str | list[str] | tuple[str, ...], regions: Regions, **options: Any
    ) -> Located | list[Located]:
        """Choose the region that an expression, or each of several, refers to, or none. Paper: §3.2, Table 1; §4.3.

        Args:
            expression: such as ``"the red cup"``, or several of them.
            regions: at least one region to choose from.
            **options: ``by`` is ``"answer"``, the paper's way: one question about all regions, with ``Region [N]`` and
                the no-match sentence as choices; ``"words"``: how probable the expression is as the name of each
                region, as given or with "the", which always chooses one; or ``"both"`` (default): the product of the
                two; for no match, the words count as equally likely for every region. ``detail``, as for :meth:`ask`.
        """
        settings = LocateOptions(**options)
        if not isinstance(expression, str | list | tuple):
            raise DataError(f"expected expression as a text or a list of texts, got {expression!r:.80}")
        expressions = [expression] if isinstance(expression, str) else list(expression)
        scene, listed = self._here(), Region.list_of(regions)
        for each in expressions:
            check_text(each, "an expression such as 'the red cup'")
            check_placeholders(each, len(listed))
        if not listed:
            raise RegionError("expected at least one region to choose from, got none")
        pooled = self.engine.pool_each(scene, listed, settings.detail)
        found = locate_expressions(self.engine, scene, pooled, [each.strip() for each in expressions], settings.by)
        return found[0] if isinstance(expression, str) else found


@dataclass(kw_only=True)
class Conversation:
    """Several turns about one image and one list of regions, by one thread at a time.

    Answers equal those of :meth:`RegionPredictor.ask` with the turns so far as history. Where the model's context is
    full, the oldest turns are forgotten, with a warning.

    Attributes:
        messages: the turns so far, the oldest first, as transformers writes them.
        warnings: warnings of the last turn, such as that the oldest turns were dropped.
    """

    engine: Engine
    scene: Scene = field(repr=False)
    regions: tuple[Region, ...]
    messages: list[Turn] = field(default_factory=list)
    warnings: tuple[str, ...] = ()

    def ask(self, question: str, **generation: Any) -> Answer:
        """Ask as :meth:`RegionPredictor.ask` does; a question that fails leaves the conversation as it was."""
        began, options = time.perf_counter(), Options(**generation)
        prompt, kept = self._prepare(question, options)
        ((_, answer),) = self.engine.answers([(self.scene, prompt, options)], began)
        self._remember(kept, question, answer.text)
        return answer

    def stream(self, question: str, **generation: Any) -> Iterator[str]:
        """Ask as :meth:`ask` does, which checks at once, and yield the answer in pieces.

        Leaving the iteration ends the answer, and what was said of it is a turn.
        """
        options = Options(**generation)
        prompt, kept = self._prepare(question, options)

        def pieces() -> Iterator[str]:
            said = ""
            try:
                for piece in self.engine.stream(self.scene, prompt, options):
                    said += piece
                    yield piece
            except GeneratorExit:
                self._remember(kept, question, said)
                raise
            self._remember(kept, question, said)

        return pieces()

    def _prepare(self, question: str, options: Options) -> tuple[Prompt, list[Turn]]:
        kept, pooled = list(self.messages), self.engine.pool(self.scene, self.regions, options.detail)
        while True:
            try:
                turns = question_turns(kept, question)
                prompt = self.engine.prompt(turns, pooled, len(self.regions), options.max_new_tokens)
                break
            except TooLong:
                if not kept:
                    raise
                del kept[:2]
        # A region not spoken of yet may be in the next turn, so nothing is said about it here.
        self.warnings = () if self.messages else notes(self.regions)
        if forgotten := (len(self.messages) - len(kept)) // 2:
            self.warnings = (f"the model's context is full; forgot the oldest turns: {forgotten}",)
        return replace(prompt, warnings=self.warnings), kept

    def _remember(self, kept: Sequence[Turn], question: str, answer: str) -> None:
        self.warnings += tuple(citation_warnings(answer, len(self.regions)))
        if answer.strip():  # silence is not a turn that a template could write
            self.messages = [*question_turns(kept, question), {"role": "assistant", "content": answer.strip()}]
