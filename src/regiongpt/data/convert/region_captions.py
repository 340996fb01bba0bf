"""This project's own region captions: detailed descriptions of regions, as the caption engine writes them.

Paper: §3.3
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import Fault, check_image
from regiongpt.data.convert.jsonl import iter_lines
from regiongpt.data.convert.values import MALFORMED, image_fault, is_side, plain_text, short
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects
from regiongpt.errors import RegionError
from regiongpt.regions import Region


class RegionCaptionsConverter(Converter):
    """One record a line, each line one described region as a json object.

    ``id``: text or a whole number, unique in the file.
    ``image``: path below the images' folder, with forward slashes.
    ``width``, ``height``: of the image in pixels.
    ``region``: in the form of :meth:`regiongpt.Region.to_dict`, in pixels of the image: ``{"box": [10, 20, 60, 80]}``.
    ``category``: the name of the region's class, ``""`` or missing where it has none.
    ``caption``: the description.

    Further keys, such as those of a caption engine's scores, are not looked at.
    """

    name: ClassVar[str] = "region_captions"
    summary: ClassVar[str] = "this project's own detailed descriptions of regions"
    sound_regions: ClassVar[bool] = True

    data: Path
    """The file of json lines."""
    check_images: bool = True
    """Leave out images that are missing or of another size."""

    def inputs(self) -> list[Path]:
        """The one file."""
        return [self.data]

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One record a line, in the order of the file."""
        seen: set[str] = set()
        for number, entry in iter_lines(self.data, rejects):
            found = self._record(entry)
            if isinstance(found, Record) and found.id in seen:
                found = Fault("duplicate id", f"expected each id once, got {short(entry['id'])} again")
            if isinstance(found, Fault):
                rejects.add(found.kind, self.data, number, f"{self.data.name}:{number}: {found.reason}")
            else:
                seen.add(found.id)
                yield found

    def _record(self, entry: Mapping[str, Any]) -> Record | Fault:
        own, width, height = entry.get("id"), entry.get("width"), entry.get("height")
        if not isinstance(own, str | int) or own == "":
            return Fault(MALFORMED, f"expected an id, got {short(own)}")
        if not (is_side(width) and is_side(height)):
            return Fault(MALFORMED, f"expected width and height as whole numbers, got {short((width, height))}")
        category, caption = entry.get("category") or "", plain_text(entry.get("caption"), "caption")
        if not isinstance(category, str):
            return Fault(MALFORMED, f"expected category as text, got {short(category)}")
        if isinstance(caption, Fault):
            return caption
        if fault := image_fault(entry.get("image")):
            return fault
        try:
            region = Region.from_dict(entry.get("region") or {}).check(width, height)
        except RegionError as error:
            return Fault("region that makes no sense", str(error))
        if self.check_images and (fault := check_image(self.images / entry["image"], width, height)):
            return fault
        return Record(
            id=f"{self.name}/{own}",
            source=self.name,
            image=entry["image"],
            width=width,
            height=height,
            regions=(RecordRegion(region=region, category=category),),
            turns=(Turn(task="describe", answer=caption, regions=(1,)),),
        )
