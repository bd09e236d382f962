"""Torch-Pruning's group-norm pruner for `benchmarks.latency_accuracy`: its regulariser, and the network it prunes to
a measured latency.

Settings are those of the library's own CIFAR-10 script (method group_sl): importance p=2 normalised by the maximum,
regulariser 5e-4 in the place of weight decay, the last layer left alone.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.optim import SGD

import dspfx
from dspfx.cli.checkpoints import write_text
from dspfx.cli.scoring import say
from dspfx.deploy.benchmark import Results

REGULARISER = 5e-4
AUTHORS_LR_STEPS = 390 * (60 * 0.01 + 20 * 0.001 + 20 * 0.0001)  # sum of their learning rates, 50,000 images by 128
RATIOS = tuple(i / 40 for i in range(2, 36))
MACS = 0.12, 1.2  # shares between the first and the second times the target latency are timed: no other came near it
SLACK = 0.02  # a structure this much slower than the target still counts
CHUNK = 12  # networks timed in one interleaved run


@dataclass(frozen=True)
class Cut:
    """One way of pruning: widths a multiple of `round_to` (1: any), one ranking for all layers or one each."""

    round_to: int
    is_global: bool
    ratio: float

    @property
    def label(self) -> str:
        """A short name, for files."""
        return f"{self.round_to}_{'global' if self.is_global else 'local'}_{self.ratio:g}"


@dataclass(frozen=True)
class Candidate:
    """What a cut leads to: output channels of every convolution, and the shares of multiply-adds and weights left."""

    cut: Cut
    widths: tuple[int, ...]
    macs: float
    params: float


def make_pruner(model: nn.Module, example: Tensor, regulariser: float, cut: Cut | None = None) -> Any:
    """The pruner of `model`; without a cut it is for `regularize` alone."""
    cut = cut or Cut(1, False, 0.5)
    return tp.pruner.GroupNormPruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
        reg=regulariser,
        global_pruning=cut.is_global,
        pruning_ratio=cut.ratio,
        round_to=None if cut.round_to == 1 else cut.round_to,
        ignored_layers=[module for module in model.modules() if isinstance(module, nn.Linear)],
    )


def sparsity_optimizer(model: nn.Module, example: Tensor, regulariser: float) -> SGD:
    """SGD that adds the pruner's regulariser to the gradients before each step, and no other weight decay."""
    pruner = make_pruner(model, example, regulariser)
    optimizer = SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: pruner.regularize(model))
    return optimizer


def pruned(model: nn.Module, example: Tensor, cut: Cut) -> nn.Module:
    """A pruned copy of `model`, in eval mode."""
    model = copy.deepcopy(model).eval()
    make_pruner(model, example, 0.0, cut).step()
    model.zero_grad()
    return model


def pruned_by_l1(model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """A copy in eval mode without the filters of the smallest L1 norm, the same share of every layer (Li et al.)."""
    model = copy.deepcopy(model).eval()
    tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=1, group_reduction="first"),
        pruning_ratio=ratio,
        ignored_layers=[module for module in model.modules() if isinstance(module, nn.Linear)],
    ).step()
    return model


def candidates(model: nn.Module, example: Tensor, target: float) -> list[Candidate]:
    """Every different structure that the pruner makes of `model` near the target, that of most multiply-adds first."""
    dense = dspfx.profile(model, example[:1])
    found: dict[tuple[int, ...], Candidate] = {}
    for round_to, is_global, ratio in itertools.product((1, 8, 16), (False, True), RATIOS):
        cut = Cut(round_to, is_global, ratio)
        small = pruned(model, example, cut)
        widths = tuple(m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d))
        if widths not in found:
            own = dspfx.profile(small, example[:1])
            found[widths] = Candidate(cut, widths, own.flops / dense.flops, own.params / dense.params)
    kept = [c for c in found.values() if MACS[0] <= c.macs <= MACS[1] * target]
    return sorted(kept, key=lambda c: -c.macs)


def finalists(dense: nn.Module, learned: nn.Module, example: Tensor, target: float, log: Path) -> list[Candidate]:
    """Of the structures that are fast enough, the one of most multiply-adds and the one of most weights.

    All are timed, and those near the target once more beside each other. Every figure goes into the file `log`.
    """
    todo = candidates(learned, example, target)
    rows: list[dict[str, Any]] = []
    close: list[Candidate] = []
    for start in range(0, len(todo), CHUNK):
        chunk = todo[start : start + CHUNK]
        timing = _time(dense, learned, example, chunk, rounds=16, patience=1)
        rows += [_row(c, timing) for c in chunk]
        close += [c for c in chunk if timing[str(c.widths)].ratio <= target + 3 * SLACK]
    if not close:
        write_text(log, json.dumps(rows))
        return []
    again = _time(dense, learned, example, close, rounds=40, patience=4)
    write_text(log, json.dumps([*rows, *(_row(c, again) | {"again": True} for c in close)]))
    right = [c for c in close if again[str(c.widths)].ratio <= target + SLACK]
    by_macs, by_params = sorted(right, key=lambda c: -c.macs), sorted(right, key=lambda c: -c.params)
    return list(dict.fromkeys([*by_macs[:1], *by_params[:1]]))


def quietest(networks: Mapping[str, nn.Module], images: Tensor, rounds: int, limit: float, patience: int) -> Results:
    """Times in ONNX Runtime on one thread, up to `patience` times while the typical spread is above `limit`.

    Of several runs the quietest counts.
    """
    best: Results | None = None
    for attempt in range(patience):
        if attempt:
            time.sleep(15)
        found = dspfx.benchmark(networks, images, runtime="onnxruntime", rounds=rounds, threads=1)
        if best is None or _spread(found) < _spread(best):
            best = found
        if _spread(best) <= limit:
            break
        say(f"timing: spread {_spread(found):.3f} is above {limit}, the machine is busy")
    assert best is not None
    return best


def _spread(results: Results) -> float:
    spreads = sorted(result.spread / result.ratio for result in results.values())
    return spreads[len(spreads) // 2]


def _time(
    dense: nn.Module, learned: nn.Module, example: Tensor, chunk: list[Candidate], rounds: int, patience: int
) -> Results:
    networks = {"dense": dense} | {str(c.widths): pruned(learned, example, c.cut) for c in chunk}
    return quietest(networks, example[:1], rounds, 0.1, patience)


def _row(candidate: Candidate, timing: Results) -> dict[str, Any]:
    result = timing[str(candidate.widths)]
    cut = candidate.cut
    say(
        f"peer: multiple of {cut.round_to}, {'global' if cut.is_global else 'local'} {cut.ratio:.3f}: "
        f"{candidate.macs:.1%} of MACs, latency {result.ratio:.3f} ± {result.spread / 2:.3f}"
    )
    return {
        **vars(cut),
        "widths": list(candidate.widths),
        "macs": candidate.macs,
        "params": candidate.params,
        "latency": result.ratio,
    }
