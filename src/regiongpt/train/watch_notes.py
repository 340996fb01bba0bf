"""What a run was made of, noted where its report is made from: recipe, data, versions, machine, each start."""

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regiongpt.data.mixture import Mixture
from regiongpt.environment import commit, launched, machine, versions
from regiongpt.errors import DataError

if TYPE_CHECKING:
    from regiongpt.train.recipe import Recipe

RUN = "run.json"


def note_run(out: Path, config: "Recipe", data: Mapping[str, Any]) -> None:
    """Notes a start of a run, the first or a later one, in its folder.

    Args:
        out: Folder of the run.
        config: Its recipe.
        data: What each stage learns from: :func:`data_of` for a mixture, else any plain values.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        starts = list(read_notes(out).get("starts", []))
    except DataError:  # torn by a kill, and worth less than the run
        starts = []
    starts.append(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "processes": launched(),
            "machine": machine(),
            "packages": {"python": sys.version.split()[0], **versions()},
            "commit": commit(),
        }
    )
    notes = {"config": config.model_dump(mode="json"), "data": dict(data), "starts": starts}
    beside = out / f"{RUN}.tmp"
    beside.write_text(json.dumps(notes, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    os.replace(beside, out / RUN)


def read_notes(out: Path) -> dict[str, Any]:
    """The notes of a run; empty where there are none.

    Raises:
        DataError: They are not what was written.
    """
    path = Path(out) / RUN
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected the notes of a run, got {error}; delete the file") from None
    if not isinstance(notes, dict):
        raise DataError(f"{path}: expected the notes of a run, got {type(notes).__name__}; delete the file")
    return notes


def data_of(mixture: Mixture) -> dict[str, Any]:
    """What a mixture holds: of each part its manifest, and how many of its records make an epoch."""
    parts = []
    for part in mixture.parts:
        manifest = part.records.manifest
        parts.append(
            {
                "folder": str(part.records.folder),
                "source": manifest.source,
                "records an epoch": part.per_epoch,
                "counts": manifest.counts,
                "left out": manifest.rejects,
                "arguments": manifest.arguments,
                "inputs": manifest.inputs,
                "shards": manifest.shards,
                "converted by": f"regiongpt {manifest.regiongpt_version}",
            }
        )
    return {"records an epoch": len(mixture), "seed": mixture.seed, "parts": parts}
