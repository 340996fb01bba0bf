"""What lmms-eval asks for and gets; lmms-eval itself is not needed."""

import sys
import types
from importlib.metadata import entry_points

import pytest
from PIL import Image

from regiongpt import DataError
from regiongpt.evaluate import lmms_adapter
from regiongpt.evaluate.lmms_adapter import answer


class Predictor:
    """Says one thing, and remembers what it was asked."""

    def __init__(self, says: str) -> None:
        self.says, self.asked = says, []

    def set_image(self, image):
        self.image = image

    def ask(self, text, regions, **options):
        self.asked.append((text, [region.to_dict() for region in regions], options))
        return types.SimpleNamespace(text=self.says)


PICTURE, DRAWN = Image.new("RGB", (40, 30), "white"), Image.new("RGB", (40, 30), "red")
ROW = {"image": PICTURE, "bbox": [4.0, 5.0, 10.0, 8.0], "segmentation": [4.0, 5.0, 14.0, 5.0, 14.0, 13.0]}
SHORT = "Provide a short description for this region."


def ask(predictor, task, context=SHORT, row=ROW, shown=(DRAWN,), **options):
    return answer(predictor, (context, options, lambda row: shown, row, task))


@pytest.mark.parametrize(
    ("task", "region"),
    [
        ("refcocog_bbox_val", {"box": [4.0, 5.0, 14.0, 13.0]}),
        ("refcoco+_seg_testA", {"polygon": [[[4.0, 5.0], [14.0, 5.0], [14.0, 13.0]]]}),
    ],
)
def test_a_region_goes_in_as_a_region_and_not_as_a_drawn_box(task, region):
    predictor, asked = Predictor("a cup\nASSISTANT: more"), "Provide a short description for <region1>."
    assert ask(predictor, task, until=["ASSISTANT:", "\n\n"]) == "a cup"
    assert predictor.asked == [(asked, [region], {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0})]
    assert predictor.image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("says", "handed"), [("Yes, there are two.", "yes"), ("no", "no"), ("Nothing. ", "Nothing.")])
def test_pope_gets_the_leading_yes_or_no(says, handed):
    predictor = Predictor(says)
    assert ask(predictor, "pope_adv", "Is there a cup?", max_new_tokens=16, temperature=0) == handed
    assert predictor.image.getpixel((0, 0)) == (255, 0, 0)
    assert predictor.asked == [("Is there a cup?", [], {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0})]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("refcocog_bbox_val", {"bbox": [1, 2, 3]}, "bbox: give x, y"),
        ("refcocog_seg_val", {"segmentation": [1, 2, 3]}, "segmentation: give x, y"),
        ("refcocog_bbox_rec_val", {}, "coordinates"),
        ("muirbench", {}, "2 images in a question"),
    ],
)
def test_what_cannot_be_asked_is_said(task, row, message):
    with pytest.raises(DataError, match=message):
        ask(Predictor(""), task, row={"image": PICTURE, **row}, shown=(PICTURE, PICTURE))


def test_lmms_eval_finds_the_model(monkeypatch):
    lmms = type("lmms", (), {})
    for name in (
        "lmms_eval",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
        "lmms_eval.api",
        "lmms_eval.api.model",
    ):
        module = types.SimpleNamespace(ModelManifest=types.SimpleNamespace, lmms=lmms)
        monkeypatch.setitem(sys.modules, name, module)
    (entry,) = entry_points(group="lmms_eval.models")
    found = entry.load()()
    module, _, kind = found.simple_class_path.rpartition(".")
    assert (found.model_id, module) == ("regiongpt", "regiongpt.evaluate.lmms_adapter")
    made = getattr(lmms_adapter, kind)
    lmms_adapter.__getattr__.cache_clear()
    assert issubclass(made, lmms)
    assert made.is_simple
    with pytest.raises(AttributeError):
        _ = lmms_adapter.Nothing
