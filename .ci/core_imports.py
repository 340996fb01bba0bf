"""Import every module of the package as if only its core dependencies were installed.

A second environment with the core alone would take minutes to fill. Hiding everything else from the import system of
this one shows the same mistakes: a module of an optional extra, or of the development tools, imported at the top of a
file.
"""

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "regiongpt"


def required_by(package: str) -> set[str]:
    """Names of the distributions that come with a package installed without extras, itself included."""
    found: set[str] = set()
    pending: list[tuple[str, frozenset[str]]] = [(package, frozenset())]
    while pending:
        name, extras = pending.pop()
        name = canonicalize_name(name)
        if name in found and not extras:
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform, or already part of another package
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                pending.append((requirement.name, frozenset(requirement.extras)))
    return found


def hide(modules: set[str]) -> None:
    """Make the path finder not find these top-level modules, as if they were not installed."""

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
            if fullname.partition(".")[0] in modules:
                return None
            return super().find_spec(fullname, path, target)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder


def main() -> int:
    """Print what was imported; 1 if anything was not."""
    core = required_by(PACKAGE)
    homes = metadata.packages_distributions()
    hidden = {
        module
        for module, distributions in homes.items()
        if not core & {canonicalize_name(distribution) for distribution in distributions}
    }
    hidden -= set(sys.stdlib_module_names)
    hide(hidden)
    package = import_module(PACKAGE)
    names = [PACKAGE, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."))]
    # The server is all of an extra; its options alone are read without it.
    names = [name for name in names if not name.startswith("regiongpt.serve.") or name.endswith(".options")]
    failed = 0
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    print(f"{len(names) - failed} of {len(names)} modules imported with {len(core)} distributions seen, rest hidden")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
