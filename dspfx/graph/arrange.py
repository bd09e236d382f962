"""All orders of some things in which given sets of them stand together: a PQ-tree (Booth and Lueker, 1976).

    tree = row([1, 2, 3, 4, 5])
    tree = gather(tree, {1, 4})       # None where it could not be met beside what was asked for before
    tree = gather(tree, {4, 5, END})  # ... and at the end
    order(tree)                       # [2, 3, 1, 4, 5]

A tree is a leaf (an int) or a node: children of "any" stand in any order, those of "row" in this one or its reverse.
Nodes are never changed: an earlier tree stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

START, END = -1, -2  # leaves that stand at the two ends of every tree
Tree = Any  # int | tuple[str, tuple[Tree, ...]]
_EMPTY, _PARTIAL, _FULL = range(3)


def row(leaves: Sequence[int], fixed: bool = False) -> Tree:
    """The tree of every order of some different non-negative numbers, or, `fixed`, of this one alone."""
    inner = list(leaves) if fixed else [_node("any", leaves)]
    return "row", (START, *inner, END)


def gather(tree: Tree, wanted: Iterable[int]) -> Tree | None:
    """The tree of those orders in which the `wanted` leaves, which it has, stand together; None where none is left."""
    try:
        return _Gathering(set(wanted)).gather(tree)
    except _ImpossibleError:
        return None


def order(tree: Tree) -> list[int]:
    """One of the tree's orders: as much as it allows the smallest leaves come first."""
    found = [leaf for leaf, _ in _leaves(tree)]
    found = found if found[0] == START else found[::-1]
    return found[1:-1]


def _leaves(tree: Tree) -> list[tuple[int, int]]:
    """(leaf, the smallest one of the subtree) in order."""
    if isinstance(tree, int):
        return [(tree, tree)]
    kind, children = tree
    parts = [_leaves(child) for child in children]
    least = [part[0][1] for part in parts]
    if kind == "any":
        parts = [parts[i] for i in sorted(range(len(parts)), key=least.__getitem__)]
    elif least[0] > least[-1]:
        parts = [part[::-1] for part in parts[::-1]]
    return [(leaf, min(least)) for part in parts for leaf, _ in part]


def _node(kind: str, children: Iterable[Tree]) -> Tree:
    children = tuple(children)
    return children[0] if len(children) == 1 else (kind, children)


class _ImpossibleError(Exception):
    """No order is left."""


class _Gathering:
    def __init__(self, wanted: set[int]) -> None:
        self.wanted = wanted
        self.labels: dict[int, int] = {}

    def label(self, tree: Tree) -> int:
        """How many of the leaves below are wanted: none, some, all."""
        if isinstance(tree, int):
            return _FULL if tree in self.wanted else _EMPTY
        if id(tree) not in self.labels:
            found = {self.label(child) for child in tree[1]}
            self.labels[id(tree)] = found.pop() if len(found) == 1 else _PARTIAL
        return self.labels[id(tree)]

    def gather(self, tree: Tree) -> Tree:
        """`tree`, which holds all that is wanted, with it together."""
        if self.label(tree) != _PARTIAL:
            return tree
        kind, children = tree
        touched = [i for i, child in enumerate(children) if self.label(child) != _EMPTY]
        first, last = touched[0], touched[-1]
        if first == last:
            return kind, (*children[:first], self.gather(children[first]), *children[last + 1 :])
        if kind == "any":
            empty, partial, full = self.sorted(children)
            if len(partial) > 2:
                raise _ImpossibleError
            ends = [self.halved(child) for child in partial] + [[], []]
            middle = [*ends[0], *([_node("any", full)] if full else []), *ends[1][::-1]]
            return _node("any", [*empty, _node("row" if partial else "any", middle)])
        inner = children[first + 1 : last]
        if any(self.label(child) != _FULL for child in inner):
            raise _ImpossibleError
        left, right = self.halved(children[first]), self.halved(children[last])
        return "row", (*children[:first], *left, *inner, *right[::-1], *children[last + 1 :])

    def sorted(self, children: Sequence[Tree]) -> tuple[list[Tree], list[Tree], list[Tree]]:
        found: tuple[list[Tree], list[Tree], list[Tree]] = ([], [], [])
        for child in children:
            found[self.label(child)].append(child)
        return found

    def halved(self, tree: Tree) -> list[Tree]:
        """The subtree as a row of subtrees, what is not wanted first, all that is wanted last."""
        if self.label(tree) != _PARTIAL:
            return [tree]
        kind, children = tree
        if kind == "any":
            empty, partial, full = self.sorted(children)
            groups = [[_node("any", empty)] if empty else [], *map(self.halved, partial)]
            children = [*groups[0], *(c for g in groups[1:] for c in g), *([_node("any", full)] if full else [])]
        else:
            if self.label(children[0]) > self.label(children[-1]):
                children = children[::-1]
            labels = [self.label(child) for child in children]
            if labels != sorted(labels):
                raise _ImpossibleError
            partial = [child for child in children if self.label(child) == _PARTIAL]
            children = [part for child in children for part in self.halved(child)]
        if len(partial) > 1:
            raise _ImpossibleError
        return list(children)
