"""A network as an ONNX file over flat lists of tensors, and the nesting that its inputs and outputs had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.deploy.onnx_chains import Kernels, embed_chains, translations
from dspfx.deploy.onnx_dft import write_out_transforms
from dspfx.deploy.onnx_folding import optimize
from dspfx.deploy.onnx_indices import narrow_indices
from dspfx.deploy.onnx_norms import merge_statistics
from dspfx.deploy.onnx_pads import keep_pads_apart
from dspfx.errors import InputError, RuntimeBuildError
from dspfx.graph.inputs import describe
from dspfx.graph.samples import samples
from dspfx.native import ChainOperation, with_chains
from dspfx.storage.container import decode_inputs, encode_inputs

OPSET = 20  # the newest that every TensorRT from 10.0 on reads, and the first with a Gelu
OPSET_BF16 = 22  # the first in which convolutions take bfloat16
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

    def to_json(self) -> str:
        """What `from_json` makes an equal nesting of; outputs of a type that has no name there become a tuple."""
        try:
            spec = pytree.treespec_dumps(self.out_spec)
        except Exception:  # whatever the type's own description raises
            spec = pytree.treespec_dumps(pytree.tree_structure((0,) * len(self.out_constants)))
        inputs = encode_inputs(describe(self.inputs.args, self.inputs.kwargs))
        return json.dumps({"inputs": inputs, "free": self.free, "outputs": spec, "constants": self.out_constants})

    @classmethod
    def from_json(cls, text: str) -> Nesting:
        """The nesting that `to_json` described, without a network."""
        content = json.loads(text)
        self = cls.__new__(cls)
        self.inputs = decode_inputs(content["inputs"])
        self.leaves, self.spec = _flatten(self.inputs.args, self.inputs.kwargs)
        self.tensors = [x for x in self.leaves if isinstance(x, Tensor)]
        self.free = [bool(free) for free in content["free"]]
        self.signature = self._signature(self.leaves)
        self.out_spec = pytree.treespec_loads(content["outputs"])
        self.out_constants = [None if x is None else tuple(x) for x in content["constants"]]
        return self

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
    """A network as a function from tensors to a tuple of tensors; of float32, whatever dtype it computes in."""

    def __init__(self, network: nn.Module, nesting: Nesting, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        self.nesting = nesting
        self.dtype = dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = self.nesting.nest_inputs([self._cast(x, torch.float32, self.dtype) for x in tensors])
        output = self.network(*inputs.args, **inputs.kwargs)
        # An output that is an input would take the input's name with it.
        leaves = [x.clone() if any(x is y for y in tensors) else x for x in _tensors(output)]
        return tuple(self._cast(x, self.dtype, torch.float32) for x in leaves)

    def _cast(self, x: Tensor, old: torch.dtype | None, new: torch.dtype | None) -> Tensor:
        return x.to(new) if self.dtype is not None and x.dtype == old else x


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]


def write_onnx(
    network: nn.Module,
    nesting: Nesting,
    path: Path,
    dtype: torch.dtype | None = None,
    kernels: Kernels | None = None,
) -> list[str]:
    """Writes a network in eval mode as ONNX; weights that one file of 2 GB cannot hold go into a second one.

    OpenVINO reads a second file not once but for each shape that it compiles, when it may be gone. What the exporter
    notes of each operation (its place in the sources, by path) is left out.

    Args:
        dtype: where the network has been converted to another one, casts at inputs and outputs keep these in float32.
        kernels: NativeChains are one operation of these kernels each; else they are written as their plain layers.

    Returns:
        The names of the file's inputs, in the order of `nesting.tensors`.

    Raises:
        Exception: whatever torch's exporter raises; also where `nesting` says that any batch does, and the graph holds
            for some only, because the model's Python looked at the batch.
    """
    batch = torch.export.Dim("batch")
    axes = tuple({0: batch} if free else None for free in nesting.free)
    flat = _Flat(network if kernels is None else with_chains(network, ChainOperation), nesting, dtype)
    with torch.no_grad():
        exported = torch.export.export(flat, tuple(nesting.tensors), dynamic_shapes=(axes,))
    names = [f"input{i}" for i in range(len(nesting.tensors))]
    outputs = [f"output{i}" for i in range(nesting.out_constants.count(None))]
    opset = OPSET_BF16 if dtype == torch.bfloat16 else OPSET
    program = torch.onnx.export(
        exported,
        dynamo=True,
        verbose=False,
        optimize=False,  # by ourselves
        input_names=names,
        output_names=outputs,
        opset_version=opset,
        custom_translation_table=translations() if kernels else None,
    )
    assert program is not None
    optimize(program.model)
    for change in (merge_statistics, write_out_transforms, narrow_indices, keep_pads_apart, _forget_origins):
        change(program.model.graph)
    if kernels:
        embed_chains(program.model.graph, kernels)
    size = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    program.save(path, external_data=size > ONE_FILE)
    return names


def _forget_origins(graph: Any) -> None:
    """Removes what the exporter notes of each operation and value: lines of the sources, names from torch.export."""
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
