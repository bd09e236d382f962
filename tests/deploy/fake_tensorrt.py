"""A stand-in for the package `tensorrt` whose engines are ONNX files run by ONNX Runtime on the CPU.

It has what dspfx uses, and nothing that the real bindings lack (test_tensorrt_contract.py holds it against them), and
takes note of what it was asked for. It can prove dspfx's side of the calls, not what TensorRT does with them.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspfx.deploy import tensorrt_file, tensorrt_module

onnx, onnxruntime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))  # neither has type hints
__version__ = "10.99.0"
asked: dict[str, Any] = {}


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 8


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class TensorIOMode(enum.IntEnum):
    INPUT = 1
    OUTPUT = 2


DataType = enum.IntEnum("DataType", "FLOAT HALF BF16 INT8 UINT8 INT32 INT64 BOOL")
_KINDS = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64, "tensor(bool)": DataType.BOOL}
_NUMPY = {DataType.FLOAT: np.float32, DataType.INT64: np.int64, DataType.BOOL: np.bool_}


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        INFO = 3

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content + b"+"


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self) -> None:
        self.max_aux_streams = -1
        self._profile = IOptimizationProfile()
        self._cache = ITimingCache(b"")

    def clear_flag(self, flag: BuilderFlag) -> None:
        asked.setdefault("cleared", []).append(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        asked[pool.name] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profile = profile
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return None if serialized_timing_cache == b"no cache" else ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return cache._content != b"of another GPU"

    def get_timing_cache(self) -> ITimingCache:
        return self._cache


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        asked["flags"] = flags
        self._file = b""


class ParserError:
    def __init__(self, index: int) -> None:
        self._index = index

    def code(self) -> str:
        return "UNSUPPORTED_NODE"

    def desc(self) -> str:
        return f"no importer, says {self._index}"

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parseNode"

    def line(self) -> int:
        return 7

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return f"node_BitwiseXor_{self._index}"

    def node_operator(self) -> str:
        return "BitwiseXor"


class OnnxParser:
    """Refuses files with a BitwiseXor."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self.num_errors = 0

    def parse_from_file(self, model: str) -> bool:
        content = Path(model).read_bytes()
        self.num_errors = sum(node.op_type == "BitwiseXor" for node in onnx.load_from_string(content).graph.node)
        self._network._file = content
        return self.num_errors == 0

    def get_error(self, index: int) -> ParserError:
        return ParserError(index)


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        asked["config"] = IBuilderConfig()
        return asked["config"]

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        """The ONNX file; every value in it is larger by `asked["wrong"]` when it runs."""
        if config.max_aux_streams == 13:
            self._logger.log(ILogger.Severity.INFO, "building")
            self._logger.log(ILogger.Severity.ERROR, "no tactic for node_Conv_0")
            return None
        asked["profile"] = config._profile._shapes
        return network._file


class ICudaEngine:
    def __init__(self, content: bytes) -> None:
        self._session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self._tensors = [*self._session.get_inputs(), *self._session.get_outputs()]
        self.num_io_tensors = len(self._tensors)

    def _named(self, name: str) -> Any:
        return next(x for x in self._tensors if x.name == name)

    def get_tensor_name(self, index: int) -> str:
        name: str = self._tensors[index].name
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = [x.name for x in self._session.get_inputs()]
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _KINDS[self._named(name).type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._named(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return list(asked["profile"][name])

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        asked["shapes set"] = asked.get("shapes set", 0) + 1
        self._shapes[name] = shape
        known = self._engine.get_tensor_shape(name)
        return len(known) == len(shape) and all(a in (-1, b) for a, b in zip(known, shape, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if size == -1 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._places[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        asked["stream"] = stream_handle
        engine = self._engine
        values = {x.name: self._memory(x.name, self._shapes[x.name]).copy() for x in engine._session.get_inputs()}
        outputs = [x.name for x in engine._session.get_outputs()]
        for name, value in zip(outputs, engine._session.run(outputs, values), strict=True):
            self._memory(name, value.shape)[...] = (
                value * (1 + asked.get("wrong", 0.0)) if value.dtype == "f" else value
            )
        return True

    def _memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = np.dtype(_NUMPY[self._engine.get_tensor_dtype(name)])
        size = int(np.prod(shape)) * kind.itemsize
        content = memoryview((ctypes.c_char * size).from_address(self._places[name])).cast("B")
        return np.frombuffer(content, kind).reshape(shape)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if serialized_engine == b"of another version":
            self._logger.log(ILogger.Severity.ERROR, "the tag does not match")
            return None
        return ICudaEngine(serialized_engine)


@contextmanager
def installed(gpu: str = "NVIDIA Fake") -> Iterator[dict[str, Any]]:
    """TensorRT is this module inside, and its GPU the CPU; gives what it was `asked`, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", sys.modules[__name__])
        patch.setattr(tensorrt_file, "_gpu", lambda: (gpu, "9.0"))
        patch.setattr(tensorrt_module, "_stream", lambda device: 4711)
        patch.setattr(tensorrt_module.TensorRTModule, "device_type", "cpu")
        asked.clear()
        yield asked
