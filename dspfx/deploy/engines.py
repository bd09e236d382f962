"""ONNX Runtime and OpenVINO, each started from an ONNX file: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
Engine = Callable[[Arrays], Arrays]


def start_onnxruntime(path: Path, names: list[str], threads: int, library: Path | None = None) -> Engine:
    """A session on the CPU with all graph optimisations; it takes every batch that the file takes.

    `library` has operators that the file uses.
    """
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors are raised; printed as well, they would be said twice
    # Threads that keep spinning after a call would take the processor from whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(arrays: Arrays) -> Arrays:
        found: Arrays = session.run(None, dict(zip(names, arrays, strict=True)))
        return found

    return run


class OpenVino:
    """A model on the CPU for latency, in float32; compiled once for each batch it meets, so that shapes are static."""

    def __init__(self, path: Path, names: list[str], threads: int) -> None:
        openvino = importlib.import_module("openvino")
        self.model = _core().read_model(path)
        _keep_reorderings(self.model, importlib.import_module("openvino.opset13"))
        self.names = names
        self.shape = openvino.PartialShape
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
            "ENABLE_CPU_PINNING": False,  # a core that others use, too, would be the only one
        }
        self.requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, arrays: Arrays) -> Arrays:
        shapes = tuple(x.shape for x in arrays)
        request = self.requests.get(shapes)
        if request is None:
            request = self.requests[shapes] = self._compile(shapes)
        found = request.infer(arrays, share_inputs=True)
        return [found[i] for i in range(len(self.model.outputs))]

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        self.model.reshape({name: self.shape(list(shape)) for name, shape in zip(self.names, shapes, strict=True)})
        return _core().compile_model(self.model, "CPU", self.options).create_infer_request()


@cache
def _core() -> Any:
    """OpenVINO, loaded once and never unloaded.

    Its processor plugin gives the process a stack for signal handlers and takes that memory with it when it goes
    (2026.4 at least): the next signal, such as the end of a data loader's worker, would end the process.
    """
    core = importlib.import_module("openvino").Core()
    core.set_property({"ENABLE_MMAP": False})  # files go before the models do
    return core


def _keep_reorderings(model: Any, ops: Any) -> None:
    """Every Gather that reorders an axis takes its indices as a matrix; what the model computes stays the same.

    OpenVINO (2026.4 at least) folds a Gather by a vector that holds all channels into the next convolution's weights,
    as it does where a preprocessing step reverses colours, but by the inverse order: the result is wrong wherever
    the order is not its own inverse. It does not look at matrices.
    """
    for gather in [op for op in model.get_ops() if op.get_type_name() == "Gather"]:
        indices, axis = (gather.input_value(i).get_node() for i in (1, 2))
        if indices.get_type_name() != "Constant" or axis.get_type_name() != "Constant":
            continue
        order, position = np.asarray(indices.data), int(np.asarray(axis.data).item())
        if order.ndim != 1 or sorted(order.tolist()) != list(range(len(order))):
            continue
        users = list(gather.output(0).get_target_inputs())
        matrix = ops.gather(gather.input_value(0), ops.constant(order[None]), ops.constant(position))
        position %= gather.output(0).get_partial_shape().rank.get_length()
        vector = ops.squeeze(matrix, ops.constant([position]))
        for user in users:
            user.replace_source_output(vector.output(0))
