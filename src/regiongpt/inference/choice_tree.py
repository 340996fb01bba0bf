"""A closed set of answers as the tree of their common beginnings, cut into pieces of bounded size.

An entry is one token behind one beginning, so answers that begin alike share entries. Entries stand in preorder: below
an entry, and right behind it, comes all that continues it. That is what keeps large sets small. Who may attend to whom
is a comparison of two numbers an entry, never a table of all pairs, and a run of entries cut out anywhere needs nothing
of the rest but the ancestors of its first.

Shapes: E entries, A answers, M nodes of a piece, P predictions of a piece.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some nodes of a tree with all their ancestors, for one forward pass behind the prompt.

    Attributes:
        tokens: (M,) ids, an ancestor always before what continues it.
        depths: (M,) how many tokens of the answer stand before each.
        visible: (M, M) bool, row for column: each node sees its ancestors and itself.
        known: how many of the nodes, the first, are ancestors from an earlier piece.
        rows: (P,) which node's logits predict an entry; each entry is predicted in one piece alone.
        entries: (P,) the entry that it predicts.
    """

    tokens: Ints
    depths: Ints
    visible: NDArray[np.bool_]
    known: int
    rows: Ints
    entries: Ints


class ChoiceTree:
    """Answers as token paths, merged where they begin alike.

    Args:
        paths: one an answer, each of at least one token, the end of the answer included. Two that are equal share
            their score.

    Attributes:
        tokens: (E,) the id of each entry, in preorder.
        parents: (E,) the entry before it, -1 for what the prompt's last token predicts.
        depths: (E,) how many entries lead to it.
        leaves: (A,) the entry that ends each answer.
        lengths: (A,) tokens of each answer.
        nodes: the entries that something follows, which are all that a model has to read, in preorder.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        if not paths or not all(paths):
            raise ValueError(f"expected at least one path and none of them empty, got {len(paths)}")
        tokens: list[int] = []
        parents: list[int] = []
        leaves = [0] * len(paths)
        above: list[int] = []  # the entries of the last path
        before: Sequence[int] = ()
        for answer in sorted(range(len(paths)), key=lambda answer: list(paths[answer])):
            path = paths[answer]
            alike = common_length(before, path)
            del above[alike:]
            for token in path[alike:]:
                parents.append(above[-1] if above else -1)
                above.append(len(tokens))
                tokens.append(token)
            leaves[answer] = above[-1]
            before = path
        self.tokens: Ints = np.array(tokens)
        self.parents: Ints = np.array(parents)
        self.leaves: Ints = np.array(leaves)
        self.lengths: Ints = np.array([len(path) for path in paths])
        self.depths: Ints = np.zeros(len(tokens), np.int64)
        for entry, parent in enumerate(parents):
            if parent >= 0:
                self.depths[entry] = self.depths[parent] + 1
        self.nodes: Ints = np.unique(self.parents[self.parents >= 0])
        self._ends = self._subtree_ends()

    @property
    def first(self) -> Ints:
        """The entries that the prompt's own last token predicts."""
        return np.flatnonzero(self.parents < 0)

    def pieces(self, size: int) -> Iterator[Piece]:
        """Cut the tree into pieces of ``size`` nodes and the ancestors that these need.

        Args:
            size: at least 1; a piece has so many new nodes and at most as many ancestors as the longest answer has
                tokens.
        """
        if size < 1:
            raise ValueError(f"expected pieces of at least 1 node, got {size}")
        order = np.argsort(self.parents, kind="stable")
        sorted_parents = self.parents[order]
        for start in range(0, len(self.nodes), size):
            new = self.nodes[start : start + size]
            # In preorder whoever comes from before the piece lies above its first node too.
            kept = np.concatenate([self._ancestors(int(new[0])), new])
            visible = (kept[None, :] <= kept[:, None]) & (kept[:, None] < self._ends[kept][None, :])
            low, high = np.searchsorted(sorted_parents, new, "left"), np.searchsorted(sorted_parents, new, "right")
            counts = high - low
            entries = order[np.repeat(high - counts.cumsum(), counts) + np.arange(counts.sum())]
            rows = np.repeat(np.arange(len(kept) - len(new), len(kept)), counts)
            yield Piece(
                tokens=self.tokens[kept],
                depths=self.depths[kept],
                visible=visible,
                known=len(kept) - len(new),
                rows=rows,
                entries=entries,
            )

    def chains(self) -> Iterator[Piece]:
        """One piece an answer, each node seeing all before it, for models that cannot be shown a tree.

        An entry that several answers share is predicted in each of their pieces.
        """
        for leaf in np.unique(self.leaves):
            path = np.concatenate([self._ancestors(int(leaf)), [leaf]])
            nodes = path[:-1]
            if len(nodes):
                yield Piece(
                    tokens=self.tokens[nodes],
                    depths=self.depths[nodes],
                    visible=np.tri(len(nodes), dtype=bool),
                    known=0,
                    rows=np.arange(len(nodes)),
                    entries=path[1:],
                )

    def _ancestors(self, entry: int) -> Ints:
        found: list[int] = []
        while (entry := int(self.parents[entry])) >= 0:
            found.append(entry)
        return np.array(found[::-1], np.int64)

    def _subtree_ends(self) -> Ints:
        """Of each entry, one past the last entry below it."""
        sizes = np.ones(len(self.tokens), np.int64)
        for entry in range(len(sizes) - 1, -1, -1):
            if self.parents[entry] >= 0:
                sizes[self.parents[entry]] += sizes[entry]
        return np.arange(len(sizes)) + sizes


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
