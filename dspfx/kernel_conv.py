"""A convolution split into branches that one kernel computes together, where there is one for its device and type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import ConfigError
from dspfx.held import Held, handle_of, is_recorded, module_of
from dspfx.kernels.op import group_conv2d, has_kernel
from dspfx.kernels.structure import Structure, window_count
from dspfx.modules import GroupConv2d


class KernelConv2d(GroupConv2d):
    """A GroupConv2d that calls torch.ops.dspfx.group_conv2d, without gradients: in Triton on GPUs, native on the CPU.

    Everywhere else (training, an export, a type or a machine without a kernel) its branches run. Weights are packed
    at the first call, and again when they have changed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        first = self.branches[0]
        assert isinstance(first, nn.Conv2d)
        if not suits_kernel(first):
            raise ConfigError(
                f"KernelConv2d got padding={first.padding!r} with padding_mode={first.padding_mode!r}; the kernels pad "
                f"with numbers of zeros. Use GroupConv2d."
            )
        self._held: Held | None = None
        self._packed: tuple[Tensor, Tensor | None, Tensor] | None = None
        self._handle = handle_of(self)

    def forward(self, x: Tensor) -> Tensor:
        if not self._can_run(x):
            return super().forward(x)
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.dspfx.kernel_conv(x, self._handle)
            return y
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The kernel's result, for what it can run."""
        if self._packed is None or self._held is None or not self._held.holds():
            self._held, self._packed = Held(self), self._pack()
        first = self.branches[0]
        assert isinstance(first, nn.Conv2d)
        options = {name: getattr(first, name) for name in ("stride", "padding", "dilation")}
        return group_conv2d(x, *self._packed, **options)

    def _can_run(self, x: Tensor) -> bool:
        if type(x) is not Tensor or x.dim() != 4:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        return not is_recorded(x.device) and has_kernel(x.device, x.dtype)

    @torch.no_grad()
    def _pack(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """(packed weight, bias, structure) of the branches."""
        convs = [branch for branch in self.branches if isinstance(branch, nn.Conv2d)]
        height, width = convs[0].kernel_size
        structure = Structure(self.out_channels, self.in_channels, (height, width), self.groups).encode()
        packed = torch.cat([conv.weight.flatten() for conv in convs])
        if convs[0].bias is None:
            return packed, None, structure
        bias = packed.new_zeros(self.out_channels)
        for group, conv in zip(self.groups, convs, strict=True):
            assert conv.bias is not None
            bias[list(group.filters)] = conv.bias
        if self.rest_bias is not None:
            bias[list(self.rest)] = self.rest_bias
        return packed, bias, structure

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._held = self._packed = None  # tensors may get other memory, which no version tells
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = handle_of(self)


def suits_kernel(conv: Any) -> bool:
    """Whether the kernels can pad as an nn.Conv2d does: with zeros, a number of them."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


@torch.library.custom_op("dspfx::kernel_conv", mutates_args=())
def _kernel_conv(x: Tensor, handle: int) -> Tensor:
    """A KernelConv2d as one operation, for torch.compile."""
    found: Tensor = module_of(handle).run(x)
    return found


@_kernel_conv.register_fake
def _shape(x: Tensor, handle: int) -> Tensor:
    module: KernelConv2d = module_of(handle)
    first: Any = module.branches[0]
    windows = zip(x.shape[2:], first.kernel_size, first.stride, first.padding, first.dilation, strict=True)
    return x.new_empty((x.shape[0], module.out_channels, *(window_count(*window) for window in windows)))
