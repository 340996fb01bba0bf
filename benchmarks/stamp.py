"""What every benchmark records beside its results: code, machine, packages, date, arguments and file hashes."""

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regiongpt.environment import commit, machine, versions
from regiongpt.storage import sha256


def stamp(arguments: Mapping[str, Any], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Say where figures come from.

    Args:
        arguments: parsed arguments of the command.
        files: name -> file or folder that the figures depend on; None is left out.

    Returns:
        ``commit``, ``date`` (UTC), ``command``, ``arguments``, ``machine``, ``packages`` and ``files``: for each name
        its SHA-256, for a folder one for each file in it.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": Path(sys.argv[0]).name,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "machine": machine(),
        "packages": {"python": platform.python_version(), **versions()},
        "files": {name: _hashes(path) for name, path in files.items() if path is not None},
    }


def _hashes(path: Path) -> str | dict[str, str]:
    if path.is_dir():
        return {each.name: sha256(each) for each in sorted(path.iterdir()) if each.is_file()}
    return sha256(path)
