"""Captions of RefCOCOg's objects, against the expressions that people referred to them by.

Paper: §4.2, Table 4
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, Literal

from regiongpt.evaluate.paper import TABLES
from regiongpt.evaluate.tasks.captioning import PROTOCOL, CaptionTask, Described
from regiongpt.evaluate.tasks.refcocog_files import RefCocogFiles, each_expression

GROUPINGS: Final = {
    "object": "all expressions of an object are the references of its one caption",
    "expression": "each expression is an item of its own, with itself as its only reference",
}


class RefCocogCaption(CaptionTask):
    """One caption an object, or with ``grouping`` set to ``expression`` one for each of its expressions.

    Published figures use both groupings and seldom say which.
    """

    name: ClassVar[str] = "refcocog_caption"
    summary: ClassVar[str] = "captions of RefCOCOg's objects: METEOR and CIDEr (Table 4)"
    item_id: ClassVar[str] = "annotation id"
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        PROTOCOL: {
            "METEOR": TABLES["refcocog_caption"].figure("METEOR") / 100,
            "CIDEr": TABLES["refcocog_caption"].figure("CIDEr") / 100,
        }
    }
    paper_source: ClassVar[str] = "Table 4, RefCOCOg; the paper names neither split nor grouping of the references"

    split: str = "val"
    """Split of a refs(...).p; a json holds one split, which this names."""
    refs: Path | None = None
    """refs(umd).p, a json in COCO's layout or json lines, wherever it is."""
    instances: Path | None = None
    """instances.json of the data set, wherever it is."""
    images: Path | None = None
    """Folder of the images, wherever it is."""
    grouping: Literal["object", "expression"] = "object"
    """How references are grouped: those of an object together, or each expression by itself."""

    @property
    def _files(self) -> RefCocogFiles:
        return RefCocogFiles(self.data, self.refs, self.instances, self.images)

    @property
    def split_read(self) -> str:
        """Of ``refs(...).p``."""
        return self._files.split_read(self.split)

    def inputs(self) -> list[Path]:
        """Expressions and objects."""
        return self._files.inputs

    def pinned(self) -> dict[str, str]:
        """Partition, split and grouping."""
        files = self._files
        split = self.split_read or files.refs.name
        return {"split": f"RefCOCOg {files.partition} {split}", "references": GROUPINGS[self.grouping]}

    def regions_described(self) -> list[Described]:
        """One an object or an expression, in the order of the file."""
        files = self._files
        objects, folder = files.objects(self.split, self.left_out), files.folder
        if self.grouping == "object":
            asked = [(str(each.ann_id), each, [text for _, text in each.expressions]) for each in objects]
        else:
            asked = [(str(number), each, [text]) for each, number, text in each_expression(objects)]
        return [
            Described(number, folder / each.file, each.image_id, each.size, each.box, said, each.category)
            for number, each, said in asked
        ]
