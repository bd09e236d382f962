"""torch.ops.dspfx.group_conv2d: a group convolution as one operation, for inference, on the CPU and on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dspfx.errors import InputError
from dspfx.kernels import triton_conv
from dspfx.kernels.chain import Activation, Chain, Conv, Floats
from dspfx.kernels.engine import Engine
from dspfx.kernels.library import library_or_none
from dspfx.kernels.structure import Structure, check_call, check_fit, reference, unpack, window_count

_GPU_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def group_conv2d(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    structure: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(conv(input) + bias + residual) of a packed weight and its structure (`pack`); [N, O, H', W'].

    Native on the CPU in float32, where a compiler is; in Triton on GPUs in float32, float16 and bfloat16; in plain
    torch (`reference`, whose arguments these are) everywhere else. Without gradients. torch.compile and torch.export
    keep it as one operation.

    Raises InputError and ConfigError where the arguments do not fit each other; no index reaches native code unchecked.
    """
    head = structure[[0, 2, 3]].tolist() if structure.dim() == 1 and len(structure) > 3 else [0, 0, 0]
    found: Tensor = torch.ops.dspfx.group_conv2d(
        input, packed, bias, structure, head, list(stride), list(padding), list(dilation), residual, activation
    )
    return found


@torch.compiler.assume_constant_result
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there the operation, and what is made of it, is more than its reference."""
    if device.type == "cuda":
        return dtype in _GPU_TYPES and triton_conv.is_available()
    return device.type == "cpu" and dtype == torch.float32 and library_or_none() is not None


@torch.library.custom_op("dspfx::group_conv2d", mutates_args=())
def _group_conv2d(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    structure: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`size` is (O, kh, kw), which a structure that is traced cannot be asked for."""
    has_own = has_kernel(input.device, input.dtype)
    if has_own and input.is_cuda:
        return triton_conv.group_conv2d(input, packed, bias, structure, stride, padding, dilation, residual, activation)
    arguments = (input, packed, bias, structure, stride, padding, dilation, residual, activation)
    if has_own:
        return _native(size, *arguments)
    return reference(*arguments)


@_group_conv2d.register_fake
def _shape(input: Tensor, packed: Tensor, bias: Any, structure: Tensor, size: list[int], *rest: Any) -> Tensor:
    stride, padding, dilation, _, _ = rest
    windows = zip(input.shape[2:], size[1:], stride, padding, dilation, strict=True)
    return input.new_empty((input.shape[0], size[0], *(window_count(*window) for window in windows)))


# packed weight -> (what belongs to it, the structure, the engine)
_engines: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _native(
    size: list[int], input: Tensor, packed: Tensor, bias: Tensor | None, structure: Tensor, *rest: Any
) -> Tensor:
    stride, padding, dilation, residual, activation = rest
    options = (tuple(stride), tuple(padding), tuple(dilation), residual is not None, activation)
    versions = tuple((id(t), t._version) for t in (packed, bias, structure) if t is not None)
    known = _engines.get(packed)
    if known is None or known[0] != (versions, options):
        checked, _ = check_call(input, packed, bias, structure, *rest)
        engine = _engine(packed, bias, structure, options)
        # The bias and the structure are kept, so that no others can have their ids.
        _engines[packed] = known = ((versions, options), checked, engine, (bias, structure))
    read: Structure = known[1]
    if [read.out_channels, *read.kernel] != list(size):
        raise InputError(
            f"group_conv2d got the size {list(size)}; its structure's is {[read.out_channels, *read.kernel]}."
        )
    check_fit(read, input, packed, bias, *rest)
    inputs = [input] if residual is None else [input, residual]
    return known[2](inputs)[0]


def _engine(packed: Tensor, bias: Tensor | None, structure: Tensor, options: tuple[Any, ...]) -> Engine:
    stride, padding, dilation, adds, activation = options
    weight = unpack(packed.detach(), structure)
    shift: Floats = (packed.new_zeros(len(weight)) if bias is None else bias.detach()).numpy()
    kind: Activation = activation
    inputs = 2 if adds else 1
    conv = Conv(0, inputs, weight.numpy(), shift, stride, padding, dilation, 1, 1 if adds else None, kind)
    return Engine(Chain(inputs, (conv,), (inputs,)))
