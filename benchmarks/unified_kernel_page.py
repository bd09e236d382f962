"""The page of `benchmarks.unified_kernel`: its tables, and what they mean."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable

import torch
from tabulate import tabulate

from dspfx.deploy.machine import describe_machine
from dspfx.deploy.timing import Result, compare

Samples = dict[str, list[float]]  # seconds of the rounds, by "<features> <kernel>", "PyTorch", or "cycles"
Shape = tuple[int, int]
Table = dict[tuple[str, Shape], dict[str, Result]]  # by features and shape: results by kernel
Line = tuple[Samples, Samples, dict[str, int]]  # from memory, repeated, and bytes of the weights
CYCLES = 1_200_000  # of the sample of this name
ADDING, EXPANDING, LOOKING = ("add_4x4", "add_1x4"), ("expand_4x1", "expand_16x1"), ("look_4x4", "look_1x4")
LINE = "look_4x4", "blocks_4x4", "pruned", "mixed"


def page(features: list[str], convs: dict[Shape, Samples], lines: dict[Shape, Line]) -> str:
    """The page, in Markdown."""
    compute = {(f, s): _beside(samples, f) for s, samples in convs.items() for f in features}
    cold = {(f, s): _beside(line[0], f) for s, line in lines.items() for f in features}
    warm = {(f, s): _beside(line[1], f) for s, line in lines.items() for f in features}
    one = next(reversed(lines.values()))[2]
    size = {name: f"{one[f'{features[0]} {name}'] / one[f'{features[0]} float']:.2f}" for name in LINE}
    text = f"""# One multiplication a block: what a kernel gains from unified weights

`dspfx.unify` gives the weights of a block one absolute value u; only their signs differ. Is a kernel on the CPU faster
for it? Ratios are of times, to the same work with float32 weights; below 1 is faster. Everything is float32, on one
thread. Ranges are over all layers and instruction sets below.

- **Adding instead of multiplying gains nothing.** Where arithmetic is the limit, u * (+-x0 +-x1 +-x2 +-x3) takes
  {_span(compute, ADDING)} of the time. An addition costs as much as a fused multiply-add (under AVX-512 they have the
  same two ports). For a register of filters four weights are 4 instructions as floats, and as a block 4 additions and
  1 multiply-add; signs and partial sums also take registers from the tile. In blocks of 4x1 and 16x1 no two weights
  meet in one sum, so that nothing can be added before the multiplication; best is to make floats of them, once a
  call: the float kernel ({_span(compute, EXPANDING)}).
- **Looking sums up gains, in layers of which every block is unified.** The sums +-x0 +-x1 +-x2 +-x3 of a pixel are
  16, one register (under AVX2 8, the others are their negatives). They are made once, and serve all filters and all
  nine positions of the kernel. One permutation finds those of a register of filters, one multiply-add applies u:
  2 instructions for 4, which go to two different ports. Blocks must reach over four channels (4x4, 1x4). It takes
  {_span(compute, LOOKING)} of the time; by the count of instructions it is 0.50.
- **Where memory is the limit**, a matrix times one vector, 4x4 blocks have {size["look_4x4"]} of the bytes of floats
  (6 for 64). The same tables take {_span(cold, LINE[:1])} of the time with weights in no cache,
  {_span(warm, LINE[:1])} when repeated.
- **The realistic mix**, 30% of the blocks pruned, 50% unified and 20% free, anywhere, rarely has a register of unified
  blocks only. It needs a list of blocks, each with its place: {size["mixed"]} of the bytes, most of them of free
  weights, and {_span(cold, LINE[3:])} of the time with weights in no cache, {_span(warm, LINE[3:])} when repeated.
  Pruned blocks alone leave {size["pruned"]} of the bytes and {_span(cold, LINE[2:3])} of the time.

## A 3x3 convolution, 42x42 pixels

GMAC/s, and in brackets the ratio. *add*: +-x are added up, one multiply-add a block. *floats first*: weights are made
of u and signs, once a call. *look*: sums are looked up. PyTorch chooses its instructions itself.

{_conv_table(compute)}

Multiply-adds per cycle, the median of these layers; cycles are counted by a chain of dependent integer
multiplications, timed in the same rounds. Two 512-bit units for multiply-adds allow 32 as floats, one port for
permutations allows 64 by looking up; with AVX2's 256 bits it is half of both.

{_cycle_table(features, convs)}

## A matrix times one vector

*look*: every block unified. *list*: the same as a list of blocks. *pruned*: a list of 70% of the blocks, as floats.
*mix*: a list of 50% unified blocks, and one of 20% as floats. Ratio, and half its interquartile range.

Weights in no cache: driven out before each call.

{_line_table(cold, lines)}

Repeated: weights where the last call, and those of the other kernels, left them.

{_line_table(warm, lines)}

## What it means for dspfx

Unified weights are not faster by themselves: no kernel of dspfx knows of blocks, and an exported network has them as
ordinary weights. A kernel of its own would gain

- in linear layers at batch 1 whose weights come from memory, such as VGG's classifier, as in the last tables;
- in convolutions only where *all* blocks of a layer are unified (`BlockConfig(unify=1.0)`), over four channels. With a
  fifth of the blocks free, {100 * 0.8**4:.0f}% of AVX-512's registers (four blocks) and {100 * 0.8**2:.0f}% of AVX2's
  (two) have none that is free; the others need floats. By the count of instructions that leaves {1 - 0.8**4 / 2:.2f}
  and {1 - 0.8**2 / 2:.2f} of the time at best; this was not measured.

A bit for the sign has no room for zero: a block in which only some weights are zero, of a pruning before, counts as
free here.

Weights of 8 bits have 0.25 of the bytes of floats whatever their values, so in bytes the mix, {size["mixed"]} with its
free weights in float32, is no better than these; fully unified layers are. Kernels with 8 bits were not measured here.
dspfx has none of these kernels: unification is for the size of files, and what makes its networks faster is groups
and pruned channels.

Every kernel is compared with float64 before it is timed. Times are medians of interleaved rounds.

Measured on: {describe_machine(torch.device("cpu"), 1)}.

Made by

    OMP_NUM_THREADS=1 python -m benchmarks.unified_kernel --write docs/results/unified_kernel.md
"""
    return re.sub(r"(?<!\n)\n *(?! *[\n|]|- |$)", " ", text)  # one line a paragraph


def _beside(samples: Samples, features: str) -> dict[str, Result]:
    """Results of the kernels of these features, and of PyTorch, to floats."""
    own = {name.removeprefix(f"{features} "): s for name, s in samples.items() if name.startswith(f"{features} ")}
    return compare({"float": own.pop("float"), "PyTorch": samples["PyTorch"], **own})


def _span(results: Table, names: Iterable[str]) -> str:
    values = [result[name].ratio for name in names for result in results.values()]
    return f"{min(values):.2f} to {max(values):.2f}"


def _github(rows: list[list[str]], head: list[str]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _conv_table(compute: Table) -> str:
    names = ("float", "PyTorch", *ADDING, *EXPANDING, *LOOKING)
    head = [name.replace("_", " ").replace("expand", "floats first") for name in names]
    rows = []
    for (features, (channels, size)), results in compute.items():
        mega = channels**2 * 9 * size**2 / 1e6
        cells = [f"{mega / results[n].median_ms:.0f} ({results[n].ratio:.2f})" for n in names]
        rows.append([f"{channels} to {channels}", features, cells[0].split()[0], *cells[1:]])
    return _github(rows, ["channels", "instructions", *head])


def _cycle_table(features: list[str], convs: dict[Shape, Samples]) -> str:
    names = "float", "add_4x4", "look_4x4"
    rows = []
    for f in features:
        found: list[list[float]] = [[] for _ in names]
        for (channels, size), samples in convs.items():
            results = compare({"cycles": samples["cycles"], **{name: samples[f"{f} {name}"] for name in names}})
            for name, values in zip(names, found, strict=True):
                values.append(channels**2 * 9 * size**2 / (CYCLES * results[name].ratio))
        rows.append([f, *(f"{statistics.median(values):.1f}" for values in found)])
    return _github(rows, ["instructions", "float", "add 4x4", "look 4x4"])


def _line_table(results: Table, lines: dict[Shape, Line]) -> str:
    rows = []
    for (features, shape), own in results.items():
        size, ms = lines[shape][2][f"{features} float"], own["float"].median_ms
        cells = [f"{own[n].ratio:.3f} ± {own[n].spread / 2:.3f}" for n in ("PyTorch", *LINE)]
        floats = f"{size / 1e6:.0f} MB, {ms:.2f} ms, {size / ms / 1e6:.0f} GB/s"
        rows.append(["x".join(map(str, shape)), features, floats, *cells])
    return _github(rows, ["matrix", "instructions", "float", "PyTorch", "look 4x4", "list 4x4", "pruned", "mix"])
