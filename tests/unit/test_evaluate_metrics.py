"""Bootstrap, closed lists, yes and no, overlap, detections, and captions by the programs that score them."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from evaluating import need_java

from regiongpt.data.reading import overlaps
from regiongpt.errors import ConfigError
from regiongpt.evaluate import caption_metrics
from regiongpt.evaluate.bootstrap import mean_statistic, paired, resample
from regiongpt.evaluate.caption_metrics import (
    caption_scores,
    find_java,
    find_package,
    meteor_counts,
    meteor_scores,
    scored_words,
)
from regiongpt.evaluate.detection import detection_scores, read_name
from regiongpt.evaluate.pope import read_answer, yes_no_statistics
from regiongpt.evaluate.task import Item


def test_intervals_are_those_of_a_plain_bootstrap_and_repeat() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(400) < 0.7
    statistic = mean_statistic(list(range(400)), scores.astype(float).tolist())
    low, high = resample(statistic, 2000).interval
    assert (low, high) == resample(statistic, 2000).interval
    spread = 1.96 * (scores.mean() * (1 - scores.mean()) / 400) ** 0.5
    assert low == pytest.approx(scores.mean() - spread, abs=0.01)
    assert high == pytest.approx(scores.mean() + spread, abs=0.01)


def test_items_of_one_image_stay_together() -> None:
    scores = [1.0, 0.0] * 50
    alone = resample(mean_statistic(list(range(100)), scores), 1000).interval
    assert alone[1] - alone[0] > 0.1
    assert resample(mean_statistic([k // 2 for k in range(100)], scores), 1000).interval == pytest.approx((0.5, 0.5))
    assert resample(mean_statistic([1, 1], [0.0, 1.0]), 1000).interval is None


def test_paired_systems() -> None:
    rng = np.random.default_rng(3)
    images = list(range(300))
    a = (rng.random(300) < 0.5).astype(float)
    better = np.maximum(a, rng.random(300) < 0.2)
    one, other = (resample(mean_statistic(images, each.tolist()), 500) for each in (a, better))
    found = paired(one, other)
    assert found.difference == pytest.approx(better.mean() - a.mean())
    assert found.interval[0] > 0
    assert found.p < 0.01
    same = paired(one, one)
    assert (same.difference, same.p) == (0, 1)


@pytest.mark.parametrize(
    ("images", "better", "told"), [(10, 10, False), (29, 29, False), (200, 5, False), (200, 6, True), (200, 0, True)]
)
def test_a_handful_of_images_tells_nothing(images: int, better: int, told: bool) -> None:
    scores = np.zeros(images)
    a = resample(mean_statistic(list(range(images)), scores.tolist()), 200)
    scores[:better] = 1
    found = paired(a, resample(mean_statistic(list(range(images)), scores.tolist()), 200))
    assert found.difference == better / images
    assert (found.too_few, found.p is not None, found.interval is not None) == (not told, told, told)


def dogs(sides: Sequence[int], images: int) -> dict[str, object]:
    """The annotations of images of which the first ones have a dog each, in a box of this side."""
    dog = {"category_id": 1, "iscrowd": 0}
    annotations = [
        {**dog, "id": k, "image_id": k, "bbox": [0, 0, side, side], "area": side**2} for k, side in enumerate(sides)
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    return {"images": [{"id": k} for k in range(images)], "annotations": annotations, "categories": categories}


def test_images_that_a_figure_is_not_about_do_not_count() -> None:
    # 20 of 100 images have an object each, and only these 20 say how well objects are found.
    truth = dogs([9] * 20, 100)
    found = [{"image_id": k, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0} for k in range(100)]
    a, b = (resample(detection_scores(truth, part)["AP"], 20) for part in (found, found[:10]))
    assert paired(a, b).too_few


def test_a_class_is_the_whole_answer_as_the_file_names_it() -> None:
    names = dict.fromkeys(["dog", "hot dog", "mazama temama", "Mr. X."])
    said = {" dog. ": "dog", "mazama  temama": "mazama temama", "Mr. X.": "Mr. X.", "Mr. X..": "Mr. X."}
    said |= dict.fromkeys(["Mr. X", "Dog", "dogs", ""])
    assert {text: read_name(text, names) for text in said} == said


def test_answers_are_read_as_popes_script_does() -> None:
    item = Item(id="", image=Path(), image_id=1, question="", truth="yes")
    parsed = {"Yes, there is.": "yes", "no": "no", "No.": "no", "**Yes**": "yes"}
    others = {"There is no dog.": "no", "A dog is not there": "no", "I see a cat. No dog.": "yes"}
    for text, said in {**parsed, **others, "": "yes", "Nope": "yes", "no-one": "yes"}.items():
        assert read_answer(text) == said, text
        assert yes_no_statistics([item], [text])["unparsable"].value() == (text not in parsed), text


def test_figures_of_yes_and_no_by_hand() -> None:
    truth = ["yes", "yes", "yes", "no", "no", "no", "no", "yes"]
    items = [Item(id="", image=Path(), image_id=k, question="", truth=each) for k, each in enumerate(truth)]
    texts = ["yes", "Yes.", "no", "Certainly", "no", "No", None, None]
    found = {name: statistic.value() for name, statistic in yes_no_statistics(items, texts).items()}
    assert found == pytest.approx(
        {"accuracy": 4 / 8, "precision": 2 / 4, "recall": 2 / 4, "f1": 1 / 2, "yes_ratio": 4 / 8, "unparsable": 3 / 8}
    )


def test_overlaps_by_hand() -> None:
    assert overlaps((0, 0, 2, 2), [(0, 0, 2, 2), (1, 0, 3, 2), (2, 2, 3, 3), (1, 1, 1, 1)]).tolist() == [1, 1 / 3, 0, 0]


def test_detections_by_hand() -> None:
    scene = dogs([10, 100], 2)
    right = [
        {"image_id": k, "category_id": 1, "bbox": [0, 0, side, side], "score": 0.9 - k}
        for k, side in ((0, 10), (1, 100))
    ]
    found = detection_scores(scene, right)
    assert found["AP"].value() == pytest.approx(1)  # also where an annotation has the id 0
    assert np.isnan(found["AP_medium"].value())
    one = detection_scores(scene, right[:1])
    assert one["AP50"].value() == pytest.approx(51 / 101)
    assert detection_scores(scene, [])["AP"].value() == 0
    # An image counted twice is one that is there twice.
    values = one["AP"].values(np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
    assert values.tolist() == pytest.approx([1, 0, np.nan], nan_ok=True)


# What METEOR 1.5 printed for "a red bears on the table" against "the red bear on a table", for the empty caption
# against "a red bear", and for 12 words against 7.
PRINTED = np.zeros((3, 23))
PRINTED[0, [*range(10), 20, 21, 22]] = [6, 6, 3, 3, 2, 2, 3, 3, 1, 1, 4, 6, 6]
PRINTED[1, [1, 3]] = [3, 1]
PRINTED[2, [*range(8), 20, 21, 22]] = [12, 7, 4, 2, 4, 4, 1, 1, 2, 5, 5]


def test_no_caption_is_lost_or_runs_into_another() -> None:
    need_java()
    captions = {
        "": "",
        "...": "",
        "The man's (red) hat.": "the man 's -lrb- red -rrb- hat",
        "isn't it 'new', \"he\" said?": "is n't it new he said",
        "a\nb\r\nc": "a b c",
        "a\rb\u2028c\x85d\x0be": "a b c d e",
        "emoji \U0001f600 here, half \ud83d of one": "emoji here half of one",
        "see <a href='x": "see < a href = x",
        "y'> of a dog": "y > of a dog",
        "<b>bold</b> <i class='x'>": "<b> bold </b> <i\u00a0class='x'>",
        "=.[^x= mouth": None,
        "dog " * 20_000: "dog " * 19_999 + "dog",
        "x" * 100_000: "x" * 100_000,
        "\n": "",
    }
    found = scored_words(list(captions))
    assert len(found) == len(captions)
    for (caption, words), got in zip(captions.items(), found, strict=True):
        assert words is None or got == words, caption[:50]
    # One that ends in an abbreviation is read with the next, as lines of a file are.
    assert scored_words(["plan B.", "The next", "plan B.", "next"]) == ["plan b", "the next", "plan b.", "next"]
    assert scored_words([""]) == [""]
    assert scored_words([]) == []


def test_meteor_follows_from_the_counts() -> None:
    assert meteor_scores(PRINTED)[1:] == pytest.approx([0, 0.34885174167642846], abs=1e-12)


@pytest.mark.slow
def test_meteor_counts_odd_captions_and_takes_the_best_reference() -> None:
    need_java()
    captions = ["a red bears on the table", "a | b ||| c", "SCORE ||| x", "caf\u00e9", ""]
    counts = meteor_counts(captions, ["the red bear on a table", "a b", "x", "caf\u00e9", "a red bear"])
    assert counts[[0, -1]].tolist() == PRINTED[:2].tolist()
    assert meteor_scores(counts)[3] == 1
    found = caption_scores(["a red bear"] * 2, [["a cat", "a red bear", "a red dog"], ["a cat"]], metrics=("METEOR",))
    assert found["METEOR"].items[0] == 1
    assert found["METEOR"].items[1] < 0.5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.stderr.write('Error: no memory'); sys.exit(3)", "ended with code 3: Error: no memory"),
        ("print('6 6 3')", "answered"),
    ],
    ids=["dies", "says too little"],
)
def test_a_program_that_fails_is_one_line(body: str, message: str, tmp_path: Path, monkeypatch) -> None:
    need_java()
    program = tmp_path / "java"
    program.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(caption_metrics, "find_java", lambda: str(program))
    with pytest.raises(ConfigError, match=f"METEOR {message}"):
        meteor_counts(["a dog"] * 5, ["a dog"] * 5)
    with pytest.raises(ConfigError, match="the tokenizer "):
        scored_words(["a dog"] * 5)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(caption_metrics, "find_spec", lambda name: None)
    for find, what in ((find_java, "Java"), (find_package, "pycocoevalcap")):
        with pytest.raises(ConfigError, match=rf"{what}.*; install it with: pip install '\.\[evaluate\]'"):
            find()
