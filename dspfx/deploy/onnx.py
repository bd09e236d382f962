"""A network as an ONNX file over flat lists of tensors, and the nesting that its inputs and outputs had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.errors import InputError, RuntimeBuildError
from dspfx.graph.samples import samples

ONE_FILE = 1_900_000_000  # bytes of weights that go into one file; its format ends at 2^31
_CONSTANTS = (bool, str, type(None))


class Nesting:
    """How a network's inputs and outputs are nested around their tensors, read off one call of it.

    Everything in the inputs that is no tensor is part of the network from then on, and so is every size but the
    batch: the first axis of each tensor that was as long as the batch; that one too unless `any_batch`.

    Raises RuntimeBuildError where the network returns something else than tensors, bools, words and None.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, any_batch: bool) -> None:
        self.inputs = inputs
        self.leaves, self.spec = _flatten(inputs.args, inputs.kwargs)
        self.tensors = [x for x in self.leaves if isinstance(x, Tensor)]
        batch = samples(inputs) if any_batch else None
        self.free = [x.dim() > 0 and x.shape[0] == batch for x in self.tensors]
        self.signature = self._signature(self.leaves)
        with torch.no_grad():
            outputs, self.out_spec = pytree.tree_flatten(network(*inputs.args, **inputs.kwargs))
        for leaf in outputs:
            if not isinstance(leaf, (Tensor, *_CONSTANTS)):
                raise RuntimeBuildError(f"it returns a {type(leaf).__name__}; only tensors can be returned")
        self.out_constants = [None if isinstance(x, Tensor) else (x,) for x in outputs]

    def nest_inputs(self, tensors: list[Tensor]) -> Inputs:
        """The inputs whose tensors these are."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(x, Tensor) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return Inputs(*args, **kwargs)

    def flatten_inputs(self, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors of a call; InputError where it is another kind of call than the first one."""
        leaves, spec = _flatten(args, kwargs)
        if spec != self.spec or self._signature(leaves) != self.signature:
            raise InputError(
                f"this network was built for ({_text(self.inputs, self.free)}) and is called with "
                f"({_text(Inputs(*args, **kwargs), [])}); build it again with such inputs."
            )
        return [x for x in leaves if isinstance(x, Tensor)]

    def nest_outputs(self, tensors: list[Tensor]) -> Any:
        """The network's output whose tensors these are."""
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if x is None else x[0] for x in self.out_constants], self.out_spec)

    def _signature(self, leaves: list[Any]) -> list[Any]:
        """What two calls have to have in common: sizes but for the batch, which is the same in all tensors."""
        free = iter(self.free)
        signature: list[Any] = []
        batches = set()
        for x in leaves:
            if not isinstance(x, Tensor):
                signature.append((type(x), x))
            elif next(free, False) and x.dim():
                batches.add(x.shape[0])
                signature.append((x.dtype, x.shape[1:]))
            else:
                signature.append((x.dtype, x.shape))
        return [*signature, len(batches)]


def _flatten(args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten((args, dict(sorted(kwargs.items()))))


class _Kind(str):
    """A tensor's kind, which prints without quotes."""

    __repr__ = str.__str__


def _text(inputs: Inputs, free: list[bool]) -> str:
    """Inputs as in a call, tensors as "float32[N, 3, 8, 8]"; N where a size is `free`."""
    marks = iter(free)

    def kind(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        sizes = ["N", *map(str, x.shape[1:])] if next(marks, False) else map(str, x.shape)
        return _Kind(f"{str(x.dtype).removeprefix('torch.')}[{', '.join(sizes)}]")

    args, kwargs = pytree.tree_map(kind, (inputs.args, dict(sorted(inputs.kwargs.items()))))
    return ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])


class _Flat(nn.Module):
    """A network as a function from tensors to a tuple of tensors."""

    def __init__(self, network: nn.Module, nesting: Nesting) -> None:
        super().__init__()
        self.network = network
        self.nesting = nesting

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = self.nesting.nest_inputs(list(tensors))
        output = self.network(*inputs.args, **inputs.kwargs)
        return tuple(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor))


def write_onnx(network: nn.Module, nesting: Nesting, path: Path) -> list[str]:
    """Writes a network in eval mode as ONNX; weights that one file of 2 GB cannot hold go into a second one.

    OpenVINO reads a second file not once but for each shape that it compiles, when it may be gone.

    Returns:
        The names of the file's inputs, in the order of `nesting.tensors`.

    Raises:
        Exception: whatever torch's exporter raises; also where `nesting` says that any batch does, and the graph holds
            for some only, because the model's Python looked at the batch.
    """
    batch = torch.export.Dim("batch")
    axes = tuple({0: batch} if free else None for free in nesting.free)
    with torch.no_grad():
        exported = torch.export.export(_Flat(network, nesting), tuple(nesting.tensors), dynamic_shapes=(axes,))
    names = [f"input{i}" for i in range(len(nesting.tensors))]
    program = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=names)
    assert program is not None
    size = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    program.save(path, external_data=size > ONE_FILE)
    return names
