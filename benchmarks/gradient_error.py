"""How far the formulas of group learning are from float64 double backward, on random tensors.

    python -m benchmarks.gradient_error --write docs/results/gradients.md

An error is the largest deviation divided by the largest value of the oracle, the worst of several draws. The oracle
is the paper's R written in plain tensor operations and differentiated by autograd (twice for the mixed term; through
the one-step adapted filters for the hypergradient).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from dspfx.method import grouping

SHAPES = [(4, 16, 16, 3, 3), (4, 64, 64, 3, 3), (2, 256, 64, 1, 1), (3, 48, 20, 5, 5), (8, 32, 8, 1, 7)]
SCALE, XI, STRENGTH, TAU = 0.7, 0.05, 0.02, 0.5
TARGET = 1e-9


def reference_penalty(p: Tensor, weight: Tensor) -> Tensor:
    """R as the paper writes it."""
    norms = (p.pow(2)[:, :, None] * weight.pow(2).sum(dim=(2, 3))[None]).sum(dim=1).sqrt()
    return SCALE * (p.sqrt().sum(dim=1).pow(2) * norms.sum(dim=1)).sum()


def oracle(logits: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Everything by autograd in float64; the task loss is 1/2 ||W' - target||^2."""
    leaf, base = logits.double().requires_grad_(), weight.double().requires_grad_()
    p = torch.softmax(leaf / TAU, dim=0)
    value = reference_penalty(p, base)
    slope, direct = torch.autograd.grad(value, (base, p), create_graph=True)
    (mixed,) = torch.autograd.grad((slope * target.double()).sum(), p, retain_graph=True)
    adapted = weight.double() - XI * STRENGTH * slope
    objective = 0.5 * (adapted - target.double()).pow(2).sum() + STRENGTH * reference_penalty(p, adapted)
    (hyper,) = torch.autograd.grad(objective, leaf)
    parts = {"R": value, "dR/dW": slope, "P * dR/dP": p * direct, "P * mixed term": p * mixed, "dJ/dA (exact)": hyper}
    return {name: part.detach() for name, part in parts.items()}


def ours(logits: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The same by the library, in the precision of its arguments."""
    p, w2 = torch.softmax(logits / TAU, dim=0), grouping.kernel_energy(weight)
    factor = grouping.adapted_factor(p, w2, SCALE, XI, STRENGTH)
    gradient = weight * factor[:, :, None, None] - target
    wg = grouping.kernel_products(weight, gradient)
    return {
        "R": grouping.penalty(p, w2, SCALE).squeeze(),
        "dR/dW": weight * grouping.penalty_slope(p, w2, SCALE)[:, :, None, None],
        "P * dR/dP": grouping.direct_term(p, w2, SCALE),
        "P * mixed term": grouping.mixed_term(p, w2, grouping.kernel_products(weight, target), SCALE),
        "dJ/dA (exact)": grouping.hypergradient(p, w2, wg, SCALE, xi=XI, strength=STRENGTH, tau=TAU, factor=factor),
    }


def errors(draws: int) -> dict[str, dict[torch.dtype, float]]:
    """The worst relative error of each quantity in float64 and float32."""
    worst: dict[str, dict[torch.dtype, float]] = defaultdict(lambda: defaultdict(float))
    for shape in SHAPES:
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(shape[:2], generator=generator)
            weight, target = (torch.randn(shape[1:], generator=generator) for _ in range(2))
            expected = oracle(logits, weight, target)
            for dtype in (torch.float64, torch.float32):
                for name, value in ours(logits.to(dtype), weight.to(dtype), target.to(dtype)).items():
                    error = float((value - expected[name]).abs().max() / expected[name].abs().max())
                    worst[name][dtype] = max(worst[name][dtype], error)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = errors(options.draws)
    rows = [
        (name, f"{e[torch.float64]:.1e}", f"{e[torch.float32]:.1e}", f"<= {TARGET:.0e}") for name, e in worst.items()
    ]
    result = tabulate(rows, ["quantity", "float64", "float32", "target (float64)"], "github", disable_numparse=True)
    print(result)
    if options.write:
        shapes = ", ".join("x".join(map(str, shape)) for shape in SHAPES)
        options.write.write_text(
            "# The gradients of group learning against autograd\n\n"
            "Relative error of the library's formulas against double backward in float64: the largest deviation over "
            f"the largest value, the worst of {options.draws} random draws of each of the shapes {shapes} (groups x "
            "filters x channels x kernel). The mixed term is d2R/dPdW along a random direction; dJ/dA is the whole "
            "hypergradient through the one-step adapted filters, with a quadratic task loss.\n\n"
            f"{result}\n\nOne-hot and vanishing assignments, zero group channels and single groups are compared with "
            "their limits in tests/method/test_grouping.py.\n\nMade by (any machine; torch "
            f"{torch.__version__.partition('+')[0]} here)\n\n"
            f"    python -m benchmarks.gradient_error --draws {options.draws} --write {options.write}\n"
        )


if __name__ == "__main__":
    main()
