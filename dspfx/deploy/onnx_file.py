"""A finished ONNX file: checked, given metadata, run in float32 where its own type has no kernels."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dspfx.deploy.engines import start_onnxruntime
from dspfx.deploy.onnx import Nesting


def check_file(path: Path) -> None:
    """Raises what ONNX's checker raises; shapes and types are inferred, strictly, and have to agree with the file's.

    By path: a file beside it may hold the weights.
    """
    onnx = importlib.import_module("onnx")
    onnx.checker.check_model(str(path), full_check=True)


def read_graph(path: Path) -> Any:
    """The onnx.ModelProto, without weights that lie in a file beside it."""
    return importlib.import_module("onnx").load(str(path), load_external_data=False)


def read_metadata(path: Path) -> dict[str, str]:
    """What the file says of itself."""
    return {prop.key: prop.value for prop in read_graph(path).metadata_props}


def write_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Adds to what the file says of itself; weights in a file beside it stay there."""
    model = read_graph(path)
    known = {prop.key: prop.value for prop in model.metadata_props} | dict(metadata)
    del model.metadata_props[:]
    for key, value in known.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def start_file(path: Path, nesting: Nesting, threads: int = 1, library: Path | None = None) -> Any:
    """The function that calls the file on ONNX Runtime as the network is called; `library` has its operators."""
    names = [value.name for value in read_graph(path).graph.input]
    engine = start_onnxruntime(path, names, threads, library)

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays = [x.detach().contiguous().numpy() for x in nesting.flatten_inputs(args, kwargs)]
        return nesting.nest_outputs([torch.from_numpy(x) for x in engine(arrays)])

    return call


def in_float32(path: Path, folder: Path) -> Path:
    """A file in `folder` with a bfloat16 one's rounded weights that computes in float32, for processors without it."""
    onnx = importlib.import_module("onnx")
    old, new = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load(str(path))
    for tensor in [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]:
        if tensor.data_type == old:
            values = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == old:
                attribute.i = new
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == old:
            value.type.tensor_type.elem_type = new
    twin = folder / f"float32_{path.name}"
    onnx.save(model, str(twin))
    return twin
