"""The benchmark of many regions, run as small as it goes."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("many_regions", BENCHMARKS / "many_regions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "many_regions", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_all_ways_run_and_are_written(module, tmp_path):
    small = ["--models", "nano", "--regions", "1", "2", "--tokens", "2", "--alone", "1"]
    small += ["--choice-regions", "1", "--many-choices", "20", "--int8"]
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    assert module.main([*small, "--device", "cpu", "--out", str(out), "--plot", str(picture)]) == 0
    found = json.loads(out.read_text())
    rows = found["results"]["nano"]["generation"]
    assert [row["regions"] for row in rows] == [1, 2]
    assert all(row["seconds"][way] > 0 for row in rows for way in ("alone", "copied", "shared"))
    assert found["results"]["nano"]["choices"]["many"]["names"] == 20
    assert all(row["machine"]["flops"] > 0 and math.isfinite(row["share_of_limit"]) for row in rows)
    assert picture.stat().st_size > 0
