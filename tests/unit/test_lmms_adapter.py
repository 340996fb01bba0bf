"""What lmms-eval asks for and gets; lmms-eval itself is not needed."""

import sys
import types
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import pytest
from PIL import Image

from regiongpt import ConfigError, DataError
from regiongpt.evaluate import lmms_adapter
from regiongpt.evaluate.lmms_adapter import Answering


@dataclass
class Predictor:
    """Says one thing, and remembers what it was asked."""

    says: str
    asked: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = field(default_factory=list)
    image: Any = None

    def set_image(self, image):
        self.image = image

    def ask(self, text, regions, **options):
        self.asked.append((text, [region.to_dict() for region in regions], options))
        return types.SimpleNamespace(text=self.says)


PICTURE = Image.new("RGB", (40, 30), "white")
DOCUMENT = {"image": PICTURE, "bbox": [4.0, 5.0, 10.0, 8.0], "segmentation": [4.0, 5.0, 14.0, 5.0, 14.0, 13.0]}
SHORT = "Provide a short description for this region."


def visuals(document):
    drawn = document["image"].copy()
    drawn.putpixel((0, 0), (255, 0, 0))
    return [drawn]


def test_a_region_goes_in_as_a_region_and_not_as_a_drawn_box():
    predictor = Predictor("a cup")
    assert Answering(predictor).answer("refcocog_bbox_val", SHORT, DOCUMENT, visuals, {}) == "a cup"
    text, regions, options = predictor.asked[0]
    assert text == "Provide a short description for <region1>."
    assert regions == [{"box": [4.0, 5.0, 14.0, 13.0]}]
    assert predictor.image.getpixel((0, 0)) == (255, 255, 255)
    assert options == {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0}


def test_an_outline_is_a_polygon_and_the_prompt_may_be_the_trained_one():
    predictor = Predictor("a cup")
    Answering(predictor, prompt="trained").answer("refcoco+_seg_testA", SHORT, DOCUMENT, visuals, {})
    text, regions, _ = predictor.asked[0]
    assert text == "Describe <region1> briefly."
    assert regions == [{"polygon": [[[4.0, 5.0], [14.0, 5.0], [14.0, 13.0]]]}]


@pytest.mark.parametrize(
    ("says", "yes_no", "handed"),
    [
        ("Yes, there are two.", "first_word", "yes"),
        ("no", "first_word", "no"),
        ("Nothing.", "first_word", "Nothing."),
        ("Yes, there are two.", "verbatim", "Yes, there are two."),
    ],
)
def test_pope_gets_the_leading_yes_or_no(says, yes_no, handed):
    predictor = Predictor(says)
    options = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0}
    assert (
        Answering(predictor, yes_no=yes_no).answer("pope_adv", "Is there a cup?", DOCUMENT, visuals, options) == handed
    )
    assert predictor.asked[0][:2] == ("Is there a cup?", [])
    assert predictor.image.getpixel((0, 0)) == (255, 0, 0)
    assert predictor.asked[0][2]["max_new_tokens"] == 16


def test_pope_is_asked_in_the_trained_words():
    predictor = Predictor("no")
    asked = "Is there a cup?\nAnswer the question using a single word or phrase."
    Answering(predictor).answer("pope", asked, DOCUMENT, visuals, {})
    Answering(predictor, prompt="trained").answer("pope", asked, DOCUMENT, visuals, {})
    assert [text for text, *_ in predictor.asked] == [asked, "Is there a cup?"]


@pytest.mark.parametrize("row", [{"bbox": None}, {"bbox": [1, 2, 3]}, {}])
def test_a_row_without_a_region_is_said(row):
    with pytest.raises(DataError, match="bbox: give x, y, width, height, got"):
        Answering(Predictor("")).answer("refcocog_bbox_val", SHORT, {"image": PICTURE, **row}, visuals, {})
    odd = {"image": PICTURE, "segmentation": [1, 2, 3]}
    with pytest.raises(DataError, match="segmentation: give x, y"):
        Answering(Predictor("")).answer("refcocog_seg_val", SHORT, odd, visuals, {})


def test_an_answer_ends_where_the_task_says():
    predictor = Predictor("a cup\nASSISTANT: more")
    options = {"until": ["ASSISTANT:", "\n\n"]}
    assert Answering(predictor).answer("refcocog_seg_val", SHORT, DOCUMENT, visuals, options) == "a cup"


def test_what_a_model_of_regions_cannot_do_is_said():
    answering = Answering(Predictor("a cup"))
    with pytest.raises(DataError, match="coordinates"):
        answering.answer("refcocog_bbox_rec_val", "Provide the bounding box", DOCUMENT, visuals, {})
    with pytest.raises(DataError, match="2 images in a question"):
        answering.answer("muirbench", "Which?", DOCUMENT, lambda document: [PICTURE, PICTURE], {})
    with pytest.raises(ConfigError, match="prompt: give task or trained"):
        Answering(Predictor(""), prompt="mine")


def test_lmms_eval_finds_the_model(monkeypatch):
    @dataclass
    class ModelManifest:
        model_id: str
        simple_class_path: str

    class lmms:
        def __init__(self):
            self.task_dict = {}

    for name, members in {
        "lmms_eval": {},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    found = lmms_adapter.manifest()
    module, _, kind = found.simple_class_path.rpartition(".")
    assert (found.model_id, module) == ("regiongpt", "regiongpt.evaluate.lmms_adapter")
    lmms_adapter._model_class.cache_clear()
    try:
        made = getattr(lmms_adapter, kind)
        assert issubclass(made, lmms)
        assert made.is_simple
    finally:
        lmms_adapter._model_class.cache_clear()
    with pytest.raises(AttributeError):
        _ = lmms_adapter.Nothing


def test_the_entry_point_is_declared():
    names = {point.name: point.value for point in entry_points(group="lmms_eval.models")}
    assert names.get("regiongpt") == "regiongpt.evaluate.lmms_adapter:manifest"
