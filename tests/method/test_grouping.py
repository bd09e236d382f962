"""The formulas of group learning against double backward in float64, against a plain loop, and at their limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dspfx.method import grouping

TOLERANCE = 1e-9
SHAPES = [(4, 16, 16, 3, 3), (1, 8, 4, 3, 3), (3, 7, 5, 1, 1), (2, 6, 3, 5, 5), (4, 9, 2, 1, 7), (8, 8, 1, 3, 3)]


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 logits A [G, O], weight W [O, C, kh, kw] and a gradient of its shape."""
    generator = torch.Generator().manual_seed(seed)
    groups, *weight = shape
    logits = torch.randn(groups, weight[0], generator=generator, dtype=torch.float64)
    return (
        logits,
        torch.randn(weight, generator=generator, dtype=torch.float64),
        torch.randn(weight, generator=generator, dtype=torch.float64),
    )


def reference_penalty(p: Tensor, weight: Tensor, scale: float) -> Tensor:
    """R, written down from the paper for autograd: no shortcut of the library."""
    energy = weight.pow(2).sum(dim=(2, 3))
    norms = (p.pow(2)[:, :, None] * energy[None]).sum(dim=1).sqrt()
    return scale * (p.sqrt().sum(dim=1).pow(2) * norms.sum(dim=1)).sum()


def close(ours: Tensor, oracle: Tensor) -> None:
    error = float((ours - oracle).abs().max() / oracle.abs().max().clamp(min=1e-300))
    assert ours.shape == oracle.shape
    assert error <= TOLERANCE


@pytest.fixture(params=list(itertools.product(SHAPES, range(2))), ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    shape, seed = request.param
    return draw(shape, seed)


def test_penalty_equals_a_plain_loop(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, weight, _ = case
    p = torch.softmax(logits, dim=0)
    total = 0.0
    for g in range(p.shape[0]):
        size = sum(math.sqrt(p[g, o]) for o in range(p.shape[1])) ** 2
        for c in range(weight.shape[1]):
            square = sum(float(p[g, o] ** 2 * (weight[o, c] ** 2).sum()) for o in range(p.shape[1]))
            total += 0.7 * size * math.sqrt(square)
    ours = grouping.penalty(p, grouping.kernel_energy(weight), 0.7)
    assert float(ours) == pytest.approx(total, rel=TOLERANCE)


def test_weight_gradient_equals_autograd(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, weight, _ = case
    p = torch.softmax(logits, dim=0)
    leaf = weight.clone().requires_grad_()
    (oracle,) = torch.autograd.grad(reference_penalty(p, leaf, 0.7), leaf)
    slope = grouping.penalty_slope(p, grouping.kernel_energy(weight), 0.7)
    close(weight * slope[:, :, None, None], oracle)


def test_direct_term_divided_by_p_is_the_gradient_for_p(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, weight, _ = case
    p = torch.softmax(logits, dim=0).requires_grad_()
    (oracle,) = torch.autograd.grad(reference_penalty(p, weight, 0.7), p)
    q = grouping.direct_term(p.detach(), grouping.kernel_energy(weight), 0.7)
    close(q / p.detach(), oracle)


def test_direct_term_reaches_the_logits(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, weight, _ = case
    leaf = logits.clone().requires_grad_()
    p = torch.softmax(leaf / 0.5, dim=0)
    (oracle,) = torch.autograd.grad(reference_penalty(p, weight, 0.7), leaf)
    q = grouping.direct_term(p.detach(), grouping.kernel_energy(weight), 0.7)
    ours = grouping.to_logits(q, p.detach(), 0.5)
    # With one group P is 1 whatever the logits are, and both sides are nothing but rounding around 0.
    assert float((ours - oracle).abs().max()) <= TOLERANCE * float(q.abs().max())


def test_mixed_term_divided_by_p_equals_double_backward(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, weight, direction = case
    p = torch.softmax(logits, dim=0).requires_grad_()
    leaf = weight.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reference_penalty(p, leaf, 0.7), leaf, create_graph=True)
    (oracle,) = torch.autograd.grad((slope * direction).sum(), p)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, direction)
    close(grouping.mixed_term(p.detach(), energy, products, 0.7) / p.detach(), oracle)


def quadratic(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weight: 0.5 * (weight - target).pow(2).sum() + (weight.sum(dim=(1, 2, 3)).tanh() * 3).sum()


@pytest.mark.parametrize("strength", [2e-3, 0.3])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=str)
def test_exact_hypergradient_equals_autograd_of_the_whole_objective(shape: tuple[int, ...], strength: float) -> None:
    logits, weight, target = draw(shape)
    loss, xi, tau, scale = quadratic(target), 0.05, 0.5, 0.4
    leaf, base = logits.clone().requires_grad_(), weight.clone().requires_grad_()
    p = torch.softmax(leaf / tau, dim=0)
    (slope,) = torch.autograd.grad(reference_penalty(p, base, scale), base, create_graph=True)
    adapted = weight - xi * strength * slope
    (oracle,) = torch.autograd.grad(loss(adapted) + strength * reference_penalty(p, adapted, scale), leaf)

    fixed, energy = p.detach(), grouping.kernel_energy(weight)
    factor = grouping.adapted_factor(fixed, energy, scale, xi, strength)
    moved = (weight * factor[:, :, None, None]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(moved), moved)
    products = grouping.kernel_products(weight, gradient)
    ours = grouping.hypergradient(fixed, energy, products, scale, xi=xi, strength=strength, tau=tau, factor=factor)
    close(ours, oracle)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=str)
def test_fused_hypergradient_takes_everything_at_the_weights_as_they_are(shape: tuple[int, ...]) -> None:
    logits, weight, gradient = draw(shape)
    xi, tau, scale, strength = 0.05, 0.5, 0.4, 0.3
    leaf, base = logits.clone().requires_grad_(), weight.clone().requires_grad_()
    p = torch.softmax(leaf / tau, dim=0)
    value = reference_penalty(p, base, scale)
    (slope,) = torch.autograd.grad(value, base, create_graph=True)
    v = (gradient + strength * slope).detach()
    (oracle,) = torch.autograd.grad(strength * (value - xi * (slope * v).sum()), leaf)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    close(
        grouping.hypergradient(p.detach(), energy, products, scale, xi=xi, strength=strength, tau=tau),
        oracle,
    )


def test_a_batch_of_layers_equals_the_layers_one_by_one() -> None:
    draws = [draw((4, 6, 5, 3, 3), seed) for seed in range(3)]
    scales = [0.2, 0.5, 0.9]
    rows = [(torch.softmax(a, dim=0), grouping.kernel_energy(w), grouping.kernel_products(w, g)) for a, w, g in draws]
    p, energy, products = (torch.stack(column) for column in zip(*rows, strict=True))
    scale = torch.tensor(scales, dtype=torch.float64)[:, None, None]
    factor = grouping.adapted_factor(p, energy, scale, 0.05, 0.1)
    both = grouping.hypergradient(p, energy, products, scale, xi=0.05, strength=0.1, tau=0.5, factor=factor)
    for index, (row, own) in enumerate(zip(rows, scales, strict=True)):
        single = grouping.adapted_factor(*row[:2], own, 0.05, 0.1)
        close(factor[index], single)
        close(both[index], grouping.hypergradient(*row, own, xi=0.05, strength=0.1, tau=0.5, factor=single))
        close(grouping.penalty(p, energy, scale)[index], grouping.penalty(*row[:2], own))


# Edges ---------------------------------------------------------------------------------------------------------------


def limit(hard: Tensor, epsilon: float) -> Tensor:
    """The one-hot assignment approached from inside: `epsilon` in every empty place."""
    return hard * (1 - (hard.shape[0] - 1) * epsilon) + (1 - hard) * epsilon


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=str)
def test_one_hot_groups_are_finite_and_equal_the_limit(shape: tuple[int, ...]) -> None:
    logits, weight, gradient = draw(shape)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    hard = grouping.hard_groups(logits)
    near = limit(hard, 1e-28)  # terms in sqrt(p): 1e-14 away from the limit
    for at_limit, ours in (
        (grouping.direct_term(near, energy, 0.7), grouping.direct_term(hard, energy, 0.7)),
        (grouping.mixed_term(near, energy, products, 0.7), grouping.mixed_term(hard, energy, products, 0.7)),
        (grouping.penalty_slope(near, energy, 0.7), grouping.penalty_slope(hard, energy, 0.7)),
        (grouping.penalty(near, energy, 0.7), grouping.penalty(hard, energy, 0.7)),
    ):
        assert torch.isfinite(ours).all()
        close(ours, at_limit)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-12])
def test_vanishing_p_equals_high_precision_arithmetic(epsilon: float) -> None:
    mpmath = pytest.importorskip("mpmath", reason="the oracle for vanishing P is mpmath's arithmetic")
    logits, weight, gradient = draw((3, 4, 2, 1, 1))
    p = limit(grouping.hard_groups(logits), epsilon)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    with mpmath.workdps(60):
        w = [[mpmath.mpf(float(weight[o, c])) for c in range(2)] for o in range(4)]
        d = [[mpmath.mpf(float(gradient[o, c])) for c in range(2)] for o in range(4)]

        def value(g: int, o: int, shift: Any, along: Any) -> Any:
            """R of group g where p[g, o] moved by `shift` and the weights by `along` times the direction."""
            row = [mpmath.mpf(float(p[g, i])) + (shift if i == o else 0) for i in range(4)]
            norms = (
                mpmath.sqrt(sum(row[i] ** 2 * (w[i][c] + along * d[i][c]) ** 2 for i in range(4))) for c in range(2)
            )
            return sum(mpmath.sqrt(x) for x in row) ** 2 * sum(norms)

        direct, mixed = torch.zeros_like(p), torch.zeros_like(p)
        for g, o in itertools.product(range(3), range(4)):
            share = mpmath.mpf(float(p[g, o]))
            h, k = share * mpmath.mpf("1e-15"), mpmath.mpf("1e-15")
            slope = (value(g, o, h, 0) - value(g, o, -h, 0)) / (2 * h)
            corners = value(g, o, h, k) - value(g, o, h, -k) - value(g, o, -h, k) + value(g, o, -h, -k)
            direct[g, o] = float(share * slope)
            mixed[g, o] = float(share * corners / (4 * h * k))
    assert torch.allclose(grouping.direct_term(p, energy, 1.0), direct, rtol=TOLERANCE, atol=0)
    assert torch.allclose(grouping.mixed_term(p, energy, products, 1.0), mixed, rtol=TOLERANCE, atol=1e-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-30, 0.0])
def test_vanishing_p_is_finite_in_every_precision(epsilon: float, dtype: torch.dtype) -> None:
    logits, weight, gradient = (x.to(dtype) for x in draw((4, 9, 5, 3, 3)))
    p = limit(grouping.hard_groups(logits), epsilon)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    factor = grouping.adapted_factor(p, energy, 0.7, 0.05, 0.1)
    ours = grouping.hypergradient(p, energy, products, 0.7, xi=0.05, strength=0.1, tau=0.5, factor=factor)
    # A saturated softmax passes nothing on: the limit is 0, approached like sqrt(p) on the scale of P * dR/dP.
    size = float(grouping.direct_term(p, energy, 0.7).max())
    assert torch.isfinite(ours).all()
    assert float(ours.abs().max()) <= 1e-5 * size


def test_a_zero_group_channel_has_subgradient_zero() -> None:
    logits, weight, gradient = draw((3, 6, 4, 3, 3))
    weight[:, 1] = 0
    p = torch.softmax(logits, dim=0)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    assert (grouping.penalty_slope(p, energy, 0.7)[:, 1] == 0).all()
    others = [0, 2, 3]  # the channel contributes nothing: as if it were not there
    close(grouping.direct_term(p, energy, 0.7), grouping.direct_term(p, energy[:, others], 0.7))
    close(
        grouping.mixed_term(p, energy, products, 0.7),
        grouping.mixed_term(p, energy[:, others], products[:, others], 0.7),
    )


def test_an_all_zero_layer_has_no_gradient_at_all() -> None:
    p = torch.softmax(draw((3, 6, 4, 3, 3))[0], dim=0)
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    ours = grouping.hypergradient(p, zeros, zeros, 0.7, xi=0.1, strength=0.1, tau=0.5)
    assert (ours == 0).all()
    assert (grouping.penalty_slope(p, zeros, 0.7) == 0).all()


def test_one_group_leaves_nothing_to_decide() -> None:
    logits, weight, gradient = draw((1, 6, 4, 3, 3))
    p = torch.softmax(logits, dim=0)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    ours = grouping.hypergradient(p, energy, products, 0.7, xi=0.1, strength=0.1, tau=0.5)
    assert (ours == 0).all()
    # R is O^2 times the plain group lasso over input channels.
    lasso = 36 * weight.pow(2).sum(dim=(0, 2, 3)).sqrt().sum()
    assert float(grouping.penalty(p, energy, 1.0)) == pytest.approx(float(lasso), rel=TOLERANCE)


def test_nan_weights_give_nan_and_are_not_hidden() -> None:
    logits, weight, gradient = draw((2, 4, 3, 3, 3))
    weight[1, 1] = torch.nan
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    ours = grouping.hypergradient(torch.softmax(logits, 0), energy, products, 0.7, xi=0.1, strength=0.1, tau=0.5)
    assert torch.isnan(ours).any()


# Sampling, scale, precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["textbook", "authors"])
def test_samples_are_assignments_and_come_from_the_given_generator(noise: Literal["textbook", "authors"]) -> None:
    logits = torch.randn(4, 10)
    before = torch.get_rng_state()
    first, second, again = (
        grouping.sample_groups(logits, 0.5, noise, generator)
        for generator in (torch.Generator().manual_seed(s) for s in (1, 2, 1))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.allclose(first.sum(dim=0), torch.ones(10))
    assert (first >= 0).all()


def test_textbook_noise_picks_groups_with_the_probabilities_of_the_logits() -> None:
    logits = torch.tensor([[2.0], [1.0], [0.0]]).expand(3, 40_000).contiguous()
    sample = grouping.sample_groups(logits, 0.5, "textbook", torch.Generator().manual_seed(0))
    share = grouping.hard_groups(sample).mean(dim=1)
    assert torch.allclose(share, torch.softmax(logits[:, 0], dim=0), atol=0.01)


def test_authors_noise_is_not_divided_by_tau() -> None:
    logits = torch.tensor([[2.0], [1.0], [0.0]]).expand(3, 40_000).contiguous()
    sample = grouping.sample_groups(logits, 0.5, "authors", torch.Generator().manual_seed(0))
    share = grouping.hard_groups(sample).mean(dim=1)
    assert torch.allclose(share, torch.softmax(logits[:, 0] / 0.5, dim=0), atol=0.01)


def test_hard_groups_take_the_first_largest_logit() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    assert torch.equal(grouping.hard_groups(logits), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))


def test_layer_scale() -> None:
    assert grouping.layer_scale(4, 16, 3, 4.0, "flops") == pytest.approx(2 * 3 / 8)
    assert grouping.layer_scale(4, 16, 3, 4.0, "params") == pytest.approx(3 / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    weight, gradient = (50 * torch.randn(8, 4, 3, 3)).to(dtype), (50 * torch.randn(8, 4, 3, 3)).to(dtype)
    energy, products = grouping.kernel_energy(weight), grouping.kernel_products(weight, gradient)
    assert energy.dtype == products.dtype == torch.float32
    assert torch.allclose(energy, weight.float().pow(2).sum((2, 3)), rtol=1e-5)
    assert torch.allclose(products, (weight.float() * gradient.float()).sum((2, 3)), rtol=1e-4, atol=1e-2)


def test_energies_do_not_depend_on_the_memory_layout() -> None:
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    other = weight.to(memory_format=torch.channels_last)
    close(grouping.kernel_energy(other), grouping.kernel_energy(weight))
    close(grouping.kernel_products(other, weight), grouping.kernel_energy(weight))
