"""Help and mistakes of ``train`` and ``ablate`` are answered before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regiongpt.cli import main
from regiongpt.train.recipe import Recipe

SCRIPT = """
import json, sys
from regiongpt.cli import main
codes = []
for words in json.loads(sys.argv[1]):
    try:
        codes.append(main(words))
    except SystemExit as stop:
        codes.append(stop.code)
print(json.dumps([codes, sorted({"torch", "transformers"} & set(sys.modules))]))
"""
MISTAKES = [
    "train",
    "train table6_non",
    "train /etc",
    "train finetune_records --stage2.epoch 8",
    "train finetune_records --stage2.lr 1e30",
    "train finetune_records --gpus 8",
    "train finetune_records --schema",
    "train --schema --plan",
    "train --report nowhere",
    "train finetune_records --data.mixture nowhere",
    "train finetune_records --data.mixture . --model.init nowhere",
    "train finetune_records --data.mixture nowhere.toml --data.root .",
    "train finetune_records --model.init nowhere --data.mixture .",
    "train vicuna7b_stage2 --data.root .",
    "ablate",
    "ablate nothing nano --out x",
    "ablate refinement nano --out x --data.root nowhere",
    "ablate refinement nano --out x --variants cubic,none",
    "ablate refinement nano --out x --eval.limits 3",
    "ablate refinement nano --out x --stage2.lr nan",
    "ablate refinement nano --out x --debug --task pope",
]


def test_help_and_mistakes_load_nothing_heavy(tmp_path: Path) -> None:
    calls = [["train", "--help"], ["ablate", "--help"], ["train", "--schema"], *(line.split() for line in MISTAKES)]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    codes, heavy = json.loads(ran.stdout.splitlines()[-1])
    assert codes == [0, 0, 0, *[2] * len(MISTAKES)]
    assert heavy == []
    assert len(ran.stderr.splitlines()) == len(MISTAKES)
    assert all(line.startswith("regiongpt: error: ") for line in ran.stderr.splitlines())


def test_the_schema_describes_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() == Recipe.model_fields.keys()
    assert "cosine" in schema["$defs"]["StageConfig"]["properties"]["lr"]["description"]
