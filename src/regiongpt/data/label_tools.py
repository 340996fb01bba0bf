"""Reads what people draw in Label Studio and LabelMe as records: a question about each region, its label the answer.

A region that also carries text of its own (a text area in Label Studio, a description in LabelMe) is asked for that as
its caption too.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regiongpt.data.convert.images import Fault, image_size
from regiongpt.data.convert.jsonstream import TRUNCATED, iter_array
from regiongpt.data.convert.values import MALFORMED, image_fault, is_side, plain_text, short
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError, RegionError
from regiongpt.images import MAX_PIXELS
from regiongpt.regions import Region

_ELLIPSE: Final = 64  # points on the outline: its area is 0.2 % short


class _Drawn:
    """The regions of one image and what is asked about them, while they are read."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.regions: list[RecordRegion] = []
        self.turns: list[Turn] = []

    def add(self, region: Region, label: str, caption: str, identity: str) -> None:
        """Takes one region with its label and caption, one of which may be empty; RegionError if it makes no sense."""
        region.check(self.width, self.height, "region")
        if region.kind == "box":
            region = Region.box(*region.bounds(self.width, self.height))
        self.regions.append(RecordRegion(region=region, category=label, source_id=identity))
        numbers = (len(self.regions),)
        if label:
            self.turns.append(Turn(task="classify", regions=numbers, answer=label))
        if caption:
            self.turns.append(Turn(task="caption", regions=numbers, answer=caption))

    def record(self, identity: str, source: str, image: str) -> Record:
        return Record(
            id=identity,
            source=source,
            image=image,
            width=self.width,
            height=self.height,
            regions=tuple(self.regions),
            turns=tuple(self.turns),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Label Studio


def label_studio_image(address: str) -> str:
    """The path of a task's image: of an address ``.../?d=PATH`` the path, of any other the last part."""
    parts = urlsplit(address)
    local = parse_qs(parts.query).get("d")
    return local[0].lstrip("/") if local else unquote(parts.path).rsplit("/", 1)[-1]


def read_label_studio(
    path: str | Path,
    rejects: Rejects,
    *,
    image_key: str = "image",
    image_name: Callable[[str], str] = label_studio_image,
) -> Iterator[Record]:
    """The annotations of a Label Studio export (JSON, not JSON-MIN), each of every annotator as one record.

    Rectangles, turned ones too, ellipses, polygons, key points and brush strokes are read; coordinates there are
    percent of the image.

    Args:
        path: Of the export.
        rejects: Where what cannot be used is noted.
        image_key: The task's data field with the address of the image.
        image_name: Turns that address into a path below the images' folder.

    Raises:
        DataError: The file is missing or no such export.
    """
    path = Path(path)
    for place, task in enumerate(iter_array(path, None, rejects)):
        data = task.get("data") if isinstance(task, dict) else None
        address = data.get(image_key) if isinstance(data, dict) else None
        annotations = task.get("annotations") if isinstance(task, dict) else None
        if not isinstance(address, str) or not isinstance(annotations, list):
            reason = f"expected a task with data.{image_key} and annotations, got {short(task)}"
            rejects.add(MALFORMED, path, place, reason)
            continue
        image, number = image_name(address), task.get("id", place)
        if fault := image_fault(image):
            rejects.add(fault.kind, path, number, fault.reason)
            continue
        for order, annotation in enumerate(annotations):
            results = annotation.get("result") if isinstance(annotation, dict) else None
            name = f"{number}/{annotation.get('id', order) if isinstance(annotation, dict) else order}"
            if not isinstance(results, list):
                rejects.add(MALFORMED, path, name, f"expected an annotation with a result, got {short(annotation)}")
            elif annotation.get("was_cancelled"):
                rejects.add("cancelled annotation", path, name, "expected one that was submitted")
            else:
                drawn = _label_studio_regions(results, name, path, rejects)
                if drawn is not None and drawn.turns:
                    yield drawn.record(f"label_studio/{name}", "label_studio", image)


def _label_studio_regions(results: list[Any], name: str, path: Path, rejects: Rejects) -> _Drawn | None:
    """What one annotator has drawn; the parts of one region share an id."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for place, result in enumerate(results):
        if isinstance(result, dict) and isinstance(result.get("value"), dict):
            parts.setdefault(str(result.get("id", place)), []).append(result)
        else:
            rejects.add(MALFORMED, path, f"{name}[{place}]", f"expected a result with a value, got {short(result)}")
    drawn: _Drawn | None = None
    for identity, results_of_one in parts.items():
        record = f"{name}/{identity}"
        shaped = next((each for each in results_of_one if _label_studio_kind(each) in _LABEL_STUDIO), None)
        labels = [str(label) for each in results_of_one for label in _label_studio_labels(each)]
        texts = [text for each in results_of_one if each.get("type") == "textarea" for text in _texts(each["value"])]
        label = plain_text(", ".join(labels), "label") if labels else ""
        caption = plain_text(" ".join(texts), "caption") if texts else ""
        fault = next((text for text in (label, caption) if isinstance(text, Fault)), None)
        if shaped is None:
            kinds = sorted({str(each.get("type")) for each in results_of_one})
            fault = Fault("shape of another kind", f"expected one of {', '.join(_LABEL_STUDIO)}, got {short(kinds)}")
        elif fault is None and not label and not caption:
            fault = Fault("region without a name", "expected a label or a text, got neither")
        if fault is None and shaped is not None:
            fault = _label_studio_frame(shaped, drawn)
        if fault is not None or shaped is None:
            fault = fault or Fault(MALFORMED, "expected a shape")
            rejects.add(fault.kind, path, record, fault.reason)
            continue
        width, height = shaped["original_width"], shaped["original_height"]
        drawn = drawn or _Drawn(width, height)
        try:
            region = _LABEL_STUDIO[_label_studio_kind(shaped)](shaped["value"], width, height)
            drawn.add(region, str(label), str(caption), identity)
        except RegionError as error:
            rejects.add("region that makes no sense", path, record, str(error))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            reason = f"expected the numbers of a {shaped.get('type')}, got {short(shaped['value'])} ({error!r})"
            rejects.add(MALFORMED, path, record, reason)
    return drawn


def _label_studio_kind(result: Mapping[str, Any]) -> str:
    return str(result.get("type", "")).removesuffix("labels")


def _label_studio_labels(result: Mapping[str, Any]) -> list[Any]:
    found = result["value"].get(result.get("type")) if str(result.get("type", "")).endswith("labels") else None
    return found if isinstance(found, list) else []


def _label_studio_frame(result: Mapping[str, Any], drawn: _Drawn | None) -> Fault | None:
    size = (result.get("original_width"), result.get("original_height"))
    if not all(map(is_side, size)):
        return Fault("image without size", f"expected original_width and original_height, got {short(size)}")
    if drawn is not None and size != (drawn.width, drawn.height):
        return Fault("image of another size", f"expected {(drawn.width, drawn.height)} as before, got {size}")
    if result.get("image_rotation"):
        return Fault("turned image", f"expected the image upright, got {short(result['image_rotation'])} degrees")
    return None


def _texts(value: Mapping[str, Any]) -> list[str]:
    text = value.get("text")
    return [text] if isinstance(text, str) else [str(each) for each in text] if isinstance(text, list) else []


def _percent(value: Mapping[str, Any], width: int, height: int, *names: str) -> list[float]:
    """Values of these names, in turn along x and y, in pixels."""
    sides = (width, height)
    return [float(value[name]) * sides[index % 2] / 100 for index, name in enumerate(names)]


def _turned(points: NDArray[np.float64], x: float, y: float, degrees: float) -> Region:
    """The polygon of points turned clockwise about (x, y)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return Region.polygon((points - (x, y)) @ np.array([[cos, sin], [-sin, cos]]) + (x, y))


def _rectangle(value: Mapping[str, Any], width: int, height: int) -> Region:
    x, y, w, h = _percent(value, width, height, "x", "y", "width", "height")
    if degrees := float(value.get("rotation") or 0):
        return _turned(np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)]), x, y, degrees)
    return Region.box(x, y, x + w, y + h)


def _ellipse(value: Mapping[str, Any], width: int, height: int) -> Region:
    x, y, rx, ry = _percent(value, width, height, "x", "y", "radiusX", "radiusY")
    angles = np.linspace(0, 2 * np.pi, _ELLIPSE, endpoint=False)
    points = np.column_stack((x + rx * np.cos(angles), y + ry * np.sin(angles)))
    return _turned(points, x, y, float(value.get("rotation") or 0))


def _polygon(value: Mapping[str, Any], width: int, height: int) -> Region:
    return Region.polygon(np.array(value["points"], dtype=np.float64) * (width / 100, height / 100))


def _keypoint(value: Mapping[str, Any], width: int, height: int) -> Region:
    x, y = _percent(value, width, height, "x", "y")
    across = value.get("width")
    return Region.point(x, y, float(across) * width / 200 if across else None)


def _brush(value: Mapping[str, Any], width: int, height: int) -> Region:
    pixels = decode_label_studio_rle(value["rle"], width * height * 4)
    return Region.mask(pixels.reshape(height, width, 4)[:, :, 3] > 0)


_LABEL_STUDIO: Final[dict[str, Callable[[Mapping[str, Any], int, int], Region]]] = {
    "rectangle": _rectangle,
    "ellipse": _ellipse,
    "polygon": _polygon,
    "keypoint": _keypoint,
    "brush": _brush,
}


def decode_label_studio_rle(coded: Iterable[int], expected: int) -> NDArray[np.uint8]:
    """The bytes that Label Studio has packed for a brush stroke: of each pixel red, green, blue and opacity.

    The code is a row of bits: 32 for the number of bytes, 5 for the bits of a byte less 1, four times 4 for the bits of
    a run's length less 1. Then runs follow until all bytes are there: 1 bit tells a repeated byte from bytes as they
    are, 2 choose one of the four lengths, the length less 1 comes next, then the one byte or all.

    Args:
        coded: Bytes as numbers from 0 to 255.
        expected: How many bytes the image has.

    Raises:
        ValueError: The code is cut off, or of another number of bytes.
    """
    data = bytes(coded)
    place = 0  # of the next bit

    def read(count: int) -> int:
        nonlocal place
        end = place + count
        if end > 8 * len(data):
            raise ValueError("the code of the brush stroke is cut off")
        window = int.from_bytes(data[place // 8 : (end + 7) // 8], "big") >> (-end % 8)
        place = end
        return window & ((1 << count) - 1)

    number, size = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    if number != expected or number > 4 * MAX_PIXELS:
        raise ValueError(f"expected {expected} bytes for the image of the stroke, got {number}")
    found = np.zeros(number, np.uint8)
    at = 0
    while at < number:
        repeated = read(1)
        end = at + 1 + read(lengths[read(2)])
        if end > number:
            raise ValueError("a run of the brush stroke goes beyond the image")
        found[at:end] = read(size) & 255 if repeated else [read(size) & 255 for _ in range(at, end)]
        at = end
    return found


# ---------------------------------------------------------------------------------------------------------------------
# LabelMe


def read_labelme(paths: Iterable[str | Path], images: str | Path, rejects: Rejects) -> Iterator[Record]:
    """Each of LabelMe's json files as one record.

    Rectangles, polygons, circles, points, lines and masks are read; a line becomes a scribble.

    Args:
        paths: Of the json files, which name their images relative to themselves.
        images: Folder that the records' image paths shall be relative to.
        rejects: Where what cannot be used is noted.

    Raises:
        DataError: A file is missing.
    """
    root = Path(images).resolve()
    for path in map(Path, paths):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"expected a LabelMe file at {path}, got {error.strerror}; check the path") from None
        except (ValueError, RecursionError) as error:
            rejects.add(TRUNCATED, path, "shapes", f"expected a LabelMe file, got {error}")
            continue
        shapes = content.get("shapes") if isinstance(content, dict) else None
        named = content.get("imagePath") if isinstance(content, dict) else None
        if not isinstance(shapes, list) or not isinstance(named, str):
            rejects.add(MALFORMED, path, "shapes", f"expected shapes and imagePath, got {short(content)}")
            continue
        file = (path.parent / named.replace("\\", "/")).resolve()
        if not file.is_relative_to(root):
            rejects.add("image outside the folder", path, named, f"expected it below {root}")
            continue
        try:
            width, height = content.get("imageWidth"), content.get("imageHeight")
            size = (width, height) if is_side(width) and is_side(height) else image_size(file)
        except DataError as error:
            rejects.add("image without size", path, named, str(error))
            continue
        drawn = _Drawn(*size)
        for place, shape in enumerate(shapes):
            _add_shape(drawn, shape, f"shapes[{place}]", str(place), path, rejects)
        if drawn.turns:
            image = file.relative_to(root).as_posix()
            # Two files about one image are two records.
            yield drawn.record(f"labelme/{path.stem}/{image}", "labelme", image)


def _add_shape(drawn: _Drawn, shape: Any, place: str, identity: str, path: Path, rejects: Rejects) -> None:
    if not isinstance(shape, dict):
        rejects.add(MALFORMED, path, place, f"expected a shape, got {short(shape)}")
        return
    kind = shape.get("shape_type") or "polygon"
    label = plain_text(shape.get("label"), "label")
    given = shape.get("description")
    caption = plain_text(given, "caption") if isinstance(given, str) and given.strip() else ""
    if fault := next((text for text in (label, caption) if isinstance(text, Fault)), None):
        rejects.add(fault.kind, path, place, fault.reason)
        return
    if kind not in _LABELME and kind != "mask":
        reason = f"expected one of {', '.join(_LABELME)}, mask, got {short(kind)}"
        rejects.add("shape of another kind", path, place, reason)
        return
    try:
        points = np.array(shape.get("points"), dtype=np.float64).reshape(-1, 2)
        region = _labelme_mask(points, shape, drawn) if kind == "mask" else _LABELME[kind](points)
        drawn.add(region, str(label), str(caption), identity)
    except RegionError as error:
        rejects.add("region that makes no sense", path, place, str(error))
    except Exception as error:  # numbers that are none, and whatever a decoder raises on a broken mask
        rejects.add(MALFORMED, path, place, f"expected the points of a {kind}, got {short(shape)} ({error!r})")


def _corners(points: NDArray[np.float64]) -> Region:
    if len(points) != 2:
        return Region.polygon(points)
    return Region.box(*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def _circle(points: NDArray[np.float64]) -> Region:
    centre, rim = points
    return Region.point(float(centre[0]), float(centre[1]), float(np.hypot(*(rim - centre))))


def _labelme_mask(points: NDArray[np.float64], shape: Mapping[str, Any], drawn: _Drawn) -> Region:
    """A mask's PNG fills the box of its two corners, both of which belong to it."""
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
        window = np.array(image) > 0
    x, y = np.floor(points.min(axis=0)).astype(int).tolist()
    if window.ndim != 2 or x < 0 or y < 0 or x + window.shape[1] > drawn.width or y + window.shape[0] > drawn.height:
        frame = f"{drawn.width} x {drawn.height} pixels (W x H)"
        raise RegionError(f"region: expected a mask within {frame}, got one of shape {window.shape} at {(x, y)}")
    whole = np.zeros((drawn.height, drawn.width), bool)
    whole[y : y + window.shape[0], x : x + window.shape[1]] = window
    return Region.mask(whole)


_LABELME: Final[dict[str, Callable[[NDArray[np.float64]], Region]]] = {
    "polygon": Region.polygon,
    "rectangle": _corners,
    "oriented_rectangle": Region.polygon,
    "circle": _circle,
    "point": lambda points: Region.point(float(points[0, 0]), float(points[0, 1])),
    "line": Region.scribble,
    "linestrip": Region.scribble,
}
