"""Writes the measured results of docs/results.md from folders that ``regiongpt evaluate`` and ``ablate`` have written.

    python benchmarks/results_doc.py --runs runs/eval --ablations runs/ablate/refinement runs/ablate/prompt

What stands between the two marks in the document is replaced; the rest is left as it is. Every table carries the
commit, checkpoint and annotations that its numbers come from, so that the document can be made again and compared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regiongpt.ablate import cell_text
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.evaluate.report import TaskRun, markdown, printed_rows, read_run, tables
from regiongpt.evaluate.task import TABLES
from regiongpt.storage import read_json

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOT_SHOWN = ("AP50", "AP75")  # with given boxes they are AP to a few tenths
NOT_COMPARED = (*NOT_SHOWN, "class_average")
BY_SIZE = "score all choices"  # the only protocol with AP by size
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"


def task_section(run: TaskRun) -> str:
    """One benchmark: every protocol, beside the paper's results in their own column."""
    # The protocols' rules are in docs/evaluation.md.
    conditions = "; ".join(f"{name}: {text}" for name, text in run.result["pinned"].items() if "protocol" not in name)
    parts = [f"### {run.result['task']}", conditions + "."]
    same: dict[str, list[tuple[str, list[list[str]]]]] = {}  # protocols of the same results in one table
    for protocol, cells in tables(run):
        same.setdefault(str([row[:4] for row in cells[1:]]), []).append((protocol, cells))
    seen: list[list[str]] = []
    for each in same.values():
        cells = max((cells for _, cells in each), key=lambda cells: len(cells[0]))  # the one with the paper's
        head = ["result", "measured", "95 %", "items", "paper, on other data"][: len(cells[0])]
        body = [
            row
            for row in cells[1:]
            if row[0] not in NOT_SHOWN
            and not (len(row) == 4 and row in seen)  # as an earlier protocol, and without a result of the paper
            and not (each[0][0] != BY_SIZE and row[0].startswith("AP_"))
            and row[1:3] != ["0.0", "0.0 to 0.0"]
        ]
        seen += [row[:4] for row in body]
        parts.append(f"**{'; '.join(protocol for protocol, _ in each)}**\n\n{markdown([head, *body])}")
    if paper := run.result.get("paper"):
        parts.append(f"Paper: {paper}. Another data set is another test.")
    parts += [f"- {note}" for note in run.result["notes"]]
    return "\n\n".join([*parts, origin(run.manifest)])


def origin(manifest: dict[str, Any]) -> str:
    """One line: checkpoint, commit, files."""
    model, commit = manifest.get("model"), manifest["code"].get("commit") or {}
    weights = model["files"].get("model.safetensors", "") if model else ""
    made = f"model {model['name']}{f', weights {weights[:12]}' if weights else ''}" if model else "predictions"
    files = ", ".join(f"{each['name']} {each['sha256'][:12]}" for each in manifest["inputs"])
    changed = " with changes" if commit.get("changed") else ""
    return f"From {made}; commit {commit.get('hash', 'unknown')[:12]}{changed}; {files}; {manifest['date']}."


def ablation_section(folder: Path) -> str:
    """One ablation: means over the seeds, and differences from the first variant."""
    found = read_json(folder / "result.json")
    if "ablation" not in found:
        raise DataError(f"{folder}: expected the folder of `regiongpt ablate`, found another result.json")
    names = [variant["name"] for variant in found["variants"]]
    parts = [
        f"### Ablation: {found['ablation']}",
        f"{found['task']}, {found['items']:,} items; seeds {', '.join(map(str, found['seeds']))}; 95 % intervals in "
        f"brackets, then the difference from {names[0]}.",
    ]
    seen = []
    for protocol, results in found["protocols"].items():
        rows = [[result, *(cell_text(cells[name]) for name in names)] for result, cells in results.items()]
        body = [
            row
            for row in rows
            if row not in seen
            and row[0] not in NOT_COMPARED
            and not (protocol != BY_SIZE and row[0].startswith("AP_"))
            and not (row[0] == "valid_answers" and all(each.startswith("100.0") for each in row[1:]))
        ]
        seen += rows
        parts.append(f"**{protocol}**\n\n{markdown([['result', *names], *body])}")
    printed = TABLES.get(found["ablation"])
    if printed is not None:
        parts.append(f"The paper's {printed.number}, on {printed.data}:\n\n{markdown(printed_rows(printed))}")
    first = next(iter(found["manifests"].values()))[0]
    return "\n\n".join([*parts, origin(first)])


def document(text: str, sections: Sequence[str]) -> str:
    """The document with other results between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"expected a document with {BEGIN} and {END}, found one of them missing")
    body = "\n\n".join(sections)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], metavar="DIR", help="of `regiongpt evaluate`")
    parser.add_argument("--ablations", type=Path, nargs="*", default=[], metavar="DIR", help="of `regiongpt ablate`")
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="FILE", help="default: docs/results.md")
    options = parser.parse_args(argv)
    try:
        sections = [task_section(run) for folder in options.runs for run in read_run(folder)]
        sections += [ablation_section(folder) for folder in options.ablations]
        if not sections:
            raise DataError("expected --runs or --ablations with at least one folder, got none")
        text = document(options.document.read_text(encoding="utf-8"), sections)
    except (RegionGPTError, OSError) as error:
        print(f"results_doc: error: {error}", file=sys.stderr)
        return 2
    options.document.write_text(text, encoding="utf-8")
    print(f"{len(sections)} sections written to {options.document}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
