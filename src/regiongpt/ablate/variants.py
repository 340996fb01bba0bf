"""What an ablation varies: of each variant the fields of the recipe and the options of the benchmark that differ.

Paper: Tables 1, 6 and 7; §3.1 (image tokens), §3.2 (the task-guided prompt)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, get_args

from regiongpt.errors import ConfigError
from regiongpt.train.recipe import ModelConfig, Recipe

ASKED: Final = "--eval."
"""What the options of the benchmark begin with."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things that are compared.

    Attributes:
        name: In tables, and of its folder.
        recipe: Fields of the recipe by dotted name, over those of the file.
        asked: Options of the benchmark, over those given for all.
        annotations: What is done to the annotations of the photographs before training: ``""`` for nothing,
            ``"outlined"`` to keep the objects with an outline alone, or ``"N%"`` to keep that share of the images.
    """

    name: str
    recipe: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    annotations: str = ""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One ablation.

    Attributes:
        summary: One line of help.
        variants: That are compared where none are named; the first is what the others are held against.
        made: A variant of the text of ``--variants`` where none of that name is known.
        field: Of a recipe on records, what ``NAME=VALUE`` of ``--variants`` sets: the checkpoint to begin with, unless
            the recipe makes a new model, or the records; empty where records are varied like photographs.
        paper: Key of :data:`regiongpt.evaluate.paper.TABLES`; empty where the paper has no figures.
    """

    summary: str
    variants: tuple[Variant, ...]
    made: Callable[[str], Variant] | None = None
    field: str = ""
    paper: str = ""


def _refinement(name: str) -> Variant:
    return Variant(name=name, recipe={"model.refinement": name})


def _tower(text: str) -> Variant:
    """``NAME`` or ``NAME@SIZE``, the size of its input in pixels."""
    vision, _, size = text.rpartition("@") if text.rpartition("@")[2].isdecimal() else (text, "", "")
    sized = {"model.image_size": size} if size else {}
    return Variant(
        name=vision.rstrip("/").rpartition("/")[2] + (f"-{size}" if size else ""),
        recipe={"model.vision": vision, **sized},
    )


def _paper_tower(name: str, vision: str, size: int) -> Variant:
    return Variant(name=name, recipe={"model.vision": vision, "model.image_size": str(size)})


def _tokens(text: str) -> Variant:
    """``image=SIDE`` or ``region=SIDE``: the side of the square grid of tokens that the image or a region becomes."""
    what, _, side = text.partition("=")
    if what not in ("image", "region") or not side.isdecimal():
        raise ConfigError(f"expected a variant such as image=6 or region=2, the side of a grid of tokens, got {text!r}")
    return Variant(name=text, recipe={f"model.{what}_grid": side})


def _data(text: str) -> Variant:
    """``N%`` of the images."""
    if not (text.endswith("%") and text[:-1].isdecimal() and 0 < int(text[:-1]) <= 100):
        raise ConfigError(f"expected a variant among boxes, masks and shares of the images such as 25%, got {text!r}")
    return Variant(name=text, annotations=text)


KINDS: Final[dict[str, Kind]] = {
    "refinement": Kind(
        summary="the module that refines the feature map (Table 6)",
        variants=tuple(map(_refinement, get_args(ModelConfig.model_fields["refinement"].annotation))),
        field="model.init",
        paper="refinement",
    ),
    "tower": Kind(
        summary="the vision tower (Table 7); --variants NAME@SIZE,... names towers of a hub or folders",
        variants=(
            _paper_tower("openai_vit_l_336", "openai/clip-vit-large-patch14-336", 336),
            _paper_tower("siglip_vit_b_512", "google/siglip-base-patch16-512", 512),
            _paper_tower("siglip_vit_l_384", "google/siglip-large-patch16-384", 384),
            # Its patches of 14 cover 27 x 14 = 378 of the 384 pixels.
            _paper_tower("siglip_vit_so400m_384", "google/siglip-so400m-patch14-384", 378),
        ),
        made=_tower,
        field="model.init",
        paper="tower",
    ),
    "prompt": Kind(
        summary="the task-guided suffix (Table 1): taught and asked with it, taught and asked without, asked without",
        variants=(
            Variant(name="with"),
            Variant(name="without", recipe={"data.suffixes": "false"}, asked={"guided": "false"}),
            Variant(name="asked-without", asked={"guided": "false"}),
        ),
    ),
    "tokens": Kind(
        summary="how many tokens the image and a region become; --variants image=SIDE,region=SIDE,...",
        variants=tuple(map(_tokens, ("image=6", "image=3", "image=1", "image=9", "region=2"))),
        made=_tokens,
        field="model.init",
    ),
    "data": Kind(
        summary="boxes against masks on the objects with an outline, or shares of the images (--variants 25%,50%,100%)",
        variants=(
            Variant(
                name="boxes",
                recipe={"data.outline_share": "0"},
                asked={"region": "box"},
                annotations="outlined",
            ),
            Variant(
                name="masks",
                recipe={"data.outline_share": "1"},
                asked={"region": "mask"},
                annotations="outlined",
            ),
        ),
        made=_data,
        field="data.mixture",
    ),
}
"""The ablations by name."""


def chosen(kind: str, text: str | None, recipe: Recipe) -> tuple[Variant, ...]:
    """The variants that are compared.

    Args:
        kind: A key of :data:`KINDS`.
        text: Of ``--variants``: names with commas between them; None for all.
        recipe: That all are varied from. Where it trains a checkpoint on records, each variant of the model is
            ``NAME=VALUE``, since a checkpoint brings its own shape; so is, on any records, each variant of the data.

    Raises:
        ConfigError: There is no such variant, or fewer than two.
    """
    known = {variant.name: variant for variant in KINDS[kind].variants}
    words = [word.strip() for word in text.split(",") if word.strip()] if text else []
    field = KINDS[kind].field
    valued = recipe.data.on_records and (field == "data.mixture" or (field == "model.init" and bool(recipe.model.init)))
    if valued:
        found = tuple(_valued(kind, word, recipe) for word in words)
    elif text is None:
        found = KINDS[kind].variants
    else:
        found = tuple(known[word] if word in known else _made(kind, word) for word in words)
    if len(found) < 2 or len({variant.name for variant in found}) < len(found):
        raise ConfigError(
            f"expected --variants with at least two different ones, got {text!r}; known: {', '.join(known)}"
            + (f"; with this recipe write each as NAME=VALUE, the value of {field}" if valued else "")
        )
    return found


def _made(kind: str, word: str) -> Variant:
    make = KINDS[kind].made
    if make is None:
        names = ", ".join(variant.name for variant in KINDS[kind].variants)
        raise ConfigError(f"expected a variant among {names}, got {word!r}")
    return make(word)


def _valued(kind: str, word: str, recipe: Recipe) -> Variant:
    """``NAME=VALUE``."""
    field, name, value = KINDS[kind].field, *word.partition("=")[::2]
    if not (name and value):
        raise ConfigError(
            f"expected NAME=VALUE, the value being that of {field}, since the recipe trains "
            f"{'a checkpoint ' if field == 'model.init' else ''}on records, got {word!r}"
        )
    # A recipe that says what its checkpoint is made of is held to it.
    known = next((variant for variant in KINDS[kind].variants if variant.name == name), Variant(name=name))
    described = known.recipe if field == "model.init" and recipe.model.language else {}
    return Variant(name=name, recipe={**described, field: value}, asked=known.asked)


def same_training(a: Variant, b: Variant) -> bool:
    """Whether two variants are asked differently of one model."""
    return a.recipe == b.recipe and a.annotations == b.annotations


def check_names(variants: Sequence[Variant]) -> None:
    """Raises ConfigError for a name that is no folder's."""
    for variant in variants:
        if not variant.name or variant.name in (".", "..") or "/" in variant.name:
            raise ConfigError(f"expected variants whose names can be those of folders, got {variant.name!r}")


def refuse_varied(kind: str, variants: Sequence[Variant], overrides: Sequence[str], asked: Mapping[str, str]) -> None:
    """Refuse options whose value the variants or the seeds decide.

    Raises:
        ConfigError: there is one.
    """
    # A variant that leaves a field as it is stands for its default; where each names its own, none is mistaken.
    plain = any(not variant.recipe for variant in variants)
    fields = {name for variant in variants for name in variant.recipe if plain}
    options = {f"{ASKED}{name}" for variant in variants for name in variant.asked}
    given = {word.removeprefix("--").partition("=")[0] for word in overrides if word.startswith("--")}
    if "seed" in given:
        raise ConfigError("--seed: expected --seeds N,N,..., for every variant is trained with each of them")
    if both := sorted(f"--{name}" for name in given & fields) + sorted(options & {f"{ASKED}{n}" for n in asked}):
        raise ConfigError(f"{both[0]}: expected what the ablation of {kind} varies to be left to it; leave it out")


def split_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options of the benchmark by name, and the words that are about the recipe."""
    asked: dict[str, str] = {}
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith(ASKED):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(ASKED).partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"{word}: expected a value after it, got nothing")
            value = words.pop(0)
        asked[name.replace("-", "_")] = value
    return asked, rest
