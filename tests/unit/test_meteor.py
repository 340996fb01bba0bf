"""METEOR's program: what it counts, and every way in which it can let us down."""

import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from java import need_java, need_pycocoevalcap

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.captions import caption_scores
from regiongpt.evaluate.metrics.meteor import COUNTS, find_java, meteor_addends, meteor_counts, meteor_scores

# What METEOR 1.5 printed for "a red bear" and "the red bear on a table" against "a red bears on the table", for the
# empty caption, and for 12 words against 7.
PRINTED = np.array(
    [
        [6, 6, 3, 3, 2, 2, 3, 3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 6, 6],
        [0, 3, 0, 1, *[0] * 19],
        [12, 7, 4, 2, 4, 4, 1, 1, *[0] * 12, 2, 5, 5],
    ],
    float,
)
COUNT_LINE = "6 6 3 3 2 2 3 3 1 1 0 0 0 0 0 0 0 0 0 0 4 6 6"


def fake_java(folder: Path, body: str) -> dict[str, object]:
    """A program in the place of Java, and a jar that is none."""
    program = folder / "java"
    program.write_text(f"#!{sys.executable}\nimport sys, time, os\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    jar = folder / "meteor-1.5.jar"
    jar.touch()
    return {"java": str(program), "jar": jar}


def test_scores_follow_from_the_counts() -> None:
    assert meteor_scores(PRINTED)[2] == pytest.approx(0.34885174167642846, abs=1e-12)
    assert meteor_scores(PRINTED)[1] == 0
    whole = np.array([[3, 3, 1, 1, 2, 2, 1, 1, *[0] * 12, 1, 3, 3]], float)
    assert meteor_scores(whole)[0] == 1
    assert meteor_addends(whole)[0, 20] == 0


def test_a_batch_of_50_000_goes_through(tmp_path: Path) -> None:
    # It answers each line with many more bytes than it reads, and complains at length: both pipes would fill.
    body = f"for line in sys.stdin:\n    print('{COUNT_LINE}'); sys.stderr.write('warning ' * 20 + chr(10))"
    given = fake_java(tmp_path, body)
    found = meteor_counts(["a dog"] * 50_000, [["a dog", "the dog"]] * 50_000, **given)  # type: ignore[arg-type]
    assert found.shape == (50_000, COUNTS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "sys.stderr.write('Error: no memory'); sys.exit(3)",
            "caption 1 of 5, but Java ended with code 3: .*no memory",
        ),
        (f"print('{COUNT_LINE}', flush=True); sys.exit(1)", "caption 2 of 5, but Java ended with code 1"),
        ("print('Error: specify hypothesis')", "expected 23 numbers for caption 1 of 5, got 'Error"),
        (f"print('{COUNT_LINE}'.replace('6', 'nan'))", "expected 23 numbers for caption 1 of 5"),
        ("while True: pass", r"got none in 0\.5 s"),
        ("os.close(0); time.sleep(60)", r"got none in 0\.5 s"),
    ],
    ids=["dies at once", "dies later", "says something else", "says no numbers", "goes on forever", "hangs"],
)
def test_a_program_that_fails_is_an_error_and_no_hang(tmp_path: Path, body: str, message: str) -> None:
    given = fake_java(tmp_path, body)
    with pytest.raises(ConfigError, match=message):
        meteor_counts(["a dog"] * 5, [["a dog"]] * 5, patience=0.5, **given)  # type: ignore[arg-type]


def test_a_program_that_works_is_waited_for(tmp_path: Path) -> None:
    # Kept waiting by others, it works little at a time, and says nothing for longer than one may stand still.
    work = "end = time.process_time() + 0.02\n    while time.process_time() < end: pass\n    time.sleep(0.1)"
    given = fake_java(tmp_path, f"for _ in range(12):\n    {work}\nprint('{COUNT_LINE}')")
    assert meteor_counts(["a"], [["a"]], patience=0.5, **given).shape == (1, COUNTS)  # type: ignore[arg-type]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"references\[1\]: expected at least one"):
        meteor_counts(["a", "b"], [["a"], []], java=sys.executable)
    with pytest.raises(ConfigError, match="expected METEOR at"):
        meteor_counts(["a"], [["a"]], java=sys.executable, jar=tmp_path / "none.jar")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"expected Java .* install a Java runtime"):
        find_java()


@pytest.mark.slow
def test_the_program_itself_counts_odd_captions() -> None:
    need_java()
    need_pycocoevalcap()
    captions = ["a red bears on the table", "", "a | b ||| c", "SCORE ||| x", "caf\u00e9"]
    references = [["a red bear", "the red bear on a table"], ["a red bear"], ["a b"], ["x"], ["caf\u00e9"]]
    found = meteor_counts(captions, references)
    assert found[:2].tolist() == PRINTED[:2].tolist()
    assert meteor_scores(found)[4] == 1


def test_captions_without_references_or_words_are_refused() -> None:
    need_pycocoevalcap()
    with pytest.raises(DataError, match=r"references\[1\]: expected a reference with at least one word"):
        caption_scores(["a", "b"], [["a dog"], ["...", ""]], metrics=("ROUGE_L",))
    with pytest.raises(DataError, match="expected as many captions as items"):
        caption_scores([], [], metrics=("ROUGE_L",))
    with pytest.raises(ConfigError, match="got 'Meteor'"):
        caption_scores(["a"], [["a"]], metrics=("Meteor",))


def test_spice_says_what_it_lacks() -> None:
    need_java()
    lib = need_pycocoevalcap("spice", "lib")
    if (lib / "stanford-corenlp-3.6.0.jar").is_file():
        pytest.skip("SPICE's parser is installed here")
    with pytest.raises(ConfigError, match=r"stanford-corenlp-3\.6\.0\.jar"):
        caption_scores(["a"], [["a dog"]], metrics=("SPICE",))
