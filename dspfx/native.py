"""Part of a lowered network that runs as one program of the native kernels (dspfx/kernels)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dspfx.errors import InputError
from dspfx.graph.native_layers import Unsupported, floats
from dspfx.graph.to_chain import chain_of
from dspfx.held import Held, handle_of, is_recorded, module_of
from dspfx.kernels.chain import Chain, Shape
from dspfx.kernels.engine import Engine
from dspfx.kernels.library import library_or_none
from dspfx.kernels.op import has_kernel
from dspfx.kernels.tiles import conv_tiles


class NativeChain(nn.Module):
    """`plain`, a graph of ordinary layers, run by the native kernels wherever these can: float32 on the CPU, no grad.

    Everywhere else (another device or type, training, an export, no compiler) it is `plain` that runs, whose layers are
    dense and hold the zeros of their groups. Inputs and outputs are those of `plain`: [N, C, H, W] or [N, features],
    one tensor or a tuple of several. Weights are packed at the first call, and again when they have changed.
    """

    def __init__(self, plain: fx.GraphModule) -> None:
        super().__init__()
        self.plain = plain.requires_grad_(False)
        self._engine: Engine | None = None
        self._held: Held | None = None  # what the engine was made of
        self.handle = handle_of(self)

    def forward(self, *inputs: Tensor) -> Any:
        if not self._can_run(inputs):
            return self.plain(*inputs)
        if torch.compiler.is_compiling():
            outputs = torch.ops.dspfx.native_chain(list(inputs), self.handle)
        else:
            try:
                outputs = self.engine(inputs)(list(inputs))
            except (InputError, Unsupported):  # too large for the kernels, or for nobody: then the plain layers say why
                return self.plain(*inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def computed(self) -> dict[str, float]:
        """By name in `plain`, the share of each convolution's multiply-adds that are computed: not those with zeros."""
        kernels = library_or_none()
        shares = {}
        for name, layer in self.plain.named_modules():
            if isinstance(layer, nn.Conv2d) and kernels is not None:
                tiles = conv_tiles(floats(layer.weight), layer.groups, kernels.max_filters)
                pairs = sum(len(tile.filters) * len(tile.channels) for tile in tiles)
                shares[name] = pairs / (layer.weight.shape[0] * layer.weight.shape[1])
        return shares

    def chain(self, shapes: tuple[Shape, ...]) -> Chain:
        """Its layers, for inputs of these shapes (of one image)."""
        return chain_of(self.plain, shapes)

    def engine(self, inputs: Sequence[Tensor]) -> Engine:
        """The chain, packed for this machine; anew where a weight is another one or was changed in place.

        Any inputs of these numbers of channels will do.
        """
        engine, held = self._engine, self._held
        if engine is None or held is None or not held.holds():
            self._engine = engine = Engine(self.chain(image_shapes(inputs)))
            self._held = Held(self.plain)
        return engine

    def _can_run(self, inputs: tuple[Tensor, ...]) -> bool:
        for x in inputs:
            if type(x) not in _PLAIN or x.dtype != torch.float32 or not x.is_cpu:
                return False
            if x.shape[0] != inputs[0].shape[0]:  # one of them is no batch
                return False
        if torch.is_grad_enabled():
            own = self._held.tensors if self._held else self.plain.parameters()
            if any(t.requires_grad for t in (*inputs, *own)):
                return False
        return not (is_recorded(_CPU) or self.training) and has_kernel(_CPU, torch.float32)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._engine = None  # tensors may get other memory, which no version tells
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = handle_of(self)


class ChainOperation(nn.Module):
    """A NativeChain as the one operation torch.ops.dspfx.native_chain, for exporters; its weights are not theirs."""

    def __init__(self, chain: NativeChain) -> None:
        super().__init__()
        self._chain = (chain,)  # hidden from parameters()

    def forward(self, *inputs: Tensor) -> Any:
        outputs = torch.ops.dspfx.native_chain(list(inputs), self._chain[0].handle)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def has_chains(network: nn.Module) -> bool:
    """Whether native kernels run a part of it."""
    return any(isinstance(module, NativeChain) for module in network.modules())


def with_chains(network: nn.Module, form: Callable[[NativeChain], nn.Module]) -> nn.Module:
    """A copy of a network with something else in the place of its chains, such as their plain layers."""
    twin = copy.deepcopy(network)
    for name, module in list(twin.named_modules()):
        if isinstance(module, NativeChain):
            twin.set_submodule(name, form(module))
    return twin


def image_shapes(inputs: Sequence[Tensor]) -> tuple[Shape, ...]:
    """Without the batch."""
    return tuple(tuple(int(n) for n in x.shape[1:]) for x in inputs)


_PLAIN = (Tensor, nn.Parameter)  # no fake tensor, and no proxy
_CPU = torch.device("cpu")


@torch.library.custom_op("dspfx::native_chain", mutates_args=())
def native_chain(inputs: list[Tensor], handle: int) -> list[Tensor]:
    """A NativeChain as one operation, for torch.compile."""
    found: list[Tensor] = module_of(handle).engine(inputs)(inputs)
    return found


@native_chain.register_fake
def _shapes(inputs: list[Tensor], handle: int) -> list[Tensor]:
    with unset_fake_temporarily():  # the weights are real
        chain = module_of(handle).engine(inputs).chain
    shapes = chain.shapes(image_shapes(inputs))
    return [inputs[0].new_empty((inputs[0].shape[0], *shapes[value])) for value in chain.outputs]
