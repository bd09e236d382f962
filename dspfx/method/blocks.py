"""Small blocks of weights that share one absolute value, or are zero (MSWU, arXiv 2106.08301; METHOD, section 5).

weight [O, C, *kernel]  ->  planes [O, C], one a kernel position, or one matrix [O, C * kernel]  ->  blocks of a x b

*Unifying* a block gives all its weights one absolute value, their mean, signs kept; *pruning* it makes them zero. Both
are Euclidean projections. A weight that is exactly zero is structure, of a pruning before: it stays zero, and counts
for nothing.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

FREE, UNIFIED, PRUNED = 0, 1, 2  # what a block is


@dataclass(frozen=True)
class Tiling:
    """How a weight of a shape falls into blocks of `block` [filters, channels]; those at the edges are smaller.

    layout "planes" tiles [O, C] at each kernel position, "gemm" the matrix [O, C * kernel] whose columns are, channel
    by channel, the kernel positions. O is the weight's first axis and C its second, whatever the layer calls them.
    """

    shape: tuple[int, ...]
    block: tuple[int, int]
    layout: str = "planes"

    @property
    def planes(self) -> tuple[int, int, int]:
        """(number of planes, rows and columns of each)."""
        rows, columns = self.shape[0], math.prod(self.shape[1:2])
        positions = math.prod(self.shape[2:])
        return (1, rows, columns * positions) if self.layout == "gemm" else (positions, rows, columns)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(number of planes, blocks down and blocks across each); their order is this array's, row by row."""
        planes, rows, columns = self.planes
        return planes, -(-rows // self.block[0]), -(-columns // self.block[1])

    @property
    def count(self) -> int:
        """Blocks of the weight."""
        return math.prod(self.grid)

    def spread(self, weight: Tensor) -> Tensor:
        """[blocks down, a, blocks across, b, *kernel], a view of the weight where it can be one; padded with zeros."""
        _, rows, columns = self.planes
        _, down, across = self.grid
        a, b = self.block
        whole = weight.flatten(1) if self.layout == "gemm" else weight
        if (rows, columns) != (down * a, across * b):
            kernel = [0, 0] * (whole.dim() - 2)
            whole = torch.nn.functional.pad(whole, (*kernel, 0, across * b - columns, 0, down * a - rows))
        return whole.unflatten(1, (across, b)).unflatten(0, (down, a))

    def gathered(self, spread: Tensor) -> Tensor:
        """The weight that `spread` made this of; what was padded is dropped."""
        _, rows, columns = self.planes
        return spread.flatten(2, 3).flatten(0, 1)[:rows, :columns].reshape(self.shape)

    def split(self, weight: Tensor) -> Tensor:
        """[blocks, a * b], a block's weights row by row; zeros where it reaches over the edge."""
        spread = self.spread(weight)
        a, b = self.block
        return spread.permute(*range(4, spread.dim()), 0, 2, 1, 3).reshape(-1, a * b)

    def join(self, blocks: Tensor) -> Tensor:
        """The weight that `split` made these blocks of; what reaches over the edge is dropped."""
        _, down, across = self.grid
        kernel = () if self.layout == "gemm" else self.shape[2:]
        last = len(kernel)
        spread = blocks.reshape(*kernel, down, across, *self.block)
        return self.gathered(spread.permute(last, last + 2, last + 1, last + 3, *range(last)))


def magnitudes(blocks: Tensor, alive: Tensor) -> Tensor:
    """u [blocks, 1]: the mean absolute value of a block's living weights; 0 where there are none."""
    values = blocks.abs() * alive
    largest = values.amax(1, keepdim=True)
    least = values.masked_fill(~alive, math.inf).amin(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
    return mean.maximum(least).minimum(largest)  # the mean of equal values is this value, to the last bit


def unified(blocks: Tensor, alive: Tensor) -> Tensor:
    """Proj_U: every living weight becomes u with its own sign, bit by bit the same within a block."""
    return torch.where(alive, torch.copysign(magnitudes(blocks, alive), blocks), 0.0)


def distortions(blocks: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """(D_U, D_P) [blocks]: the squared distances of unifying and of pruning each block."""
    off = (blocks.abs() - magnitudes(blocks, alive)) * alive
    return off.square().sum(1), (blocks * alive).square().sum(1)


def counts(blocks: int, prune: float, unify: float) -> tuple[int, int]:
    """How many blocks are pruned and unified: at least these fractions of all, as far as there are as many."""
    least = [math.ceil(fraction * blocks - 1e-9) for fraction in (prune, unify)]
    return least[0], min(least[1], blocks - least[0])


def select(unify_cost: Tensor, prune_cost: Tensor, unify: int, prune: int) -> Tensor:
    """Classes [blocks] (uint8) of least total cost with exactly so many unified and pruned blocks.

    METHOD's order, to prune first and then to unify what is left, is not the projection: a block that is cheap to prune
    may be cheaper still to unify. Sorted by what pruning costs more than unifying, some split of the blocks has all
    pruned ones before it and all unified ones behind it (any two the other way round could be exchanged), so the best
    of all splits is the optimum: O(n log n).
    """
    classes = torch.zeros(len(unify_cost), dtype=torch.uint8)
    unify_cost, prune_cost = unify_cost.detach().double().cpu(), prune_cost.detach().double().cpu()
    if not prune or not unify:
        cost, number, kind = (prune_cost, prune, PRUNED) if prune else (unify_cost, unify, UNIFIED)
        classes[cost.argsort(stable=True)[:number]] = kind
        return classes
    order = (prune_cost - unify_cost).argsort(stable=True)
    before = _least_sums(prune_cost[order].tolist(), prune)
    behind = _least_sums(unify_cost[order].flip(0).tolist(), unify)[::-1]
    n = len(order)
    split = min(range(prune, n - unify + 1), key=lambda m: before[m] + behind[m])
    first, rest = order[:split], order[split:]
    classes[first[prune_cost[first].argsort(stable=True)[:prune]]] = PRUNED
    classes[rest[unify_cost[rest].argsort(stable=True)[:unify]]] = UNIFIED
    return classes


def _least_sums(costs: list[float], number: int) -> list[float]:
    """[m] -> the sum of the `number` least of the first m costs; infinite where there are fewer."""
    heap = [-cost for cost in costs[:number]]
    heapq.heapify(heap)
    total = -math.fsum(heap)
    sums = [math.inf] * number + [total]
    for cost in costs[number:]:
        total += cost + heapq.heappushpop(heap, -cost)
        sums.append(total)
    return sums


def projected(blocks: Tensor, alive: Tensor, classes: Tensor) -> Tensor:
    """The blocks, those of class UNIFIED unified and those of class PRUNED zero."""
    kind = classes.to(blocks.device)[:, None]
    return torch.where(kind == UNIFIED, unified(blocks, alive), blocks).masked_fill(kind == PRUNED, 0.0)
