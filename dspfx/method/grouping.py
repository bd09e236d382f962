"""Differentiable group learning as pure tensor functions (DSP, arXiv 2303.09736, section 3).

The regulariser sees a weight `W [O, C, *kernel]` (a linear one as [O, C, 1], a transposed one turned) only through
inner products over the kernel, `w2[o, c] = ||W[o, c]||^2` and `wg[o, c] = <W[o, c], g[o, c]>`, so everything below
works on `[O, C]` matrices:

    P   [..., G, O]   share of filter o in group g; every column sums to 1
    w2  [..., O, C]   squared norms of the kernels
    scale             weight of the layer, a number or a tensor [..., 1, 1]

Leading dimensions are layers of equal shape, all done by the same few operations. Where a group channel is zero
(L = 0) its subgradient is 0. No result divides by P: the direct and the mixed gradient come multiplied by it, on
their way to the logits, and stay finite for one-hot and vanishing P.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dspfx.ranks import is_shard

Scale = float | Tensor
_CACHED = 1 << 17  # elements of a weight that are gone through at a time


def sample_groups(
    logits: Tensor, tau: float, noise: Literal["textbook", "authors"], generator: torch.Generator
) -> Tensor:
    """A fresh soft assignment P [..., G, O] of logits A of that shape: the Gumbel softmax over groups.

    "textbook" is softmax((A + noise) / tau), "authors" softmax(A / tau + noise). The noise is drawn on the generator's
    device, so that a CPU generator gives every device and every rank the same sample.
    """
    draw = torch.empty(logits.shape, dtype=logits.dtype, device=generator.device).exponential_(generator=generator)
    gumbel = draw.clamp_(min=torch.finfo(draw.dtype).tiny).log_().neg_().to(logits.device)
    if noise == "textbook":
        return torch.softmax((logits + gumbel) / tau, dim=-2)
    return torch.softmax(logits / tau + gumbel, dim=-2)


def hard_groups(logits: Tensor) -> Tensor:
    """The hard assignment [..., G, O]: 1 at the first largest logit of each filter, 0 elsewhere, without noise."""
    return torch.zeros_like(logits).scatter_(-2, logits.argmax(dim=-2, keepdim=True), 1.0)


def layer_scale(
    groups: int, filters: int, kernel_height: int, relative_input: float, cost: Literal["flops", "params"]
) -> float:
    """The layer's weight sqrt(I) * k * (G / O)^1.5; `relative_input` is I, and cost="params" leaves sqrt(I) out."""
    spread = kernel_height * float(groups / filters) ** 1.5
    return spread * math.sqrt(relative_input) if cost == "flops" else spread


def kernel_energy(weight: Tensor) -> Tensor:
    """w2 [O, C] of a weight [O, C, *kernel]; half precision is summed in float32."""
    return kernel_products(weight, weight)


def kernel_products(weight: Tensor, other: Tensor) -> Tensor:
    """wg [O, C], the inner products of the kernels of two tensors [O, C, *kernel]; half precision in float32."""
    dtype = compute_dtype(weight)
    weight, other = weight.to(dtype).flatten(2), other.to(dtype).flatten(2)
    if weight.shape[2] == 1:
        return (weight * other).squeeze(2)
    if is_shard(weight):  # it cannot meet the plain tensor below
        return (weight * other).sum(dim=2)
    # A product with ones takes half the time of a sum over so short a dimension, and a few filters stay in the cache
    # until they are summed.
    ones, filters = weight.new_ones(weight.shape[2]), max(1, _CACHED // weight[0].numel())
    sums = [(w * o) @ ones for w, o in zip(weight.split(filters), other.split(filters), strict=True)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The precision in which a layer's regulariser is computed: the weight's own, at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


class _Terms(NamedTuple):
    """What every formula shares, computed once."""

    p2: Tensor  # P^2                              [..., G, O]
    root_p: Tensor  # P^(1/2)                      [..., G, O]
    root_s: Tensor  # s^(1/2) = sum_o P^(1/2)      [..., G, 1]
    norm: Tensor  # L                              [..., G, C]
    inverse: Tensor  # 1/L, and 0 where L = 0      [..., G, C]


def _terms(p: Tensor, w2: Tensor) -> _Terms:
    p2, root_p = p * p, p.sqrt()
    norm = (p2 @ w2).sqrt_()
    # Compared with 0 rather than kept where positive: a NaN must stay a NaN and be seen.
    inverse = norm.reciprocal().masked_fill_(norm == 0, 0.0)
    return _Terms(p2, root_p, root_p.sum(dim=-1, keepdim=True), norm, inverse)


def _slope(t: _Terms, scale: Scale) -> Tensor:
    # The layer's scale goes into the small factor, so that [O, C] is gone through once.
    return (t.p2 * t.root_s.square() * scale).mT @ t.inverse


def _direct(t: _Terms, w2: Tensor) -> Tensor:
    size = t.norm.sum(dim=-1, keepdim=True) * t.root_s * t.root_p
    return size.addcmul_(t.root_s.square() * t.p2, t.inverse @ w2.mT)


def _mixed(t: _Terms, w2: Tensor, wd: Tensor) -> Tensor:
    along = (t.p2 @ wd) * t.inverse  # dL along D, [..., G, C]
    size = t.root_s * t.root_p * along.sum(dim=-1, keepdim=True)
    bend = 2 * (t.inverse @ wd.mT) - (along * t.inverse * t.inverse) @ w2.mT
    return size.addcmul_(t.root_s.square() * t.p2, bend)


def penalty(p: Tensor, w2: Tensor, scale: Scale) -> Tensor:
    """R [..., 1, 1] = scale * sum_g s_g * sum_c L_gc, the regulariser of each layer."""
    t = _terms(p, w2)
    return scale * (t.root_s.square() * t.norm.sum(dim=-1, keepdim=True)).sum(dim=-2, keepdim=True)


def penalty_slope(p: Tensor, w2: Tensor, scale: Scale) -> Tensor:
    """The [..., O, C] matrix with dR/dW[o, c] = W[o, c] * slope[o, c], so that no weight has to be copied."""
    return _slope(_terms(p, w2), scale)


def direct_term(p: Tensor, w2: Tensor, scale: Scale) -> Tensor:
    """Q = P * dR/dP [..., G, O]."""
    return scale * _direct(_terms(p, w2), w2)


def mixed_term(p: Tensor, w2: Tensor, wd: Tensor, scale: Scale) -> Tensor:
    """P * (d2R/dP dW . D) [..., G, O] for a direction D of the weights, given as wd[o, c] = <W[o, c], D[o, c]>."""
    return scale * _mixed(_terms(p, w2), w2, wd)


def to_logits(q: Tensor, p: Tensor, tau: float) -> Tensor:
    """P * dF/dP -> dF/dA through the softmax, [..., G, O]."""
    return torch.addcmul(q, p, q.sum(dim=-2, keepdim=True), value=-1) / tau


def adapted_factor(p: Tensor, w2: Tensor, scale: Scale, xi: float, strength: float) -> Tensor:
    """The [..., O, C] factor f of the one-step adapted filters: W' = W - xi * strength * dR/dW(W, P) = f * W."""
    t = _terms(p, w2)
    small = (t.p2 * t.root_s.square() * (-xi * strength * scale)).mT
    if p.dim() == 3:
        return torch.baddbmm(p.new_ones(1, 1, 1), small, t.inverse)  # one pass
    return 1 + small @ t.inverse


def hypergradient(
    p: Tensor,
    w2: Tensor,
    wg: Tensor,
    scale: Scale,
    *,
    xi: float,
    strength: float,
    tau: float,
    factor: Tensor | None = None,
) -> Tensor:
    """dJ/dA [..., G, O] of J(A) = loss(W') + strength * R(W', P), W' = W - xi * strength * dR/dW(W, P).

    Args:
        p, w2, scale: P, the squared kernel norms and the layers' weights.
        wg: <W[o, c], g[o, c]> [..., O, C], where g is the gradient of the task loss.
        xi: the step of the adaptation, the current learning rate of the weights.
        strength: lambda, ramp included.
        tau: temperature of P.
        factor: `adapted_factor`'s f, when g was taken at W' = f * W (the exact hypergradient). None takes g as it is
            and evaluates everything else at W, which saves the second pass ("fused").
    """
    t = _terms(p, w2)
    if factor is None:
        adapted, w2_adapted, cross = t, w2, w2
    else:
        cross = factor * w2  # <W, W'>
        w2_adapted = factor * cross
        adapted = _terms(p, w2_adapted)
    # v = g + strength * dR/dW(W'), the gradient of the whole objective at the adapted filters; wv = <W, v>.
    wv = torch.addcmul(wg, _slope(adapted, scale), cross, value=strength)
    q = torch.add(_direct(adapted, w2_adapted), _mixed(t, w2, wv), alpha=-xi)
    return to_logits(q * (strength * scale), p, tau)
