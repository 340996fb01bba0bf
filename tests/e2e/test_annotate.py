"""`regiongpt annotate` from end to end: real images, a real HTTP endpoint with faults, kills, and what is refused."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from endpoint import Running, running
from PIL import Image
from tiny_checkpoint import make_checkpoint

from regiongpt.annotate import engine
from regiongpt.cli import main
from regiongpt.data.records import Record
from regiongpt.data.shards import RecordSet
from regiongpt.data.sources import AnnotatedImages, convert, load_converter
from regiongpt.images import load_image

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("REGIONGPT_DATA", ROOT.parent / "shared" / "data")) / "coco_photos"
NAMES = ("cat", "dog", "traffic_light")


def draw(root: Path, images: int, regions: int) -> Path:
    """Images of noise with boxes of three classes, in COCO's format."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    entries, boxes = [], []
    for k in range(images):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(root / "images" / f"{k}.png")
        entries.append({"id": k, "file_name": f"{k}.png", "width": 64, "height": 48})
        for n in range(regions):
            box = [float(2 * n), 3.0, 20.0, 30.0]
            boxes.append({"id": len(boxes) + 1, "image_id": k, "category_id": n % 3, "bbox": box, "iscrowd": 0})
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES)]
    file = root / "instances.json"
    file.write_text(json.dumps({"images": entries, "annotations": boxes, "categories": categories}))
    return file


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of six regions each."""
    return draw(tmp_path_factory.mktemp("drawn"), 10, 6).parent


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "endpoint") as endpoint:
        yield endpoint


def words(root: Path, out: Path, *more: object) -> list[str]:
    paths = ["--images", root / "images", "--regions", root / "instances.json", "--out", out]
    return ["annotate", *map(str, (*paths, *more))]


def start(root: Path, out: Path, *more: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "regiongpt.cli", *words(root, out, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def captions(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((out / "captions").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.skipif(not DATA.is_dir(), reason="the COCO photographs are not here")
def test_real_photographs_are_captioned_by_facts_and_by_the_shipped_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.loads((DATA / "instances_dev.json").read_text())
    chosen = {image["id"] for image in source["images"][:2]}
    source["annotations"] = [each for each in source["annotations"] if each["image_id"] in chosen][:8]
    source["images"] = source["images"][:2]
    (tmp_path / "few.json").write_text(json.dumps(source))
    command = ["annotate", "--images", str(DATA / "images"), "--regions", str(tmp_path / "few.json"), "--gallery", "1"]
    for out, more in ((tmp_path / "facts", ["--captioner", "facts"]), (tmp_path / "nano", ["--locate-back"])):
        assert main([*command, "--out", str(out), *more]) == 0
        shown = capsys.readouterr().out
        assert "87.14" in shown
        rows = captions(out)
        assert len(rows) == len(source["annotations"])
        assert all(row["global_caption"] and row["caption"] for row in rows)
        kept = [row for row in rows if row["kept"]]
        assert kept == rows or out.name == "nano"
        records = list(RecordSet(out / "records"))
        assert sum(len(record.regions) for record in records) == len(kept)
        page = (out / "index.html").read_text()
        assert all(mode in page for mode in ("crop", "context", "full"))
    assert all(row["names_class"] for row in captions(tmp_path / "facts"))
    assert {row["located_back"] for row in captions(tmp_path / "nano")} <= {True, False}


def test_what_is_made_trains_a_model(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(words(drawn, out, "--captioner", "facts")) == 0
    init = make_checkpoint(tmp_path / "parts")
    small = ["--stage2.batch_size=4", "--stage2.micro_batch_size=2", "--stage2.epochs=1", "--from-scratch"]
    recipe = [str(ROOT / "configs" / "finetune_records.toml"), f"--model.init={init}", f"--out={tmp_path / 'run'}"]
    assert main(["train", *recipe, f"--data.mixture={out / 'records'}", *small]) == 0


def test_records_are_a_source_too_and_an_image_is_decoded_once(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    monkeypatch.setattr(engine, "load_image", lambda path: decoded.append(path) or load_image(path))
    paths: Any = {"instances": (drawn / "instances.json",), "images": drawn / "images", "label_set": "mine"}
    convert(load_converter("coco")(**paths), tmp_path / "records")
    for name, regions in (("a", drawn / "instances.json"), ("b", tmp_path / "records")):
        decoded.clear()
        command = ["--images", drawn / "images", "--regions", regions, "--out", tmp_path / name, "--captioner", "facts"]
        assert main(["annotate", *map(str, command)]) == 0
        assert len(decoded) == len(set(decoded)) == 10
        assert main(["annotate", *map(str, command)]) == 0  # all is done
        assert len(decoded) == 10
    a, b = captions(tmp_path / "a"), captions(tmp_path / "b")
    assert [row["caption"] for row in a] == [row["caption"] for row in b]
    assert len(a) == 60


def test_each_region_is_asked_once_with_its_context_and_its_class(drawn: Path, served: Running, tmp_path: Path) -> None:
    served.set(keep=True)
    out = tmp_path / "out"
    prices = ["--input-price", 1, "--output-price", 10]
    assert main(words(drawn, out, "--captioner", served.url, "--gallery", 0, *prices)) == 0
    assert Counter(served.asked().values()) == {1: 10 + 60}
    rows = captions(out)
    by_picture = {row["caption"]: row for row in rows}
    assert len(rows) == 60
    assert len(by_picture) > 50
    bodies = [body["messages"][0]["content"] for body in served.bodies()]
    regions = [content for content in bodies if len(content) == 3]
    assert len(regions) == 60
    for lead, picture, text in regions:
        assert lead["text"].startswith("In the context of the entire image, A picture of 64 by 48")
        assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert any(name.replace("_", " ") in text["text"] for name in NAMES)
    # Regions of an image come one after the other: what an engine has read of their context serves them all.
    leads = [content[0]["text"] for content in regions]
    assert sum(a != b for a, b in itertools.pairwise(leads)) < 30
    assert [rows[0][name] for name in ("model", "tokens_in", "tokens_out", "cost")] == ["mock-vlm", 100, 20, 3e-4]
    assert json.loads((out / "manifest.json").read_text())["cost"] == pytest.approx(70 * 3e-4)
    assert len({row["prompt_version"] for row in rows}) > 5
    assert main(words(drawn, out, "--captioner", served.url, "--gallery", 0)) == 0
    assert served.asked().total() == 70  # nothing is asked again


def test_modes_tell_less(drawn: Path, served: Running, tmp_path: Path) -> None:
    served.set(keep=True)
    assert main(words(drawn, tmp_path / "crop", "--captioner", served.url, "--mode", "crop", "--gallery", 0)) == 0
    texts = [content[-1]["text"] for content in (body["messages"][0]["content"] for body in served.bodies())]
    assert len(texts) == 60  # no global caption either
    assert all("object" in text and not any(name in text for name in ("cat", "dog", "traffic")) for text in texts)
    assert main(words(drawn, tmp_path / "context", "--captioner", served.url, "--mode", "context", "--gallery", 3)) == 0
    assert len(served.bodies()) == 60 + 10 + 60 + 2 * 3


def test_faults_are_retried_by_their_own_rule(
    drawn: Path, served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statuses, connections and what came malformed are asked again; what was cut off waits for the next run."""
    out = tmp_path / "out"
    faults = {"rate_limit": 0.1, "server_error": 0.05, "cut_connection": 0.05, "malformed": 0.05, "empty": 0.04}
    served.set(**faults, no_reason=0.04, length=0.06, refused=0.04)
    run = words(drawn, out, "--captioner", served.url, "--gallery", 0, "--seed", 1)
    assert main(run) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "cut off" in told or "refused" in told
    first = captions(out)
    assert 20 < len(first) < 60
    before = served.asked().total()
    served.set()
    assert main(run) == 0
    assert served.asked().total() - before <= 60 + 10 - len(first)
    rows = captions(out)
    assert len(rows) == len({row["id"] for row in rows}) == 60
    kept = {row["id"]: row["caption"] for row in first}
    assert all(row["caption"] == kept.get(row["id"], row["caption"]) for row in rows)


@pytest.mark.parametrize("down", ["cut", "status"])
def test_an_endpoint_that_goes_down_is_waited_for(drawn: Path, served: Running, tmp_path: Path, down: str) -> None:
    served.set(latency=0.05, slots=4)
    process = start(drawn, tmp_path / "out", "--captioner", served.url, "--gallery", 0)
    while not (served.folder / "log.txt").read_text().count("done") > 10:
        time.sleep(0.02)
    served.set(latency=0.05, down=down)
    time.sleep(2)
    served.set(latency=0.05)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert len(captions(tmp_path / "out")) == 60


@pytest.mark.parametrize("status", [408, 409, 429, 500, 501, 503])
def test_the_engine_alone_retries_a_status(drawn: Path, served: Running, tmp_path: Path, status: int) -> None:
    """The client would ask twice more by itself, and sleep as long as the endpoint says."""
    served.set(server_error=0.3, status=status, retry_after=0.4)
    assert main(words(drawn, tmp_path / "out", "--captioner", served.url, "--gallery", 0)) == 0
    assert Counter(served.done().values()) == {1: 70}
    assert served.asked("struck").total() < 70


def test_what_failed_too_often_is_told_and_not_asked_again(
    drawn: Path, served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.set(length=0.05)
    run = words(drawn, tmp_path / "out", "--captioner", served.url, "--gallery", 0, "--mode", "crop")
    assert main(run) == 2
    missing = 60 - len(captions(tmp_path / "out"))
    served.set(length=1.0)
    for _ in range(8):
        assert main(run) == 2
    before = served.asked().total()
    capsys.readouterr()
    refused(capsys, run, f"{missing} cut off", "--max-new-tokens")
    assert served.asked().total() == before


def test_killed_again_and_again_every_region_is_asked_once(tmp_path: Path) -> None:
    """What was under way may be asked twice, what was finished never."""
    root = draw(tmp_path / "many", 20, 10).parent
    out, slots, kills = tmp_path / "out", 8, 0
    rng = random.Random(0)
    with running(tmp_path / "endpoint", parse=False, latency=0.05, slots=slots) as served:
        while True:
            process = start(root, out, "--captioner", served.url, "--gallery", 0, "--concurrency", slots)
            log = served.folder / "log.txt"
            done = log.read_text().count("done") + rng.randint(20, 90)
            while process.poll() is None and log.read_text().count("done") < done:
                time.sleep(0.005)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        assert process.communicate()[1] == ""
        assert process.returncode == 0
        assert kills >= 3
        assert len(served.done()) == 220
        assert served.asked().total() <= 220 + kills * slots
    rows = captions(out)
    assert len(rows) == len({row["id"] for row in rows}) == 200


def test_ctrl_c_finishes_what_is_under_way_and_the_files_can_be_had(
    drawn: Path, served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.set(latency=0.4, slots=4)
    out = tmp_path / "out"
    process = start(drawn, out, "--captioner", served.url, "--gallery", 0, "--concurrency", 4)
    log = served.folder / "log.txt"
    while not log.exists() or log.read_text().count("done") < 12:
        time.sleep(0.01)
    refused(capsys, words(drawn, out, "--captioner", served.url), f"process {process.pid} is writing")
    assert main(["annotate", "--refilter", str(out), "--min-words", "0"]) == 0
    assert 0 < len(captions(out)) < 60
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(err.strip().splitlines()) == 1
    assert served.done() == served.asked()  # nothing was dropped
    assert main(["annotate", "--refilter", str(out)]) == 0
    assert len(captions(out)) + 10 >= len(served.done())
    assert main(words(drawn, out, "--captioner", served.url, "--gallery", 0)) == 0
    assert Counter(served.asked().values()) == {1: 70}


@pytest.mark.parametrize(
    ("limit", "value", "settings"),
    [("max-failures", 5, {"refused": 0.2}), ("max-cost", 0.008, {}), ("max-time", 1.5, {"latency": 0.1, "slots": 2})],
)
def test_a_limit_ends_a_run_that_can_go_on(
    drawn: Path, served: Running, tmp_path: Path, limit: str, value: float, settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    served.set(**settings)
    out = tmp_path / "out"
    prices = ["--input-price", 1, "--output-price", 10, "--concurrency", 2, "--gallery", 0]
    run = words(drawn, out, "--captioner", served.url, *prices, f"--{limit}", value)
    assert main(run) in (0, 2)
    assert f"ended by --{limit}" in capsys.readouterr().out
    assert 0 < len(captions(out)) < 50
    served.set()
    assert main(run[:-2]) == 0
    assert len(captions(out)) == 60


def test_regions_are_located_back_by_the_endpoint(drawn: Path, served: Running, tmp_path: Path) -> None:
    """`structured_outputs` is what vLLM reads; `guided_choice` it ignores in silence."""
    served.set(keep=True)
    out = tmp_path / "out"
    assert main(words(drawn, out, "--captioner", served.url, "--locate-back", "--gallery", 0)) == 0
    choosing = [body for body in served.bodies() if "structured_outputs" in body]
    assert len(choosing) == 60
    assert choosing[0]["structured_outputs"] == {"choice": ["1", "2", "3", "4", "5", "6"]}
    assert not any(name.startswith("guided") for body in served.bodies() for name in body)
    rows = captions(out)
    assert Counter(row["located"] for row in rows) == {6: 60}  # what this endpoint always says
    assert Counter(row["located_back"] for row in rows) == {False: 50, True: 10}
    before = served.asked().total()
    assert main(["annotate", "--refilter", str(out), "--reject", "not_located"]) == 0
    assert served.asked().total() == before  # no model is asked
    assert Counter(row["reason"] for row in captions(out)) == {"not_located": 50, "": 10}
    assert sum(len(record.regions) for record in RecordSet(out / "records")) == 10
    # An endpoint that refuses the field is asked without it, and what it says has to be one of the numbers.
    served.set(strict=True)
    assert main(words(drawn, tmp_path / "b", "--captioner", served.url, "--locate-back", "--gallery", 0)) in (0, 2)
    assert not any(row["located"] is not None and not 0 <= row["located"] <= 6 for row in captions(tmp_path / "b"))
    assert len(captions(tmp_path / "b")) == 60


def test_captions_are_exported_for_other_trainers(drawn: Path, served: Running, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = words(drawn, out, "--captioner", served.url, "--export", "llava", "webdataset")
    assert main(run) == 0
    lines = [json.loads(line) for line in (out / "llava.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert [turn["from"] for turn in lines[0]["conversations"]] == ["human", "gpt"] * 7
    assert lines[0]["conversations"][0]["value"].startswith("<image>\n")
    assert "region [0.000, 0.062, 0.312, 0.688]" in lines[0]["conversations"][0]["value"]
    (tmp_path / "llava.json").write_text(json.dumps(lines))
    llava = load_converter("llava")(data=tmp_path / "llava.json", images=drawn / "images")  # type: ignore[call-arg]
    assert convert(llava, tmp_path / "again").counts["turns"] == 70
    with tarfile.open(out / "webdataset" / "records-00000.tar") as tar:
        names = tar.getnames()
        assert len(names) == 20
        assert names[0].rpartition(".")[0] == names[1].rpartition(".")[0]
        record = Record.from_row(json.load(tar.extractfile(names[1])))  # type: ignore[arg-type]
        assert len(record.regions) == 6
        assert tar.extractfile(names[0]).read() == (drawn / "images" / "0.png").read_bytes()  # type: ignore[union-attr]
    assert "| out | 10 | 60 |" in (out / "README.md").read_text()


def refused(capsys: pytest.CaptureFixture[str], run: list[str], *told: str) -> None:
    assert main(run) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in told), line


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"key": "secret"}, ("key", "OPENAI_API_KEY")),
        ({"down": "status"}, ("status 503",)),
        ({"no_vision": True}, ("multimodal",)),
        ({"models": ["a", "b"]}, ("a, b", "--served-model")),
        ({"empty": 1.0}, ("empty answer",)),
        ({"length": 1.0}, ("cut off", "--max-new-tokens")),
        ({"refused": 1.0}, ("image too large",)),
        ({"rate_limit": 1.0, "retry_after": 9999}, ("9999 s", "--patience")),
        ({"path": "/other/page"}, ("/other/page", "OpenAI-compatible")),
        ({"url": "http://127.0.0.1:9/v1"}, ("endpoint answers",)),
    ],
)
def test_an_endpoint_that_cannot_caption_is_one_line(
    drawn: Path, served: Running, tmp_path: Path, settings: dict[str, Any], told: tuple[str, ...],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    served.set(**settings)
    url = settings.get("url") or served.url.removesuffix("/v1") + settings.get("path", "/v1")
    refused(capsys, words(drawn, tmp_path / "out", "--captioner", url), *told)
    if "key" in settings:
        monkeypatch.setenv("MY_KEY", "secret")
        run = words(drawn, tmp_path / "out", "--captioner", served.url, "--key-variable", "MY_KEY")
        assert main(run) == 0
        assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_bad_input_is_one_line(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = ["--captioner", "facts"]
    out = tmp_path / "out"
    refused(capsys, ["annotate", "--out", str(out)], "--images", "--regions")
    refused(capsys, [*words(drawn, out, *facts), "--locate-back"], "--locate-back")
    refused(capsys, words(drawn, out, "--captioner", tmp_path / "none"), "--captioner")
    refused(capsys, words(drawn, out, *facts, "--max-cost", 1), "--input-price")
    refused(capsys, words(drawn, out, *facts, "--top-share", 0.5), "--similarity")
    refused(capsys, ["annotate", "--refilter", str(tmp_path / "nowhere")], "no captions")
    refused(capsys, ["annotate", "--refilter", str(out), "--out", "x"], "--refilter")
    assert main(words(drawn, out, *facts)) == 0
    capsys.readouterr()
    refused(capsys, words(drawn, out, *facts, "--mode", "crop"), "mode is 'full' there and 'crop' now")
    assert len(captions(out)) == 60


def test_regions_that_cannot_be_used_are_told_and_the_rest_is_done(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "some"
    shutil.copytree(drawn, root)
    (root / "images" / "3.png").write_bytes(b"no image")
    source = json.loads((root / "instances.json").read_text())
    source["annotations"][0]["bbox"] = [500.0, 500.0, 10.0, 10.0]
    (root / "instances.json").write_text(json.dumps(source))
    assert main(words(root, tmp_path / "out", "--captioner", "facts")) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "1 box outside the image" in told
    assert "image that cannot be used" in told
    assert len(captions(tmp_path / "out")) == 53
    shutil.copy(drawn / "images" / "3.png", root / "images" / "3.png")
    assert main(words(root, tmp_path / "out", "--captioner", "facts")) == 2  # the box is still outside
    assert len(captions(tmp_path / "out")) == 59


def test_regions_without_classes_need_a_mode_that_tells_none(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = [
        replace(record, regions=tuple(replace(each, category="") for each in record.regions))
        for record in AnnotatedImages(drawn / "images", drawn / "instances.json")
    ]
    monkeypatch.setattr(AnnotatedImages, "__iter__", lambda self: iter(nameless))
    run = words(drawn, tmp_path / "out", "--captioner", "facts")
    refused(capsys, run, "class name", "--mode context")
    assert main([*run, "--mode", "context", "--gallery", "0"]) == 0
    assert all("object" in row["caption"] for row in captions(tmp_path / "out"))


@pytest.mark.slow
def test_ray_makes_the_same_captions_on_two_nodes(drawn: Path, served: Running, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        served.set(malformed=0.1, refused=0.05)
        run = words(drawn, tmp_path / "ray", "--captioner", served.url, "--engine", "ray", "--gallery", 2)
        assert main(run) in (0, 2)
        served.set()
        assert main(run) == 0
        asked = served.asked().total()
        assert main(run) == 0  # a second run asks nothing and doubles nothing
        assert served.asked().total() == asked
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert main(words(drawn, tmp_path / "local", "--captioner", served.url, "--gallery", 2)) == 0
    same = ("id", "caption", "global_caption", "prompt_version", "seed", "kept")
    a, b = ([{name: row[name] for name in same} for row in captions(tmp_path / out)] for out in ("ray", "local"))
    assert a == b
    assert len(a) == 60
