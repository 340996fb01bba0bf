"""Which name of a closed list an answer gives, and how that is forgiven.

By itself an answer counts only if it is a name of the list as it stands, blanks and one final full stop aside. Whatever
is forgiven besides is asked for by name, and counted.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from regiongpt.data.wording import plural
from regiongpt.errors import ConfigError, DataError

FORGIVEN: Final = ("case", "plural")
"""What can be forgiven by a word: letters of the other case, and the plural for the singular."""


def folded(text: str) -> str:
    """A text without blanks around it and with single ones inside, as the names of categories are read."""
    return " ".join(text.split())


def bare(text: str) -> str:
    """An answer likewise, and without one final full stop."""
    return folded(text).removesuffix(".").strip()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an answer was taken for.

    Attributes:
        name: A name of the list, None where the answer is off it.
        by: ``"as it stands"``, ``"case"``, ``"plural"`` or ``"synonym"``; where it is off the list, what would have
            been forgiven had it been asked for, or ``""``.
    """

    name: str | None
    by: str


class Labels:
    """A closed list of names with what is forgiven of answers.

    Args:
        names: The list, none of them twice.
        synonyms: ``""`` forgives nothing. Otherwise words of :data:`FORGIVEN` and paths of json files that map
            synonyms to names, joined by commas.

    Raises:
        ConfigError: The list repeats a name, or ``synonyms`` names neither a word nor a file.
        DataError: A file is no such json, or maps to a name that is not on the list.
    """

    def __init__(self, names: Sequence[str], synonyms: str = "") -> None:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ConfigError(f"expected different category names, got {', '.join(repeated)} more than once")
        self.names = tuple(names)
        self.synonyms = synonyms
        words = [word.strip() for word in synonyms.split(",") if word.strip()]
        self.forgiven = frozenset(word for word in words if word in FORGIVEN)
        self._given = {
            bare(given): name
            for word in words
            if word not in FORGIVEN
            for given, name in _synonyms(Path(word), set(names)).items()
        }
        self._known = frozenset(names)
        self._forms = _unambiguous(
            [(name.lower(), name, "case") for name in names]
            + [(plural(name), name, "plural") for name in names]
            + [(plural(name).lower(), name, "case,plural") for name in names]
        )

    def read(self, text: str) -> Reading:
        """What an answer is taken for."""
        if folded(text) in self._known:  # a name may end in a full stop of its own
            return Reading(name=folded(text), by="as it stands")
        answer = bare(text)
        if answer in self._known:
            return Reading(name=answer, by="as it stands")
        if answer in self._given:
            return Reading(name=self._given[answer], by="synonym")
        name, by = self._forms.get(answer) or self._forms.get(answer.lower(), ("", ""))
        if by and answer != answer.lower() and answer not in self._forms and "case" not in by:
            by = f"case,{by}"
        forgiven = bool(by) and set(by.split(",")) <= self.forgiven
        return Reading(name=name if forgiven else None, by=by)


def _unambiguous(forms: Sequence[tuple[str, str, str]]) -> dict[str, tuple[str, str]]:
    """Forms that stand for one name alone, the least forgiving way of reading each."""
    found: dict[str, tuple[str, str]] = {}
    meant: dict[str, set[str]] = {}
    for form, name, by in forms:
        meant.setdefault(form, set()).add(name)
        found.setdefault(form, (name, by))
    return {form: kept for form, kept in found.items() if len(meant[form]) == 1}


def _synonyms(path: Path, names: set[str]) -> Mapping[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"synonyms: expected {', '.join(FORGIVEN)} or the path of a json file, got {str(path)!r} ({error.strerror})"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: expected json, got {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise DataError(f'{path}: expected a json object such as {{"bike": "bicycle"}}, got another form')
    for given, name in content.items():
        if name not in names:
            raise DataError(f"{path}: expected synonyms of category names, got {name!r} for {given!r}")
    return content
