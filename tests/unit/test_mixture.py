"""Mixtures of records: how many of each part an epoch holds, in which order, and what a wrong file is told."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from converting import record

from regiongpt.data.records import Turn
from regiongpt.data.shards import (
    Mixture,
    MixtureConfig,
    MixturePart,
    RecordSet,
    Rejects,
    find_parts,
    open_mixture,
    write_records,
)
from regiongpt.data.sources import load_converter
from regiongpt.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
BOTH = '[[parts]]\nrecords = "small"\nweight = 2\n[[parts]]\nrecords = "large"\ncap = 12\n'


def write(folder: Path, count: int, image: str = "a.png") -> Path:
    """A folder of ``count`` records of one turn."""
    turns = (Turn(task="chat", question="Hi", answer="Yo"),)
    records = [record(str(k), image=image, turns=turns, source=folder.name) for k in range(count)]
    write_records(folder, records, Rejects(), source="jsonl", images="images", inputs=[], arguments={})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("records")
    for name, count in (("small", 7), ("large", 40), ("talk", 3)):
        write(root / name, count, "" if name == "talk" else "a.png")
    return root


def mixture(folders: Path, text: str = BOTH, seed: int = 0) -> Mixture:
    path = folders / "mixture.toml"
    path.write_text(text)
    return open_mixture(path, seed=seed)


def ids(mixed: Mixture, epoch: int) -> list[str]:
    items = range(epoch * len(mixed), (epoch + 1) * len(mixed))
    return [mixed.draw(item).record().id for item in items]


def test_weights_and_caps_are_exact(folders: Path) -> None:
    mixed = mixture(folders)
    assert len(mixed) == 2 * 7 + 12
    counts = Counter(ids(mixed, 0))
    assert [counts[f"small/{number}"] for number in range(7)] == [2] * 7
    assert sorted(count for name, count in counts.items() if name.startswith("large")) == [1] * 12
    assert mixed.report() == "26 records an epoch: small 14 of 7, large 12 of 40"


@pytest.mark.parametrize(
    ("part", "length"),
    [('"small"\ncap = 100', 7), ('"large"\nweight = 0.25', 10), ('"large"\nweight = 0.5\ncap = 5', 5),
     ('"small"\nweight = 0.001', 1)],
)  # fmt: skip
def test_a_cap_above_the_number_of_records_and_a_share_of_them(folders: Path, part: str, length: int) -> None:
    assert len(mixture(folders, f"[[parts]]\nrecords = {part}\n")) == length


def test_what_an_epoch_leaves_out_comes_before_anything_comes_again(folders: Path) -> None:
    mixed = mixture(folders)
    seen = Counter[str]()
    for epoch in range(10):  # three passes over the large part, in tens of a dozen
        for item in range(epoch * len(mixed), (epoch + 1) * len(mixed)):
            drawn = mixed.draw(item)
            name = drawn.record().id
            if epoch == 3:
                assert name.startswith("small") or drawn.times in (0, 1)
            seen[name] += 1
        large = [seen[f"large/{number}"] for number in range(40)]
        assert max(large) - min(large) <= 1
    assert {seen[f"large/{number}"] for number in range(40)} == {3}


def test_the_order_is_of_the_seed_and_the_epoch_alone(folders: Path) -> None:
    first, second, other = mixture(folders), mixture(folders), mixture(folders, seed=1)
    second.draw(100)  # what was drawn before does not matter
    assert ids(first, 2) == ids(second, 2)
    assert ids(first, 0) != ids(first, 1)
    assert ids(first, 0) != ids(other, 0)
    assert first.identity() == second.identity() != other.identity()


def test_a_folder_of_records_is_a_mixture_of_its_own(folders: Path) -> None:
    mixed = open_mixture(folders / "small")
    assert sorted(ids(mixed, 0)) == [f"small/{number}" for number in range(7)]


def test_paths_are_relative_to_the_root_and_images_can_have_moved(folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixture.toml"
    path.write_text('[[parts]]\nrecords = "small"\nimages = "elsewhere"\n')
    drawn = open_mixture(path, root=folders).draw(0)
    assert drawn.records.image_path(drawn.record()) == folders / "elsewhere" / "a.png"
    for root in ("", folders / "none"):
        with pytest.raises(DataError, match=r"mixture.toml: .*small: no finished records"):
            open_mixture(path, root=root)


def test_records_without_an_image_are_counted(folders: Path) -> None:
    assert MixturePart(RecordSet(folders / "talk")).without_image() == 3
    assert MixturePart(RecordSet(folders / "small")).without_image() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts = []", "parts: .*at least 1"),
        ('[[part]]\nrecords = "a"', "unknown setting 'part'; did you mean 'parts'"),
        ('[[parts]]\nrecords = "a"\nweigth = 2', r"'parts\.0\.weigth'; did you mean 'parts\.0\.weight'"),
        ('[[parts]]\nrecords = ""', r"parts\.0\.records"),
        ('[[parts]]\nrecords = "a"\nweight = nan', r"parts\.0\.weight"),
        ('[[parts]]\nrecords = "a"\ncap = 1.5', r"parts\.0\.cap"),
        ('[[parts]]\nrecords = "a"\n[[parts]]\nrecords = "a"', "parts: 'a' is listed more than once; give it a weight"),
    ],
)
def test_a_wrong_file_ends_in_one_line_that_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_parts(path)


def commands(path: Path) -> list[list[str]]:
    """The words of each ``regiongpt convert`` in a file's comments."""
    text = re.sub(r"^#", "", path.read_text(), flags=re.MULTILINE)
    return [shlex.split(found) for found in re.findall(r"^ {5}regiongpt convert (.*(?:\n {9}.*)*)", text, re.MULTILINE)]


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_papers_mixtures_are_read_and_their_commands_have_these_options(name: str) -> None:
    path = ROOT / "configs" / "data" / f"{name}.toml"
    parts = MixtureConfig.load(path).parts
    assert all(part.weight == 1 and part.cap == 0 for part in parts)  # the paper limits boxes, not records
    given = commands(path)
    assert [words[-1] for words in given] == [f"ROOT/{part.records}" for part in parts]
    for source, *words in given:
        fields = load_converter(source).model_fields
        options = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
        assert options - {"out"} <= fields.keys()
        assert {name for name, field in fields.items() if field.is_required()} <= options
    limits = {words[0]: " ".join(words) for words in given}
    assert f"--boxes-per-category {10 if name == 'finetune' else 100} " in limits["v3det"]
    assert "--boxes-per-image 10 " in limits["vg"]
    assert name == "pretrain" or "--boxes-per-category 20 " in limits["coco"]
