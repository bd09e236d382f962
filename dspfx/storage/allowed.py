"""What a stored network may be made of: fixed tables of functions, methods, tensor attributes and layers.

A file is hostile until proven otherwise: it names things, and only names in these tables mean anything. Everything here
computes on tensors, sizes and bools; nothing reads files, imports, or turns text into code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import swin_transformer
from torchvision.models.convnext import LayerNorm2d

from dspfx.graph import moves, ops
from dspfx.graph.traced import TrainingFlag
from dspfx.graph.tracer import expect
from dspfx.grouped import PaddedGroupConv2d
from dspfx.kernel_conv import KernelConv2d
from dspfx.modules import GroupConv2d
from dspfx.norms import SparseNorm

_NAMESPACES: dict[str, Any] = {
    "operator": operator,
    "torch": torch,
    "torch.nn.functional": F,
    "torch.fft": torch.fft,
    "torchvision.ops": torchvision.ops,
}
# What occurs in networks beside the operations that have a rule: arithmetic on sizes, comparisons, layers written as
# functions, attention.
_FURTHER: dict[str, str] = {
    "operator": "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ getitem matmul "
    "iadd isub imul itruediv",
    "torch": "_assert matmul bmm baddbmm einsum cumsum max min argmax argmin topk var std log rsqrt sin cos where "
    "softmax log_softmax tensor zeros ones full arange zeros_like ones_like full_like repeat_interleave meshgrid outer "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm layer_norm group_norm",
    "torch.nn.functional": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm "
    "layer_norm group_norm instance_norm local_response_norm softmax log_softmax normalize prelu glu unfold fold "
    "grid_sample scaled_dot_product_attention alpha_dropout softmin softshrink tanhshrink lp_pool2d pad logsigmoid "
    "threshold",
    "torch.fft": "fft ifft fft2 ifft2 rfft irfft rfft2 irfft2",
}


# torchvision tells torch.fx not to trace into these.
_SWIN = ("_get_relative_position_bias", "_patch_merging_pad", "shifted_window_attention")
_FURTHER_METHODS = (
    "size dim numel max min argmax argmin topk cumsum softmax log_softmax matmul bmm norm var std log rsqrt sin cos "
    "floor ceil round bool int long unfold masked_fill where eq ne lt le gt ge mul_ div_ add_ sub_ swapdims moveaxis "
    "new_zeros new_ones new_full fill_ zero_ stride is_floating_point element_size"
)
_KNOWN: tuple[Any, ...] = (
    *(*ops.POINTWISE, *ops.BINARY, *ops.POOLS, *ops.REDUCTIONS, *ops.IDENTITIES),
    *(*moves.FUNCTIONS, *moves.METHODS),
)


def _functions() -> dict[str, Callable[..., Any]]:
    named = {(space, name) for space, names in _FURTHER.items() for name in names.split()}
    named |= {
        (space, known.__name__)
        for known in _KNOWN
        if not isinstance(known, str) and not known.__name__.startswith("_")
        for space, module in _NAMESPACES.items()
        if getattr(module, known.__name__, None) == known
    }
    table = {f"{space}.{name}": getattr(_NAMESPACES[space], name) for space, name in sorted(named)}
    wrapped = {f"torchvision.swin.{name}": getattr(swin_transformer, name) for name in _SWIN}
    return table | wrapped | {"getattr": getattr, "dspfx.expect": expect}


FUNCTIONS: dict[str, Callable[..., Any]] = _functions()
METHODS: frozenset[str] = frozenset((*(k for k in _KNOWN if isinstance(k, str)), *_FURTHER_METHODS.split()))
ATTRIBUTES: frozenset[str] = frozenset({"shape", "dtype", "device", "T", "mT", "ndim", "values", "indices"})

_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d),
    *(nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.MultiheadAttention),
    *(nn.PReLU, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.Softshrink, nn.Tanhshrink, nn.RReLU),
    *(nn.ZeroPad1d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d),
    *(nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d),
    *(nn.CircularPad3d, nn.LPPool1d, nn.LPPool2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Unfold, nn.Fold),
    *(*ops.POINTWISE_MODULES, *ops.POOL_MODULES, *ops.IDENTITY_MODULES, *moves.MODULES),
)
LAYERS: dict[str, type[nn.Module]] = {
    **{f"torch.nn.{layer.__name__}": layer for layer in _LAYERS},
    "torchvision.LayerNorm2d": LayerNorm2d,
    "torchvision.FrozenBatchNorm2d": torchvision.ops.FrozenBatchNorm2d,
    "dspfx.GroupConv2d": GroupConv2d,
    "dspfx.PaddedGroupConv2d": PaddedGroupConv2d,
    "dspfx.KernelConv2d": KernelConv2d,
    "dspfx.SparseNorm": SparseNorm,
    "dspfx.TrainingFlag": TrainingFlag,
}
FUNCTION_NAMES: dict[Callable[..., Any], str] = {function: name for name, function in reversed(FUNCTIONS.items())}
LAYER_NAMES: dict[type[nn.Module], str] = {layer: name for name, layer in LAYERS.items()}
