"""What every converter makes of files that read fine, frozen: the same source and options give the same records."""

import json
import pickle
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regiongpt.data.coco import load_coco, photo_sources
from regiongpt.data.shards import RecordSet
from regiongpt.data.sources import convert, load_converter
from regiongpt.prompts import COCO_80, COCO_IDS

SIZE = (96, 64)
RLE = {"size": [64, 96], "counts": [700, 20, 44, 20, 44, 20, 5296]}
PACKED = {
    "size": [64, 96],
    "counts": "Z:d0\\10000000000000000000000000000d0\\O0000000:F0000000000000000000000000000\\_3",
}
PHRASES = ("a red door", "the dog on the left", "two cups", "a man who waves", "grass")


def instances(rng: np.random.Generator, names: list[str], ids: list[int], entry: dict[str, str]) -> dict[str, Any]:
    """Boxes alone, polygons of one and two rings, RLE as numbers and as text, boxes over the edge, and crowds."""
    shapes = (
        lambda x, y: [],
        lambda x, y: [[x, y, x + 20, y, x + 20.5, y + 9, x, y + 12]],
        lambda x, y: [[x, y, x + 9, y, x + 4, y + 12], [x + 10, y, x + 20, y, x + 15, y + 8, x + 11, y + 7.25]],
        lambda x, y: RLE,
        lambda x, y: PACKED,
    )
    annotations = []
    for number in range(1, 121):
        x, y = (round(v, 2) for v in (rng.uniform(0, 70), rng.uniform(0, 48)))
        box = [x, y, *(round(v, 2) for v in rng.uniform(4, 40, 2).tolist())]
        shape = shapes[int(rng.integers(5))](x, y)
        own = {"image_id": int(rng.integers(1, 13)), "category_id": ids[int(rng.integers(len(ids)))]}
        area = {"area": round(box[2] * box[3] * 0.7, 3)} if number % 3 else {}
        annotations.append({"id": 1000 - number, "bbox": box, "segmentation": shape, **own, **area,
                            "iscrowd": int(number % 17 == 0)})  # fmt: skip
    images = [
        {"id": k, "width": 96, "height": 64, **{key: text.format(k) for key, text in entry.items()}}
        for k in range(12, 0, -1)
    ]
    listed = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": listed}


def make_files(root: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "train2017", "VG_100K"):
        (root / folder).mkdir()
        for k in range(1, 13):
            Image.new("RGB", SIZE).save(root / folder / f"{k}.png")

    def write(name: str, content: Any) -> None:
        lines = name.endswith("l")
        text = "".join(f"{json.dumps(each)}\n" for each in content) if lines else json.dumps(content)
        (root / name).write_text(text)

    photos = {"file_name": "{}.png", "coco_url": "http://images.org/train2017/{}.png"}
    write("instances_train.json", instances(rng, list(COCO_80), list(COCO_IDS), photos))
    captions = [{"id": k, "image_id": 1 + k % 12, "caption": f"{PHRASES[k % 5]} \n in {k}"} for k in range(30)]
    write("captions_train.json", {"annotations": captions})
    address = {"coco_url": "http://images.org/train2017/{}.png"}
    write("lvis.json", instances(rng, ["teapot", "alarm clock", "yoke"], [3, 7, 9], address))
    write("v3det.json", instances(rng, ["ashtray", "popper"], [1, 2], {"file_name": "images/{}.png"}))

    def part(sides: str, number: int) -> dict[str, Any]:
        x, y, w, h = rng.integers(1, 44, 4).tolist()
        return {"x": x, "y": y, sides.split()[0]: w, sides.split()[1]: h, "image_id": 1 + number % 6}

    data = [{"image_id": k, "width": 96, "height": 64, "url": f"http://a.b/VG_100K/{k}.png"} for k in range(1, 7)]
    write("image_data.json", data)
    described = [{"region_id": n, "phrase": PHRASES[n % 5], **part("width height", n)} for n in range(60)]
    write(
        "regions.json", [{"id": k, "regions": [r for r in described if r["image_id"] == k]} for k in (2, 1, 3, 4, 6, 5)]
    )
    things = [{"object_id": n, "names": [f"thing {n % 7}"], **part("w h", n)} for n in range(40)]
    write("objects.json", [{"image_id": k, "objects": [t for t in things if t["image_id"] == k]} for k in range(1, 7)])
    tied = [{"predicate": "ON", "subject": things[n], "object": things[n + 6], "relationship_id": n} for n in range(20)]
    write(
        "relationships.json",
        [{"image_id": k, "relationships": [t for t in tied if t["subject"]["image_id"] == k]} for k in range(1, 7)],
    )

    refs = [
        {"ref_id": n, "ann_id": 1000 - n, "image_id": 0, "split": ("train", "val")[n % 5 == 0],
         "sentences": [{"sent": f"{PHRASES[(n + k) % 5]} {k}", "sent_id": 3 * n + k} for k in range(1 + n % 3)]}
        for n in range(1, 60)
    ]  # fmt: skip
    known = json.loads((root / "instances_train.json").read_text())
    of_image = {each["id"]: each["image_id"] for each in known["annotations"]}
    for each in refs:
        each["image_id"] = of_image[each["ann_id"]]
    (root / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))
    said = [
        {"id": n, "original_id": of_image[1000 - n], "file_name": f"{of_image[1000 - n]}.png", "width": 96,
         "height": 64, "caption": PHRASES[n % 5], "dataset_name": "refcocog"}
        for n in range(1, 40)
    ]  # fmt: skip
    boxes = {each["id"]: each for each in known["annotations"]}
    shown = [{**boxes[1000 - n], "image_id": n, "original_id": 1000 - n, "id": n} for n in range(1, 40)]
    write("finetune_refcocog_train.json", {"images": said, "annotations": shown, "categories": known["categories"]})

    talk = [
        {"from": ("human", "gpt")[k % 2], "value": text}
        for k, text in enumerate(("<image>\nWhat?", "A cup.", "And\nthis?", " Red. "))
    ]
    write("llava.json", [{"id": f"{n:03d}", "image": f"{1 + n % 12}.png", "conversations": talk[: 2 + 2 * (n % 2)]}
                         for n in range(12)])  # fmt: skip
    region = {"polygon": [[1, 1, 40, 2, 33, 30]]}
    turns = [
        {"task": "classify", "regions": [2], "label_set": "COCO-80", "guided": True, "answer": "dog"},
        {"task": "locate", "regions": [1, 2, 3], "expression": "the cup", "guided": True, "answer": "Region [2]"},
        {"question": "Is <region4> beside <region1>?", "answer": "Yes, <region4> is."},
        {"task": "presence", "category": "dog", "answer": "yes"},
    ]
    shapes = [{"box": [1, 2, 30, 20], "category": "cup"}, region, {"rle": RLE}, {"point": [20, 30], "radius": 4}]
    write("own.jsonl", [{"id": n, "image": f"{n}.png", "regions": shapes, "conversation": turns[n % 4 :]}
                        for n in range(1, 9)])  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    make_files(root)
    return root


COCO = {"instances": ("instances_train.json",), "images": "images"}
RUNS: dict[str, tuple[str, dict[str, Any], str, dict[str, int]]] = {
    "coco boxes": (
        "coco",
        {**COCO},
        "24999458e961157c",
        {"images": 12, "records": 12, "regions": 113, "task:classify": 113, "turns": 113},
    ),
    "coco masks": (
        "coco",
        {**COCO, "shapes": "mask"},
        "138f9e2db7d84c6e",
        {"images": 12, "records": 12, "regions": 88, "task:classify": 88, "turns": 88},
    ),
    "coco both, sampled, captions": (
        "coco",
        {
            **COCO,
            "shapes": "both",
            "captions": ("captions_train.json",),
            "captions_per_image": 2,
            "boxes_per_category": 1,
            "objects_per_record": 3,
            "seed": 5,
        },
        "d2570ec45b87d108",
        {"images": 12, "records": 48, "regions": 108, "task:classify": 108, "task:image_caption": 24, "turns": 132},
    ),
    "lvis": (
        "lvis",
        {"images": ".", "instances": ("lvis.json",), "shapes": "both"},
        "2bf6314fb5d04e95",
        {"images": 12, "records": 12, "regions": 198, "task:classify": 198, "turns": 198},
    ),
    "lvis, images not looked at": (
        "lvis",
        {"images": "images", "instances": ("lvis.json",), "check_images": False},
        "3da6a0b065714808",
        {"images": 12, "records": 12, "regions": 113, "task:classify": 113, "turns": 113},
    ),
    "v3det": (
        "v3det",
        {"images": ".", "instances": ("v3det.json",), "boxes_per_category": 20},
        "d9f40f456aecd343",
        {"images": 12, "records": 12, "regions": 40, "task:classify": 40, "turns": 40},
    ),
    "vg": (
        "vg",
        {"images": ".", "regions": "regions.json", "image_data": "image_data.json"},
        "7e5db7e24fe457c0",
        {"images": 6, "records": 6, "regions": 60, "task:caption": 60, "turns": 60},
    ),
    "vg, all of it": (
        "vg",
        {
            "images": ".",
            "regions": "regions.json",
            "image_data": "image_data.json",
            "objects": "objects.json",
            "relationships": "relationships.json",
            "boxes_per_image": 6,
            "seed": 3,
        },
        "8cf91a83fd8d54ef",
        {
            "images": 6,
            "records": 6,
            "regions": 36,
            "task:caption": 21,
            "task:classify": 15,
            "task:relation": 8,
            "turns": 44,
        },
    ),
    "refcoco": (
        "refcoco",
        {"images": "images", "refs": "refs(umd).p", "instances": "instances_train.json"},
        "ffbf15a8f4a1a0e0",
        {"images": 11, "records": 126, "regions": 813, "task:caption": 96, "task:locate": 96, "turns": 192},
    ),
    "refcoco json": (
        "refcoco",
        {"images": "images", "refs": "finetune_refcocog_train.json", "candidates": 3, "no_match_share": 0.5},
        "24206d38364e892b",
        {"images": 12, "records": 46, "regions": 133, "task:caption": 39, "task:locate": 34, "turns": 73},
    ),
    "refcoco json with all objects": (
        "refcoco",
        {
            "images": "images",
            "refs": "finetune_refcocog_train.json",
            "instances": "instances_train.json",
            "task": "locate",
        },
        "1f807a71c41036e4",
        {"images": 12, "records": 39, "regions": 294, "task:locate": 39, "turns": 39},
    ),
    "llava": (
        "llava",
        {"images": "images", "data": "llava.json"},
        "18539ce998038ffe",
        {"images": 12, "records": 12, "regions": 0, "task:chat": 18, "turns": 18},
    ),
    "jsonl": (
        "jsonl",
        {"images": "images", "data": "own.jsonl"},
        "67b04380f51af63f",
        {
            "images": 8,
            "records": 8,
            "regions": 32,
            "task:chat": 6,
            "task:classify": 2,
            "task:locate": 4,
            "task:presence": 8,
            "turns": 20,
        },
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_records_are_what_they_were(files: Path, tmp_path: Path, run: str) -> None:
    source, options, digest, counts = RUNS[run]
    paths = {"images", "instances", "captions", "regions", "image_data", "objects", "relationships", "refs", "data"}

    def placed(value: Any) -> Any:
        return tuple(map(placed, value)) if isinstance(value, tuple) else files / value

    given = {name: placed(value) if name in paths else value for name, value in options.items()}
    manifest = convert(load_converter(source)(**given), tmp_path / "out")
    rows = [record.row() for record in RecordSet(tmp_path / "out")]
    assert manifest.counts == counts
    assert sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] == digest


def test_training_reads_what_it_did(files: Path) -> None:
    data = load_coco(photo_sources(files, "train"))
    shown = [
        (each.path.name, each.image_id, each.width, each.height, each.captions,
         [(o.id, o.category, o.box, o.polygons, o.iscrowd) for o in each.objects])
        for each in data.images
    ]  # fmt: skip
    assert data.skipped == {}
    assert sha256(repr(shown).encode()).hexdigest()[:16] == "723db72e040a87dc"
