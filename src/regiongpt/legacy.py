"""What earlier versions wrote and this one still reads. Each function says when it may go."""

import json
from pathlib import Path
from typing import Any

from regiongpt.errors import DataError
from regiongpt.storage import reason


def read_answers(folder: Path) -> dict[str, Any]:
    """The answers by key that version 0.1 kept in ``FOLDER/*.jsonl``; a line that a kill cut short is passed over.

    May go with version 0.3: nobody will then finish an evaluation that version 0.1 began.

    Raises:
        DataError: A file cannot be read.
    """
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {reason(error)}") from None
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
                found[str(row["key"])] = dict(row["answer"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    return found
