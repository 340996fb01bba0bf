r"""A lexer made of rules: the rule with the longest match wins, of two as long the earlier one.

Python's ``re`` takes the first alternative that fits, not the longest, so a grammar written for a lexer generator reads
differently there. Here all rules become one finite automaton, whose states are made when a text first needs them.

Patterns are written as in ``re``, with ``| * + ? {m,n} ( ) [ ] [^ ]``; ``{NAME}`` is another pattern of the grammar,
and ``\l``, ``\d``, ``\u`` are the classes that the grammar names so. Letters outside brackets match both cases, inside
brackets only their own. A rule may ask for what follows the token, which counts for the length of its match.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

Ranges = tuple[tuple[int, int], ...]
"""Inclusive ranges of code units, in order."""
_TOP: Final = 0xFFFF  # texts are read in UTF-16 code units


@dataclass(frozen=True)
class Rule:
    """What one kind of token looks like.

    Args:
        name: What is to be done with it.
        token: Its pattern.
        ahead: Pattern of what must follow and does not belong to the token; ``""`` for anything.
    """

    name: str
    token: str
    ahead: str = ""


class Lexer:
    """Cuts texts into tokens.

    Args:
        rules: In order of precedence; together they must match any code unit.
        patterns: That rules and one another refer to by name.
        classes: Code units by the letter that names them behind a backslash.
    """

    def __init__(self, rules: Sequence[Rule], patterns: Mapping[str, str], classes: Mapping[str, Ranges]) -> None:
        self.rules = tuple(rules)
        grammar = _Grammar(patterns, classes)
        wholes: list[_Tree] = []
        self._ahead: list[_Ahead | None] = []
        for rule in self.rules:
            token = grammar.tree(rule.token)
            if rule.ahead:
                ahead = grammar.tree(rule.ahead)
                wholes.append(_All((token, ahead)))
                self._ahead.append(_Ahead(_length(token), _length(ahead), Automaton([token]), Automaton([ahead])))
            else:
                wholes.append(token)
                self._ahead.append(None)
        self.automaton = Automaton(wholes)

    def match(self, units: Sequence[int], start: int) -> tuple[Rule | None, int]:
        """The token at a place of a text.

        Args:
            units: UTF-16 code units of the text.
            start: The place, before the end.

        Returns:
            Its rule and the place behind it; None and ``start`` where no rule matches.
        """
        number, end = self.automaton.longest(units, start)
        if number is None:
            return None, start
        split = self._ahead[number]
        return self.rules[number], end if split is None else split.cut(units, start, end)


@dataclass(frozen=True)
class _Ahead:
    """Where a token ends and what follows it begins."""

    token_length: int | None
    ahead_length: int | None
    token: "Automaton"
    ahead: "Automaton"

    def cut(self, units: Sequence[int], start: int, end: int) -> int:
        if self.token_length is not None:
            return start + self.token_length
        if self.ahead_length is not None:
            return end - self.ahead_length
        cuts = self.token.ends(units[start:end])
        return start + max(cut for cut in cuts if end - start - cut in self.ahead.ends(units[start + cut : end]))


# ---------------------------------------------------------------------------------------------------------------------
# Patterns


@dataclass(frozen=True)
class _Set:
    ranges: Ranges


@dataclass(frozen=True)
class _All:
    parts: "tuple[_Tree, ...]"


@dataclass(frozen=True)
class _Any:
    parts: "tuple[_Tree, ...]"


@dataclass(frozen=True)
class _Repeat:
    part: "_Tree"
    least: int
    most: int | None


_Tree = _Set | _All | _Any | _Repeat


class _Grammar:
    """Patterns that refer to one another by name."""

    def __init__(self, patterns: Mapping[str, str], classes: Mapping[str, Ranges]) -> None:
        self._patterns, self.classes = patterns, classes
        self._trees: dict[str, _Tree] = {}

    def tree(self, pattern: str) -> _Tree:
        return _Reader(pattern, self).alternatives()

    def named(self, name: str) -> _Tree:
        if name not in self._trees:
            self._trees[name] = self.tree(self._patterns[name])
        return self._trees[name]


# What java.lang.Character takes for another case of an ASCII letter.
_CASES: Final = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}


class _Reader:
    """Reads one pattern from its start to its end."""

    _BOUNDS = re.compile(r"\{(\d+),(\d+)\}")

    def __init__(self, text: str, grammar: _Grammar) -> None:
        self._text, self._grammar = text, grammar
        self._at = 0

    def alternatives(self) -> _Tree:
        found = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            found.append(self._sequence())
        return found[0] if len(found) == 1 else _Any(tuple(found))

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        self._at += 1
        return self._text[self._at - 1]

    def _sequence(self) -> _Tree:
        found: list[_Tree] = []
        while self._peek() not in ("", "|", ")"):
            found.append(self._repeated())
        return _All(tuple(found))

    def _repeated(self) -> _Tree:
        part = self._single()
        while True:
            if bounds := self._BOUNDS.match(self._text, self._at):
                self._at = bounds.end()
                part = _Repeat(part, int(bounds[1]), int(bounds[2]))
            elif self._peek() in ("*", "+", "?"):
                mark = self._take()
                part = _Repeat(part, int(mark == "+"), 1 if mark == "?" else None)
            else:
                return part

    def _single(self) -> _Tree:
        character = self._take()
        if character == "(":
            part = self.alternatives()
            self._at += 1
            return part
        if character == "[":
            return _Set(self._brackets())
        if character == "{":
            end = self._text.index("}", self._at)
            name, self._at = self._text[self._at : end], end + 1
            return self._grammar.named(name)
        if character == "\\":
            character = self._take()
            if character in self._grammar.classes:
                return _Set(self._grammar.classes[character])
        return _Set(
            united(
                (ord(case),) * 2 for case in _CASES.get(character.lower(), "") + character.lower() + character.upper()
            )
        )

    def _brackets(self) -> Ranges:
        negated = self._peek() == "^"
        self._at += negated
        found: list[tuple[int, int]] = []
        while (first := self._take()) != "]":
            if first == "\\":
                first = self._take()
                if first in self._grammar.classes:
                    found += self._grammar.classes[first]
                    continue
            last = first
            if self._peek() == "-" and self._text[self._at + 1] != "]":
                self._at += 1
                last = self._take()
            found.append((ord(first), ord(last)))
        return complement(united(found)) if negated else united(found)


def united(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in order, those that touch or overlap made one."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return tuple(found)


def complement(ranges: Ranges) -> Ranges:
    """All code units that are not in the ranges."""
    starts = [0, *(high + 1 for _, high in ranges)]
    ends = [*(low - 1 for low, _ in ranges), _TOP]
    return tuple((low, high) for low, high in zip(starts, ends, strict=True) if low <= high)


def _length(tree: _Tree) -> int | None:
    """How many code units a pattern always matches; None where that varies."""
    if isinstance(tree, _Set):
        return 1
    if isinstance(tree, _Repeat):
        inner = _length(tree.part)
        return inner * tree.least if inner is not None and tree.least == tree.most else None
    lengths = [_length(part) for part in tree.parts]
    if isinstance(tree, _Any):
        return lengths[0] if len(set(lengths)) == 1 else None
    return None if None in lengths else sum(length or 0 for length in lengths)


# ---------------------------------------------------------------------------------------------------------------------
# The automaton


@dataclass
class _State:
    """A set of places in the patterns: the rule that matches here, and where each class of code units leads."""

    places: frozenset[int]
    rule: int | None
    next: "dict[int, _State | None]" = field(default_factory=dict)


class Automaton:
    """Patterns side by side, the earlier before the later."""

    def __init__(self, trees: Sequence[_Tree]) -> None:
        self._empty: list[list[int]] = []  # of each place, the places reached without reading
        self._steps: dict[int, tuple[int, int]] = {}  # of a place that reads: the number of its set, and where it leads
        self._accepts: dict[int, int] = {}
        self._sets: dict[Ranges, int] = {}
        self._states: dict[frozenset[int], _State] = {}
        self._classes: dict[tuple[int, ...], int] = {}
        self._members: list[frozenset[int]] = []  # of each class of code units, the numbers of the sets that hold it
        self._class_of: dict[int, int] = {}
        start = self._place()
        for number, tree in enumerate(trees):
            begin = self._place()
            self._empty[start].append(begin)
            self._accepts[self._add(tree, begin)] = number
        self._starts = [[low for low, _ in ranges] for ranges in self._sets]
        self._ranges = list(self._sets)
        self.start = self._state({start})

    def _place(self) -> int:
        self._empty.append([])
        return len(self._empty) - 1

    def _add(self, tree: _Tree, begin: int) -> int:
        """Adds a pattern behind a place; returns the place behind it."""
        if isinstance(tree, _Set):
            end = self._place()
            self._steps[begin] = (self._sets.setdefault(tree.ranges, len(self._sets)), end)
            return end
        if isinstance(tree, _All):
            for part in tree.parts:
                begin = self._add(part, begin)
            return begin
        if isinstance(tree, _Any):
            end = self._place()
            for part in tree.parts:
                first = self._place()
                self._empty[begin].append(first)
                self._empty[self._add(part, first)].append(end)
            return end
        for _ in range(tree.least):
            begin = self._add(tree.part, begin)
        if tree.most is None:
            first, end = self._place(), self._place()
            self._empty[begin] += [first, end]
            self._empty[self._add(tree.part, first)] += [first, end]
            return end
        end = self._place()
        for _ in range(tree.most - tree.least):
            first = self._place()
            self._empty[begin] += [first, end]
            begin = self._add(tree.part, first)
        self._empty[begin].append(end)
        return end

    def _state(self, places: Iterable[int]) -> _State:
        reached: set[int] = set()
        waiting = list(places)
        while waiting:
            place = waiting.pop()
            if place not in reached:
                reached.add(place)
                waiting += self._empty[place]
        kept = frozenset(place for place in reached if place in self._steps or place in self._accepts)
        if kept not in self._states:
            rules = [self._accepts[place] for place in kept if place in self._accepts]
            self._states[kept] = _State(kept, min(rules, default=None))
        return self._states[kept]

    def class_of(self, unit: int) -> int:
        """The number of the class of code units that no pattern tells apart from this one."""
        found = self._class_of.get(unit)
        if found is None:
            held = []
            for number, starts in enumerate(self._starts):
                place = bisect_right(starts, unit) - 1
                if place >= 0 and unit <= self._ranges[number][place][1]:
                    held.append(number)
            key = tuple(held)
            found = self._classes.setdefault(key, len(self._classes))
            if found == len(self._members):
                self._members.append(frozenset(key))
            self._class_of[unit] = found
        return found

    def step(self, state: _State, unit: int) -> _State | None:
        """The state behind a code unit, None where no pattern goes on."""
        kind = self._class_of.get(unit)
        if kind is None:
            kind = self.class_of(unit)
        if kind not in state.next:
            members = self._members[kind]
            reached = [self._steps[p][1] for p in state.places if p in self._steps and self._steps[p][0] in members]
            state.next[kind] = self._state(reached) if reached else None
        return state.next[kind]

    def longest(self, units: Sequence[int], start: int) -> tuple[int | None, int]:
        """The number of the pattern with the longest match at a place, None without any, and where the match ends."""
        state: _State | None = self.start
        found: tuple[int | None, int] = (None, start)
        for place in range(start, len(units)):
            state = self.step(state, units[place]) if state is not None else None
            if state is None:
                break
            if state.rule is not None:
                found = (state.rule, place + 1)
        return found

    def ends(self, units: Sequence[int]) -> set[int]:
        """After how many code units of a text, none included, one of the patterns matches."""
        state: _State | None = self.start
        found = {0} if self.start.rule is not None else set()
        for place, unit in enumerate(units, 1):
            state = self.step(state, unit) if state is not None else None
            if state is None:
                break
            if state.rule is not None:
                found.add(place)
        return found
