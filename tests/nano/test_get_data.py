"""The script that builds nano's data from COCO's downloads: a small COCO, as a folder and over HTTP."""

import functools
import hashlib
import http.server
import json
import threading
import zipfile

import get_data
import pytest
from pictures import draw_pictures
from PIL import Image

from regiongpt.data.coco import load_coco, photo_sources

SPLITS = {"train2017": {1: "train", 2: "dev", 3: "small"}, "val2017": {4: "train"}}


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A COCO of four images, and their list at half the size."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    draw_pictures(drawn, 4, "instances.json")
    made = json.loads((drawn / "instances.json").read_text())
    rows = []
    for split, parts in SPLITS.items():
        (root / split).mkdir()
        images = [each for each in made["images"] if each["id"] in parts]
        objects = [each | {"iscrowd": 0, "area": 100.0} for each in made["annotations"] if each["image_id"] in parts]
        for each in objects:
            x, y, width, height = each["bbox"]
            each["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
        for each in images:
            picture = Image.open(drawn / "images" / each["file_name"]).convert("RGB")
            each["file_name"] = f"{each['id']:012d}.jpg"
            picture.save(root / split / each["file_name"], quality=95)
            size = (each["width"] // 2, each["height"] // 2)
            classes = get_data.checksum_of_classes(o["category_id"] for o in objects if o["image_id"] == each["id"])
            pixels = get_data.difference_hash(picture.resize(size))
            rows.append((each["id"], split, parts[each["id"]], *size, classes, pixels))
        found = {"images": images, "annotations": objects, "categories": made["categories"]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
        said = [{"id": each["id"], "image_id": each["id"], "caption": "A cat."} for each in images]
        (root / "annotations" / f"captions_{split}.json").write_text(
            json.dumps({"images": images, "annotations": said})
        )
    listed = tmp_path / "images.tsv"
    listed.write_text("\n".join("\t".join(map(str, row)) for row in [get_data.Listed._fields, *rows]))
    monkeypatch.setattr(get_data, "LIST", listed)
    return root


def test_a_folder_of_coco_becomes_the_layout_that_nano_reads(coco, tmp_path, capsys):
    out = tmp_path / "out"
    assert get_data.main([f"--out={out}", f"--coco={coco}"]) == 0, capsys.readouterr()
    whole = {
        each["id"]: each
        for each in json.loads((coco / "annotations/instances_train2017.json").read_text())["annotations"]
    }
    train = load_coco(photo_sources(out, "train")).images
    assert sorted(image.image_id for image in train) == [1, 3, 4]
    outlines = {image.image_id: [bool(each.polygons) for each in image.objects] for image in train}
    assert all(outlines[1])
    assert not any(outlines[3] + outlines[4])
    for each in json.loads((out / "instances_train.json").read_text())["annotations"]:
        if each["id"] in whole:
            assert each["bbox"] == [value / 2 for value in whole[each["id"]]["bbox"]]
            assert each["segmentation"] == [[value / 2 for value in whole[each["id"]]["segmentation"][0]]]
    assert [each["image_id"] for each in json.loads((out / "captions_train.json").read_text())["annotations"]] == [1, 4]
    assert (out / "images_small" / "000000000003.jpg").exists()


def test_the_downloads_are_checked_and_resumed(coco, tmp_path, capsys, monkeypatch):
    archive = coco / "annotations" / "annotations_trainval2017.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in coco.glob("annotations/*.json"):
            file.write(path, f"annotations/{path.name}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(coco))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(get_data, "COCO", f"http://127.0.0.1:{server.server_port}")
        words = [f"--out={tmp_path / 'out'}"]
        assert get_data.main(words) == 2
        assert "MD5" in capsys.readouterr().err
        monkeypatch.setattr(get_data, "ANNOTATIONS_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        lost = coco / "val2017" / "000000000004.jpg"
        kept = lost.read_bytes()
        lost.unlink()
        assert get_data.main(words) == 2
        assert "000000000004.jpg" in capsys.readouterr().err
        lost.write_bytes(kept)
        first = tmp_path / "out" / "images" / "000000000001.jpg"
        written = first.stat().st_mtime_ns
        assert get_data.main(words) == 0, capsys.readouterr()
        assert first.stat().st_mtime_ns == written
        server.shutdown()


def test_what_differs_from_the_list_is_named(coco, tmp_path, capsys):
    out = tmp_path / "out"
    assert get_data.main([f"--out={out}", f"--coco={coco}"]) == 0
    path = out / "images" / "000000000001.jpg"
    size = Image.open(path).size
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    found = json.loads((out / "instances_dev.json").read_text())
    found["annotations"].pop()
    (out / "instances_dev.json").write_text(json.dumps(found))
    capsys.readouterr()
    assert get_data.main([f"--check={out}"]) == 1
    told = capsys.readouterr().out
    assert "1 images with other pixels: 000000000001.jpg" in told
    assert "1 images with objects of other classes: 000000000002.jpg" in told
