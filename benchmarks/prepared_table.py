"""Prepared = original: outputs and gradients compared bit by bit, on the zoo and on torchvision networks.

OMP_NUM_THREADS=1 python -m benchmarks.prepared_table --write docs/results/prepared.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dspfx
from benchmarks.selfcheck_table import MODELS, build
from tests.zoo import ZOO


def answers(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Every output tensor and, after one backward pass through their sum, every parameter's gradient, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # dropout draws the same
    outputs = [x for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, Tensor)]
    torch.stack([x.square().mean() for x in outputs]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [*outputs, *(gradients[name] for name in sorted(gradients))]


def differing(model: nn.Module, traced_on: Any, inputs: list[tuple[Tensor, ...]]) -> tuple[int, int]:
    """(tensors compared, tensors that are not bitwise equal) over all inputs, in eval and in train mode."""
    gm = dspfx.prepare(model, traced_on)
    compared = unequal = 0
    for training in (False, True):
        for batch in inputs:
            pairs = list(zip(answers(model.train(training), batch), answers(gm.train(training), batch), strict=True))
            compared += len(pairs)
            unequal += sum(not torch.equal(a, b) for a, b in pairs)
    return compared, unequal


def rows() -> list[tuple[Any, ...]]:
    """One row a torchvision network, one for the whole zoo."""
    found: list[tuple[Any, ...]] = []
    totals = [0, 0]
    for entry in ZOO.values():
        inputs = [entry.inputs(batch, *size) for batch in (3, 5) for size in entry.sizes()]
        compared, unequal = differing(entry.build(), entry.inputs(), inputs)
        totals[0] += compared
        totals[1] += unequal
    found.append((f"zoo, {len(ZOO)} networks", "16x16, 12x20, 24x16", *totals))
    for name in MODELS:
        inputs = [(torch.randn(3, 3, 96, 96),), (torch.randn(5, 3, 64, 96),)]
        found.append((name, "96x96, 64x96", *differing(build(name), torch.zeros(2, 3, 128, 128), inputs)))
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Prints the table and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    headers = ["model", "images", "tensors compared", "not bitwise equal"]
    result = tabulate(rows(), headers=headers, tablefmt="github", disable_numparse=True)
    print(result)
    if options.write:
        options.write.write_text(
            "# Prepared = original\n\nOutputs and the gradients of all parameters, of the original and of the prepared "
            "network, in eval and in train mode, at batches 3 and 5, after preparing at another size. torch "
            f"{torch.__version__}, torchvision {torchvision.__version__}, one CPU thread.\n\n{result}\n\nMade by\n\n"
            f"    OMP_NUM_THREADS=1 python -m benchmarks.prepared_table --write {options.write}\n"
        )


if __name__ == "__main__":
    main()
