"""The friendly front of a model: set an image once, then ask about its regions as often as you like.

What a question costs is kept small by what is kept between questions. ``set_image`` runs the vision tower, the
refinement and the image's side of the connector; the first question reads the image's tokens into keys and values; from
then on a question only pools its regions from the kept map and runs its own words through the language model, in one
batch with whatever else is asked at the time. A closed set is scored in one pass over the tree of all its names.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, overload

import torch

from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError
from regiongpt.images import ImageSource, load_image
from regiongpt.inference import many
from regiongpt.inference.classification import Classified, classify_regions
from regiongpt.inference.conversation import Conversation
from regiongpt.inference.engine import (
    Answer,
    Engine,
    Prompt,
    Scene,
    Turn,
    check_regions,
    pick_device,
    pick_dtype,
    question_turns,
)
from regiongpt.inference.locating import Located, locate_expressions
from regiongpt.inference.many import Question
from regiongpt.inference.options import WAYS, By, Classification, ClassifyOptions, Generation, Memory, Options
from regiongpt.inference.quantization import to_int8
from regiongpt.inference.scenes import Scenes
from regiongpt.inference.scheduler import ROWS
from regiongpt.model import weights
from regiongpt.prompts import check_choices, check_placeholders, check_text
from regiongpt.prompts import question as task_question
from regiongpt.regions import Region


class RegionPredictor:
    """Ask a model about regions of an image.

    >>> predictor = RegionPredictor.from_pretrained()
    >>> predictor.set_image("photo.jpg")
    >>> predictor.ask("What is <region1> doing?", [Region.box(40, 60, 300, 280)]).text

    Several threads may use one predictor, each with an image of its own: a thread asks about the image that it set
    itself, or, if it never set one, about the last that any thread has set. What they ask at the same time is answered
    in one batch. While a predictor is at work, nobody else may call its language model.

    Args:
        model: a :class:`RegionGPTForConditionalGeneration`, already on its device.
        processor: the :class:`RegionGPTProcessor` that belongs to it.
        images: encoded images to keep, found again by their pixels; the one used longest ago goes first. 0 keeps none
            but those set.
        token_budget: tokens that all answers being written may take in memory, their questions included and the shared
            beginning not: the longest times their number. By default 1 GiB on a CPU and half of the free memory on a
            CUDA device.
        rows: answers written at a time, unless the budget allows fewer.

    Raises:
        ConfigError: ``images`` is negative, or ``token_budget`` or ``rows`` below 1.
    """

    def __init__(
        self, model: Any, processor: Any, *, images: int = 4, token_budget: int | None = None, rows: int = ROWS
    ) -> None:
        memory = Memory(images=images, token_budget=token_budget, rows=rows)
        self.engine = Engine(model, processor, memory.token_budget, memory.rows)
        self._scenes = Scenes(self.engine.look, memory.images)
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
        """Load a checkpoint folder.

        Args:
            path: the folder; default: the small model that ships in this package.
            device: ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``; default: the first of CUDA, MPS, CPU there is.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default: bfloat16 on CUDA devices that have it, else
                float32.
            int8: keep the language model's weights in int8, on the CPU in float32 alone: less memory, more answers a
                second, and answers that are not quite the same; see :mod:`regiongpt.inference.quantization`.
            untrained: load a checkpoint that has not been trained, too; its answers mean nothing.
            images: as above.
            token_budget: as above.
            rows: as above.

        Raises:
            CheckpointError: a file of the checkpoint is missing, damaged, or does not fit the others, or its refinement
                and connector are untrained.
            ConfigError: there is no such device or dtype here, int8 does not go with them, or a number is out of its
                range.
        """
        if path is not None and not isinstance(path, str | Path):
            raise ConfigError(f"expected path as a checkpoint folder, got {path!r:.80}")
        chosen = pick_device(device)
        model, processor = weights.load(path, device=chosen, dtype=pick_dtype(dtype, chosen))
        if model.untrained and not untrained:
            raise CheckpointError(
                f"{path}: refinement and connector are untrained, so its answers would mean nothing; train it first, "
                "or give --untrained (in Python untrained=True)"
            )
        if int8:
            to_int8(model)
        return cls(model, processor, images=images, token_budget=token_budget, rows=rows)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.engine.device

    def set_image(self, image: ImageSource) -> "RegionPredictor":
        """Encode an image; every later question of this thread is about it, until the next one is set.

        An image that was encoded lately is not encoded again: the same pixels find what was kept.

        Args:
            image: what :func:`regiongpt.load_image` takes.

        Returns:
            This predictor, so that a question can follow on the same line.

        Raises:
            DataError: the image cannot be read.

        Paper: §3.1
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
            regions: the regions, in pixels of the image; the same list for the whole conversation.
            history: earlier turns, ``{"role": "user" | "assistant", "content": ...}``, the oldest first.
            **generation: any of ``max_new_tokens`` (128), the longest answer, in tokens, at least 1; ``temperature``
                (0), which takes the likeliest token each time, and above 0 draws; ``top_p`` (1), with a temperature:
                draw from the likeliest tokens of this joint probability, in (0, 1]; ``seed``, with a temperature: makes
                the answer repeatable, whatever else is asked at the same time; ``stop``, one text or several that end
                the answer and are not part of it.

        Raises:
            RegionError: a region does not fit the image, or a placeholder stands for none.
            DataError: the question is empty, or with its history longer than the model can read.
            ConfigError: no image was set, an option is out of its range, or the token budget is too small for it.
        """
        began, options = time.perf_counter(), Options(**generation)
        asked = self._here(), self._prompt(question, regions, history, options), options
        return next(answer for _, answer in self.engine.answers([asked], began))

    def stream(
        self,
        question: str,
        regions: Region | Sequence[Region] = (),
        *,
        history: Sequence[Turn] = (),
        **generation: Unpack[Generation],
    ) -> Iterator[str]:
        """Ask as :meth:`ask` does, and yield the answer in pieces as they are generated.

        The arguments are checked before this returns. Leaving the iteration early ends the generation.

        Yields:
            Pieces of text, whole words where the language writes blanks; joined they are the answer.
        """
        options = Options(**generation)
        return self.engine.stream(self._here(), self._prompt(question, regions, history, options), options)

    def ask_many(self, questions: Iterable[Question], **generation: Unpack[Generation]) -> list[Answer]:
        """Ask many questions at once, each with regions of its own, about one image or several.

        Each image is encoded once and its tokens are stored once, however many questions there are about it. Everything
        that can be wrong with a question is found before the first is answered.

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
        """Ask as :meth:`ask_many` does, and yield each question's place and answer as soon as it is finished.

        The questions are checked before this returns. Leaving the iteration early ends what is being written.

        Yields:
            The place of a question among those asked, from 0, and its answer.
        """
        began, options = time.perf_counter(), Options(**generation)
        if isinstance(questions, Question) or not isinstance(questions, Iterable):
            raise ConfigError(f"expected questions as a list of Question, got {type(questions).__name__}")
        return many.answers(self.engine, self._scenes, self._scene, list(questions), options, began)

    def conversation(self, regions: Region | Sequence[Region] = ()) -> "Conversation":
        """Begin a conversation about the image set now, whose turns all speak of the same regions.

        Raises:
            RegionError: a region does not fit the image.
            ConfigError: no image was set.
        """
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
        """Describe regions, each on its own, in one batch.

        Args:
            regions: one region or several.
            brief: a caption of a few words rather than a description.
            max_new_tokens: longest description, in tokens.

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

        A choice's score is the log likelihood of all its tokens *and the end of the answer*. With the end included
        these are the likelihoods of whole answers, which need no correction for length: divided by their sum, they are
        the probability of each answer given that it is on the list. Two options rank names that the model seldom or
        never saw more fairly; their results are then no probabilities of answers. ``length_normalized`` divides each
        score by its number of tokens. ``calibrated`` subtracts the score of the same answer about a region of which
        nothing is known, in the same image, so that a long or a rare name is held against itself
        (https://arxiv.org/abs/2102.09690). With the model that ships that does harm, and so did every other reference
        tried (``docs/performance.md``): measure it before using it. Memory does not grow with the number of names.

        Args:
            regions: one region or several, each classified on its own.
            choices: at least one name; names may have several words, none may be there twice. Default: the names of
                ``label_set``.
            **options: any of ``label_set`` ("COCO-80"), the set named in the question (the model that ships was trained
                with this one alone, and names things in its style for other ``choices`` too); ``generate``: also
                generate the answer freely, as the paper's exact-match protocol does; ``length_normalized``;
                ``calibrated``, not together with it; ``top_k``: keep only so many of the likeliest choices in the
                result, for large sets and many regions.

        Returns:
            A result for a region, a list of them for a list.

        Raises:
            RegionError: a region does not fit the image.
            ConfigError: choices are empty, blank or repeated; the label set is unknown; an option is out of its range;
                no image was set.

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
        """Choose the region that an expression refers to, or none.

        Two things tell. The answer: the paper's question about all regions at once, with ``Region [N]`` for each of
        them and the no-match sentence scored as :meth:`classify` scores choices. The words: how likely the model is to
        call a region by the expression, asked of each region by itself. A model that compares regions well needs the
        first alone; a small one knows a region when it sees one long before it can compare several.

        Args:
            expression: such as ``"the red cup"``, or several of them, each located by itself among the same regions.
            regions: at least one region to choose from.
            by: ``"answer"``, the paper's protocol; ``"words"``, which always chooses a region; or ``"both"``: by the
                answer whether any of them fits, which is more likely than not, and by the words which.

        Returns:
            A result for an expression, a list of them for a list.

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
            raise ConfigError(f"by: expected one of {', '.join(WAYS)}, got {by!r}")
        if not listed:
            raise RegionError("expected at least one region to choose from, got none")
        check_regions(listed, scene.width, scene.height)
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
        self, question: str, regions: Region | Sequence[Region], history: Sequence[Turn], options: Options
    ) -> Prompt:
        turns, listed = question_turns(history, question), Region.list_of(regions)
        pooled = self.engine.pool(self._here(), listed)
        prompt = self.engine.prompt(turns, pooled, len(listed), options.max_new_tokens)
        notes = [f"<region{number}>: {region.note}" for number, region in enumerate(listed, 1) if region.note]
        return replace(prompt, warnings=(*notes, *prompt.warnings))
