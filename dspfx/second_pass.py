"""The gradient somewhere else: a second forward and backward at other weights, after which nothing has happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dspfx.errors import ConfigError
from dspfx.gates import GateBatch


def gradient_at(
    gm: nn.Module, closure: Callable[[], Tensor], batches: list[GateBatch], factors: list[Tensor]
) -> list[list[Tensor]]:
    """d closure() / d weights of each batch, at weights times factors; zero where the closure does not use a weight.

    Afterwards the weights, the buffers of `gm` and the random number generators are bit for bit what they were, also
    when the closure raises; `.grad` is never touched. In a distributed training it is the gradient of this rank's own
    batch: `torch.autograd.grad` passes DDP's hooks by.

    Raises:
        ConfigError: the closure does not return a scalar loss that depends on the weights.
    """
    with _moved(batches, factors), _untouched_buffers(gm), torch.random.fork_rng(_cuda_devices(gm)):
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ConfigError(
                f"The closure given to GroupLearner.step returned {_describe(loss)}; return the scalar loss of a "
                "forward pass, with gradients enabled and without calling backward()."
            )
        weights = [weight for batch in batches for weight in batch.parameters]
        flat = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True) if weights else ()
    gradients = iter(flat)
    return [[next(gradients) for _ in batch.gates] for batch in batches]


def _describe(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return f"a {type(loss).__name__}"
    return f"a tensor of shape {tuple(loss.shape)} {'with' if loss.requires_grad else 'without'} a gradient"


@contextmanager
def _moved(batches: list[GateBatch], factors: list[Tensor]) -> Iterator[None]:
    """Weights times factors, then the very weights again. An enclosing autocast must not serve its stale casts."""
    weights = [weight for batch in batches for weight in batch.parameters]
    saved = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for batch, factor in zip(batches, factors, strict=True):
                batch.multiply(factor)
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, saved, strict=True):
                weight.copy_(value)
        torch.clear_autocast_cache()


@contextmanager
def _untouched_buffers(module: nn.Module) -> Iterator[None]:
    """BN statistics and other buffers come back with their values, and as the same tensors if they were replaced."""
    found = [
        (owner, key, b, b.clone()) for owner in module.modules() for key, b in owner._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, key, buffer, value in found:
                owner._buffers[key] = buffer.copy_(value)


def _cuda_devices(module: nn.Module) -> list[torch.device]:
    return list({tensor.device for tensor in module.parameters() if tensor.is_cuda})
