"""Which channels may change places with each other, and what that has to do to make some of them one range.

A *family* is a set of classes that occur in the very same tensors, equally often, and of which none is pinned or all
are. If classes move within their families only, every tensor still holds the classes it held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from dspfx.graph.arrange import END, START
from dspfx.graph.channels import ChannelGraph, tensors_in
from dspfx.graph.simulate import Outcome
from dspfx.graph.wires import distinct, thin

# (family, places in it, START and END) that are to stand together
Sets = tuple[tuple[int, frozenset[int]], ...]
Run = tuple[int | None, range]


class Families:
    """The families of the channels that are left of a network.

    Attributes:
        of: int64 [wires], the family of each wire's class.
        fixed: families that keep their order: what is pinned, and whole groups of grouped convolutions.
        members: the classes of a family, as they stand in the tensor that was the first to `show` them.
    """

    def __init__(self, channels: ChannelGraph, outcomes: Iterable[Outcome], removed: Tensor) -> None:
        self.channels = channels
        pinned = channels.pinned()
        for step in channels.steps:
            if step.kind == "conv" and step.layer is not None and step.layer.groups > 1:
                pinned[channels.root[torch.cat([step.out, step.ins[0]])]] = True
        pinned = pinned[channels.root]
        tensors = [thin(w).flatten() for one in outcomes for v in one.values.values() for w in tensors_in(v)]
        tensors.append(channels.root[pinned].unique())
        for step in channels.steps:
            if step.kind == "coupled" and not bool(removed[step.out].any()):  # it stays a norm of groups
                blocks = step.blocks()
                tensors += [step.out[blocks == block] for block in range(int(blocks[-1]) + 1)]
        generator = torch.Generator().manual_seed(0)
        marks = torch.zeros(channels.num_wires, dtype=torch.int64)  # of each class: the sum of its tensors' numbers
        for wires in tensors:
            number = torch.randint(-(2**62), 2**62, (1,), generator=generator)
            marks.index_add_(0, channels.root[wires], number.expand(len(wires)))
        self.of = marks.unique(return_inverse=True)[1][channels.root]
        self.fixed = set(self.of[pinned].tolist())
        self.members: dict[int, list[int]] = {}
        self._place: dict[int, int] = {}  # of a class among the members of its family

    def touching(self, values: Iterable[Tensor]) -> set[int]:
        """The families of all wires of some tensors."""
        return {f for wires in values for f in self.of[distinct(wires, self.channels.num_wires)].tolist()}

    def show(self, classes: Iterable[int]) -> None:
        """Classes not yet shown become the last ones of their families."""
        for one in classes:
            if one not in self._place:
                members = self.members.setdefault(int(self.of[one]), [])
                self._place[one] = len(members)
                members.append(one)

    def runs(self, classes: list[int]) -> list[Run]:
        """The stretches of a tensor that hold one family each, whole and in its order, each class once or equally often
        in a row; others, of one channel each, have no family."""
        family = self.of[torch.tensor(classes, dtype=torch.int64)].tolist()
        runs: list[Run] = []
        start = 0
        while start < len(classes):
            members, often = self.members[family[start]], 0
            while start + often < len(classes) and classes[start + often] == members[0]:
                often += 1
            stop = start + often * len(members)
            is_whole = often > 0 and classes[start:stop] == [one for one in members for _ in range(often)]
            stop = stop if is_whole else start + 1
            runs.append((family[start] if is_whole else None, range(start, stop)))
            start = stop
        return runs

    def together(self, runs: list[Run], classes: list[int], places: Collection[int], last: bool = False) -> Sets | None:
        """What has to stand together for these places of a tensor to become one range, or, `last`, its end; None where
        that is impossible. Nothing, where they are one in any order."""
        wanted = set(places)
        inside = [wanted.intersection(run) for _, run in runs]
        touched = [i for i, found in enumerate(inside) if found]
        if not touched:
            return ()
        first, end = touched[0], len(runs) - 1 if last else touched[-1]
        sets = []
        for i in range(first, end + 1):
            family, run = runs[i]
            if len(inside[i]) == len(run):
                continue
            if family is None or (i > first and (last or i < end)):
                return None
            leaves = frozenset(self._place[classes[place]] for place in inside[i])
            if len(leaves) * (len(run) // len(self.members[family])) != len(inside[i]):
                return None  # of one class a part alone
            sets.append((family, leaves | ({START} if i > first else {END} if last or i < end else set())))
        return tuple(sets)
