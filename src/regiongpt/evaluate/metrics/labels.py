"""Which name of a closed list an answer gives: as it stands, blanks and one final full stop aside, or forgiven."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from regiongpt.data.wording import plural
from regiongpt.errors import ConfigError, DataError
from regiongpt.storage import read_json

FORGIVEN: Final = ("case", "plural")
"""What can be forgiven by a word: letters of the other case, and the plural for the singular."""


def folded(text: str) -> str:
    """A text without blanks around it and with single ones inside, as the names of categories are read."""
    return " ".join(text.split())


class Reading(NamedTuple):
    """What an answer was taken for: a name, or None where it is off the list; and how.

    ``by`` is ``"as it stands"``, ``"case"``, ``"plural"`` or ``"synonym"``; off the list, what could be forgiven.
    """

    name: str | None
    by: str


class Labels:
    """A closed list of names with what is forgiven of answers.

    Args:
        names: The list, each once.
        synonyms: Words of :data:`FORGIVEN` and paths of JSON files that map synonyms to names, joined by commas.

    Raises:
        ConfigError: The list repeats a name, or ``synonyms`` names neither a word nor a file.
        DataError: A file is no such JSON, or maps to a name that is not on the list.
    """

    def __init__(self, names: Sequence[str], synonyms: str = "") -> None:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ConfigError(f"categories of the same name: {', '.join(repeated)}; rename them")
        words = [word.strip() for word in synonyms.split(",") if word.strip()]
        self._forgiven = {word for word in words if word in FORGIVEN}
        self._known = frozenset(names)
        self._given: dict[str, str] = {}
        for word in words:
            if word not in FORGIVEN:
                self._given |= {_bare(given): name for given, name in _read_synonyms(word, self._known).items()}
        forms = [(name.lower(), name, "case") for name in names]
        forms += [(plural(name), name, "plural") for name in names]
        forms += [(plural(name).lower(), name, "case,plural") for name in names]
        # A form that stands for two names is forgiven for neither; one of a name in two ways by the lesser.
        meant: dict[str, set[str]] = {}
        for form, name, _ in forms:
            meant.setdefault(form, set()).add(name)
        self._forms = {form: (name, by) for form, name, by in reversed(forms) if len(meant[form]) == 1}

    def read(self, text: str) -> Reading:
        """What an answer is taken for."""
        answer = _bare(text)
        for name in (folded(text), answer):  # a name may end in a full stop of its own
            if name in self._known:
                return Reading(name, "as it stands")
        if answer in self._given:
            return Reading(self._given[answer], "synonym")
        name, by = self._forms.get(answer) or self._forms.get(answer.lower(), ("", ""))
        if by == "plural" and answer not in self._forms:  # found in lower case alone
            by = "case,plural"
        return Reading(name if by and set(by.split(",")) <= self._forgiven else None, by)


def _bare(text: str) -> str:
    """An answer folded, and without one final full stop."""
    return folded(text).removesuffix(".").strip()


def _read_synonyms(word: str, names: frozenset[str]) -> Mapping[str, str]:
    if not Path(word).is_file():
        raise ConfigError(f"synonyms: {word!r} is no file, nor one of {', '.join(FORGIVEN)}")
    content = read_json(word)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise DataError(f'{word}: not a JSON object such as {{"bike": "bicycle"}}')
    for given, name in content.items():
        if name not in names:
            raise DataError(f"{word}: {name!r}, for {given!r}, is no category")
    return content
