"""The operations that dspfx has a rule for, by what they do to channels; movements stand in moves.py, layers in
layers.py, and what users add in RULES."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dspfx.errors import ConfigError

Rule = Literal["elementwise", "channelwise", "movement"]
_RULES = ("elementwise", "channelwise", "movement")
RULES: dict[Any, Rule] = {}


def register_rule(operation: Callable[..., Any] | str, rule: Rule) -> None:
    """Tells every later `prepare`, `lower` and `selfcheck` what an operation does to channels (dimension 1).

    Args:
        operation: a function as it is called in the model, the name of a tensor method, or a module class (whose
            instances are then not traced into).
        rule: "elementwise" (each output element comes from the input element at its place, and from nothing else
            but scalars), "channelwise" (each output channel comes from the input channel at its place, all by the
            same computation, as in pooling) or "movement" (output elements are input elements at other places, and
            the operation runs on integer tensors too).

    A rule that does not hold gives wrong networks, as `selfcheck` shows. Raises ConfigError for what is none of these.
    """
    is_module = isinstance(operation, type) and issubclass(operation, nn.Module)
    if not (callable(operation) or isinstance(operation, str)) or (isinstance(operation, type) and not is_module):
        raise ConfigError(
            f"register_rule got {operation!r}; give a function, the name of a tensor method or a module class."
        )
    if rule not in _RULES:
        raise ConfigError(f"register_rule got the rule {rule!r}; give one of {', '.join(map(repr, _RULES))}.")
    RULES[operation] = rule


POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU,
    nn.ELU, nn.CELU, nn.SELU, nn.Tanh, nn.Softplus, nn.Softsign, nn.Mish, nn.LogSigmoid, nn.Threshold, nn.Hardshrink,
)  # fmt: skip
POINTWISE = {
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.abs, torch.neg, torch.square),
    *(torch.clamp, torch.pow, torch.erf, torch.log1p, operator.neg, operator.pow, F.relu, F.relu_, F.relu6, F.hardtanh),
    *(F.silu, F.gelu, F.sigmoid, F.hardsigmoid, F.hardswish, F.leaky_relu, F.elu, F.celu, F.selu, F.tanh, F.softplus),
    *(F.softsign, F.mish, F.logsigmoid, F.hardshrink, F.threshold),
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "exp", "sqrt", "abs", "neg", "square", "clamp", "clamp_", "pow"),
    *("clamp_min", "clamp_max", "erf", "float", "double", "half", "bfloat16", "to", "type_as", "type"),
}
BINARY = {
    *(torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.maximum, torch.minimum),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul),
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum"),
}
POOLS = {
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.max_pool1d),
    *(torch.max_pool2d, torch.max_pool3d, torch.avg_pool1d, torch._C._nn.avg_pool2d, torch._C._nn.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
}
POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ReflectionPad2d,
    nn.ReplicationPad2d,
)  # fmt: skip
REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}
IDENTITY_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
IDENTITIES = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torchvision.ops.stochastic_depth}
FROM_ZERO = {"mul", "mul_", "imul", "div", "div_", "truediv", "true_divide"}
