"""What runs benchmarks, on a benchmark of drawn pictures and a model with random weights."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from evaluating import Drawn, register
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

from regiongpt import DataError, Region
from regiongpt.cli import main
from regiongpt.evaluate import run as running
from regiongpt.evaluate.report import PAGE, changes, read_run, worst
from regiongpt.evaluate.run import answer_image, load_items, read_predictions
from regiongpt.evaluate.task import Answer, Item
from regiongpt.storage import Store, locked


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    register(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, 5, "instances_dev.json")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def evaluate(data, checkpoint, out, *words) -> int:
    return main(["evaluate", "drawn", "--data", str(data), "--model", str(checkpoint), "--out", str(out), *words])


@pytest.fixture(scope="module")
def run(data, checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        assert evaluate(data, checkpoint, out) == 0
    return out


def counted(monkeypatch) -> list[int]:
    """How many questions each image is asked from now on."""
    asked: list[int] = []

    def count(predictor, items, *how):
        asked.append(len(items))
        return answer_image(predictor, items, *how)

    monkeypatch.setattr(running, "answer_image", count)
    return asked


def test_a_run_writes_figures_items_answers_and_their_origin(run):
    (found,) = read_run(run)
    assert found.result["protocols"]["choices"]["accuracy"]["of"] == 10
    rows = read_lines(run / "drawn" / "items.jsonl")
    assert {"id", "truth", "answer", "scores", "question", "image"} <= rows[0].keys()
    given = read_lines(run / "drawn" / "predictions.jsonl")
    assert [row["id"] for row in given] == [row["id"] for row in rows]
    for row in given:
        assert sum(row["scores"]) == pytest.approx(1.0, abs=1e-5)
        assert 0 <= row["probability"] <= 1 or not row["text"]
    text = (run / "drawn" / PAGE).read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    for part in ("80.61", "Confusions", "by size", "by category", "The worst mistakes", "data:image/jpeg", "split"):
        assert part in text, part
    manifest = found.manifest
    assert (manifest["inputs"][0]["name"], len(manifest["inputs"][0]["sha256"])) == ("instances_dev.json", 64)
    assert len(manifest["model"]["files"]["model.safetensors"]) == 64
    assert {"regiongpt", "torch", "transformers", "python"} <= manifest["packages"].keys()
    assert (manifest["settings"]["wording"], manifest["scoring"]["resamples"]) == ("What is <region1>?", 1000)


def test_a_finished_run_asks_nothing_again(run, data, checkpoint, monkeypatch, capsys):
    asked, before = counted(monkeypatch), (run / "drawn" / "result.json").read_text()
    assert evaluate(data, checkpoint, run) == 0
    assert (asked, (run / "drawn" / "result.json").read_text()) == ([], before)
    assert "10 questions, 10 answered before" in capsys.readouterr().err


def test_a_run_that_was_stopped_asks_the_rest_alone_and_ends_alike(run, data, checkpoint, monkeypatch, tmp_path):
    kept = Store(run / "answers")
    some = dict(list(kept.get(kept.keys()).items())[:5])
    with Store(tmp_path / "answers", 3) as store:  # written by another process
        store.add(some)
    asked = counted(monkeypatch)
    limited = ["--limit", "2", "--resamples", "0", "--gallery", "0"]
    assert evaluate(data, checkpoint, tmp_path, *limited) == 0
    (found,) = read_run(tmp_path)
    assert found.result["protocols"]["choices"]["accuracy"]["interval"] is None
    assert found.result["pinned"]["part"] == "the first 2 images alone (--limit)"
    assert "worst mistakes" not in (tmp_path / "drawn" / PAGE).read_text()
    assert evaluate(data, checkpoint, tmp_path, "--overwrite") == 0
    assert sum(asked) == 5
    for name in ("result.json", "items.jsonl"):
        assert (tmp_path / "drawn" / name).read_bytes() == (run / "drawn" / name).read_bytes()


def test_a_taken_folder_and_a_missing_image_are_found_before_anything_is_asked(data, checkpoint, tmp_path, capsys):
    with locked(tmp_path):
        assert evaluate(data, checkpoint, tmp_path) == 2
    assert f"process {os.getpid()} is writing there" in capsys.readouterr().err
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "images" / "3.png").unlink()
    assert evaluate(tmp_path / "data", checkpoint, tmp_path / "out") == 2
    assert re.search(r"1 of 5 images are not there, such as .*3.png", capsys.readouterr().err)


def test_only_questions_that_changed_are_asked(run, data, checkpoint, monkeypatch, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    changed = shutil.copytree(data, tmp_path / "data")
    content = json.loads((changed / "instances_dev.json").read_text())
    content["annotations"][0]["bbox"][2] += 1
    (changed / "instances_dev.json").write_text(json.dumps(content))
    other = shutil.copytree(checkpoint, tmp_path / "model")
    (other / "config.json").write_text((checkpoint / "config.json").read_text() + " ")
    asked = counted(monkeypatch)
    for folder, model in ((data, other), (changed, checkpoint)):  # not without being told to
        assert evaluate(folder, model, tmp_path / "run") == 2
        assert "holds results of another model, other settings or other files" in capsys.readouterr().err
    assert asked == []
    assert evaluate(changed, checkpoint, tmp_path / "run", "--overwrite") == 0
    assert asked == [1]


def test_batched_answers_are_those_to_single_questions(data, checkpoint):
    from regiongpt import RegionPredictor

    predictor = RegionPredictor.from_pretrained(checkpoint)
    items = [item for item in Drawn(data=data).items() if item.image_id == 1]
    for item, together in zip(items, answer_image(predictor, items), strict=True):
        predictor.set_image(item.image)
        assert together["text"] == predictor.ask(item.question, item.regions, max_new_tokens=4).text
        (alone,) = answer_image(predictor, [item])
        assert alone["scores"] == pytest.approx(together["scores"], abs=1e-5)
        assert alone["probability"] == pytest.approx(together["probability"], abs=1e-5)


def test_an_answer_takes_its_probability_from_its_own_steps(data, monkeypatch):
    from regiongpt import RegionPredictor
    from regiongpt.inference.choices import answer_scores
    from regiongpt.inference.engine import question_turns

    engine = (predictor := RegionPredictor.from_pretrained()).engine
    drawn = [item for item in Drawn(data=data).items() if item.image_id == 1]
    items = [replace(item, choices=(), sure=True, max_new_tokens=16) for item in drawn]
    calls = []
    with monkeypatch.context() as patch:
        for owner, name in ((engine, "encode_image"), (engine.decoder, "forward")):
            work = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, name=name, work=work, **k: (calls.append(name), work(*a, **k))[1])
        found = answer_image(predictor, items)
    # One image, and passes for its prefix and for each token of the longest answer.
    assert calls.count("encode_image") == 1
    assert calls.count("forward") <= 1 + 16
    scene = predictor.set_image(items[0].image)._here()
    for item, own in zip(items, found, strict=True):
        turns, features = question_turns((), item.question), engine.pool(scene, item.regions)
        expected = answer_scores(engine, scene, turns, [features], [own["text"]])[0, 0].exp()
        assert own["probability"] == pytest.approx(float(expected), abs=1e-4)


def test_a_question_too_long_for_the_model_is_counted_and_said(data, checkpoint, tmp_path, capsys):
    assert evaluate(data, checkpoint, tmp_path, "--limit", "1", "--wording", "What is <region1>? " * 200) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 questions could not be asked and count as wrong" in printed
    assert "2 of 2 items have no answer" in printed


def test_predictions_of_one_run_score_as_that_run(run, data, tmp_path, capsys):
    given = str(run / "drawn" / "predictions.jsonl")
    words = ["evaluate", "drawn", "--data", str(data), "--out", str(tmp_path / "p"), "--predictions", given]
    assert main([*words, "--json"]) == 0
    (shown,), (ours,) = json.loads(capsys.readouterr().out), read_run(run)
    assert shown["protocols"] == ours.result["protocols"]
    assert (shown["manifest"]["model"], shown["manifest"]["predictions"]["name"]) == (None, "predictions.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drawm"], "did you mean 'drawn'"),
        ([], "give a task: "),
        (["drawn", "drawn"], "drawn: given twice"),
        (["--out", "x", "drawn", "--data", "DATA"], "drawn: name the tasks before all options"),
        (["drawn", "--out", "x"], "drawn: --data: give a value"),
        (["drawn", "--out", "x", "--data", "DATA", "--predictions", "p", "--model", "m"], "--model: no model is run"),
        (["drawn", "--out", "x", "--data", "DATA", "--model", "nowhere"], "nowhere: no checkpoint folder"),
        (["drawn", "--out", "taken/x", "--data", "DATA"], "taken/x: cannot be written"),
        (["--compare", "a", "b", "--device", "cpu"], "--compare takes the settings"),
        (["drawn", "--compare", "a", "b"], "drawn: --compare takes the settings"),
    ],
)
def test_mistakes_end_in_one_line(words, message, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert main(["evaluate", *(str(data) if word == "DATA" else word for word in words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("regiongpt: error:")
    assert message in error


def test_comparing_a_run_with_itself_and_with_another(run, data, checkpoint, tmp_path, capsys):
    rows = read_lines(run / "drawn" / "predictions.jsonl")
    truths = {row["id"]: row["truth"] for row in read_lines(run / "drawn" / "items.jsonl")}
    for row in rows[:4]:
        row["text"] = truths[row["id"]]
    other = tmp_path / "better.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "drawn", "--data", str(data), "--out", str(tmp_path / "b"), "--predictions", str(other)]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(run), str(tmp_path / "b"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    accuracy = found["figures"]["generated"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(0.4)
    assert (accuracy["too_few"], accuracy["interval"], accuracy["p"]) == (True, None, None)  # five images only
    assert found["figures"]["choices"]["accuracy"]["difference"] == 0
    assert {change["id"] for change in found["gained"]} == {row["id"] for row in rows[:4]}
    assert found["lost"] == []
    assert main(["evaluate", "--compare", str(run), str(run)]) == 0
    printed = capsys.readouterr().out
    assert "gained: 0 items" in printed
    assert "too few to tell" in printed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{}", "manifest.json: expected settings"),
        ("result.json", "7", "result.json: expected"),
        ("items.jsonl", "\ud800", "items.jsonl: damaged"),
        ("resamples.json", '{"p": {"r": {"value": 1}}}', "resamples.json: damaged"),
    ],
)
def test_a_damaged_run_is_one_line(run, tmp_path, capsys, name, content, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "drawn" / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    assert main(["evaluate", "--compare", str(run), str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_runs_with_other_settings_or_items_are_not_compared(run, data, checkpoint, tmp_path, capsys):
    assert evaluate(data, checkpoint, tmp_path, "--wording", "Name <region1>.") == 0
    assert main(["evaluate", "--compare", str(run), str(tmp_path)]) == 2
    assert "--wording: 'What is <region1>?' and 'Name <region1>.'" in capsys.readouterr().err
    copy = shutil.copytree(run, tmp_path / "run") / "drawn" / "items.jsonl"
    copy.write_text(copy.read_text().partition("\n")[2])
    assert main(["evaluate", "--compare", str(run), str(tmp_path / "run")]) == 2
    assert "differ in the items" in capsys.readouterr().err


def test_a_broken_image_or_a_region_outside_does_not_end_the_run(run, data, checkpoint, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "images" / "2.png").write_bytes(b"no picture")
    content = json.loads((tmp_path / "data" / "instances_dev.json").read_text())
    outside = next(each for each in content["annotations"] if each["image_id"] == 1)
    outside["bbox"] = [5000, 10, 20, 20]
    (tmp_path / "data" / "instances_dev.json").write_text(json.dumps(content))
    assert evaluate(tmp_path / "data", checkpoint, tmp_path / "out", "--resamples", "0") == 0
    assert "3 of 10 questions could not be asked" in capsys.readouterr().out
    # What is wrong with one item changes nothing for the others of its image.
    wrong = {str(outside["id"]), *(str(each["id"]) for each in content["annotations"] if each["image_id"] == 2)}
    rows = {row["id"]: row["answer"] for row in read_lines(run / "drawn" / "items.jsonl")}
    for row in read_lines(tmp_path / "out" / "drawn" / "items.jsonl"):
        assert row["answer"] == (None if row["id"] in wrong else rows[row["id"]])


def test_an_image_of_another_size_than_annotated_is_left_out_and_counted(data, monkeypatch):
    items = Drawn(data=data).items()
    first = [item for item in items if item.image == items[0].image]
    asked = [replace(item, size=(192, 128) if item in first else (96, 64)) for item in items]
    monkeypatch.setattr(Drawn, "read_items", lambda self: asked)
    kept = Drawn(data=data)
    assert [item.id for item in load_items(kept)] == [item.id for item in items if item not in first]
    assert kept.left_out.counts == {"image of another size": 1}
    asked[:] = [replace(item, size=(1, 1)) for item in items]
    with pytest.raises(DataError, match=r"pixels \(W x H\), not 1 x 1, nor has any other"):
        load_items(kept)


def test_changes_and_mistakes_go_by_a_figure_that_each_item_has():
    row = {"truth": "yes", "answer": "no", "groups": {}, "missing": False, "image_id": 1}
    first = {**row, "id": "0", "scores": {"random.accuracy": 1.0}}
    a, b = ([first, {**row, "id": "1", "scores": {"popular.accuracy": each}}] for each in (1.0, 0.0))
    assert (worst(a, {}, 5), worst(b, {}, 5)) == ([], b[1:])
    found = changes(a, b)
    assert found["gained"] == []
    assert [(each["id"], each["result"]) for each in found["lost"]] == [("1", "popular.accuracy")]


ITEMS = [
    Item(id=str(k), image=Path("x.jpg"), image_id=1, question="?", choices=("cat", "dog"), truth="cat")
    for k in (1, 2, 3)
]
WHOLE = [{"id": k, "text": "cat"} for k in (1, 2, 3)]


def write(folder, entries: list) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in entries), encoding="utf-8")
    return path


def test_lines_are_taken(tmp_path):
    answers = {
        "1": Answer(text="cat", probability=0.5, scores=(0.75, 0.25)),
        "2": Answer(text="a\u2028b\x85c", scores=(0.1, 0.9)),  # separators of lines within a text are text
        "3": Answer(text="", scores=(1.0, 0.0)),
    }
    path = write(tmp_path, [{"id": name, **answer.to_dict()} for name, answer in answers.items()])
    assert read_predictions(path, ITEMS).answers == answers
    # An id alone says that there is no answer, which counts as wrong.
    assert list(read_predictions(write(tmp_path, [*WHOLE[:1], {"id": 2}, {"id": 3}]), ITEMS).answers) == ["1"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": 8, "text": "cat"}, "no item '8'; the benchmark has 1, 2, 3"),
        ({"id": 2, "text": "cat"}, "another prediction for item 2; keep one"),
        ({"id": 1, "caption": "cat"}, "unknown setting 'caption'"),
        ({"id": 1, "text": "cat", "probability": 1.5}, "probability: .*less than or equal to 1"),
        ({"id": 1, "scores": [1]}, "scores: give a number for each of 2 choices"),
        ({"id": 1, "scores": [1, float("nan")]}, r"scores.1: .*finite"),
        ([1, "cat"], "expected an object"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(tmp_path, entry, message):
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(write(tmp_path, [{"id": 2, "text": "x"}, entry]), ITEMS)
    assert "answers.jsonl:2" in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "lack"),
    [
        (WHOLE[:1], "2 of 3 items have no prediction: 2, 3"),
        ([{**WHOLE[0], "scores": [1, 0]}, *WHOLE[1:]], "2 of 3 items have no scores: 2, 3"),
    ],
)
def test_what_some_items_have_all_must_have(tmp_path, entries, lack):
    with pytest.raises(DataError, match=lack):
        read_predictions(write(tmp_path, entries), ITEMS)


def test_answers_by_number_are_held_against_the_regions_they_number(tmp_path):
    boxes = Region.box(0, 0, 10, 10), Region.box(20, 0, 30, 10)
    one, other = (replace(ITEMS[0], choices=(), regions=regions) for regions in (boxes, boxes[::-1]))
    path = write(tmp_path, [{"id": 1, "text": "Region [1]", "regions": one.regions_key}])
    assert read_predictions(path, [one]).answers["1"].text == "Region [1]"
    with pytest.raises(DataError, match=r":1: about other regions than this question; give --seed"):
        read_predictions(path, [other])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"{", "Expecting"), (b"\xff\xfe", "not UTF-8"), (b"[" * 10**5, "nested too deeply")],
)
def test_files_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "odd.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"odd.jsonl: .*{message}"):
        read_predictions(tmp_path / "odd.jsonl", ITEMS)
