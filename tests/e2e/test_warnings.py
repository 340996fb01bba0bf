"""The README's examples and commands use nothing that a library is about to take away."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

ROOT = Path(__file__).parents[2]
EXAMPLES = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL))
BOX = ["--box", "40,60,300,280"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["-c", EXAMPLES], ["-m", "regiongpt.cli", "ask", "photo.jpg", "What is <region1>?", *BOX]],
    ids=["the examples", "ask"],
)
def test_nothing_deprecated_is_used(arguments: list[str], tmp_path: Path) -> None:
    Image.fromarray(data.chelsea()).save(tmp_path / "photo.jpg")
    refused = ["-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
    run = subprocess.run(
        [sys.executable, *refused, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "deprecated" not in run.stderr.lower()  # libraries also say so in their logs
