"""Eval mode for a while, without losing what was frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode, and the graph that goes with it, is back."""
    models = list(models)
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:  # through train() first: a traced network's graph follows it
            module.train(training)
        for module, training in before:  # a parent's train() may have reached a module that was frozen
            module.training = training
