"""Print, as constraints for pip, the lowest release that pyproject.toml allows of every core dependency but PyTorch.

PyTorch is installed before the others: releases of it are gigabytes, so another is tried by ``TORCH=torch==...``.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for line in project["dependencies"]:
    name, lowest = re.fullmatch(r"([\w.-]+)[=>]=([\d.]+).*", line).groups()
    if name != "torch":
        print(f"{name}=={lowest}" + ("" if lowest.count(".") == 2 else ".*"))
