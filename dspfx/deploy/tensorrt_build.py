"""A TensorRT network from an ONNX file, and an engine from that: the calls of TensorRT's builder and parser.

Every variable that holds something of TensorRT's has its type written down: tests/deploy/tensorrt_contract.py holds
each name used on it against the real bindings of TensorRT 10 and 11.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspfx.errors import ConfigError, RuntimeBuildError

if TYPE_CHECKING:
    import tensorrt as api

OLDEST = 10
Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        exact: float32 stays float32; without it TensorRT may round it to TensorFloat32.
        workspace: bytes of scratch memory; None leaves all of the GPU's.
        aux_streams: streams beside the one of the call, on which parallel branches can run; None leaves it to TensorRT.
        verbose: print what TensorRT says.
    """

    exact: bool = False
    workspace: int | None = None
    aux_streams: int | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("workspace", "aux_streams"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name} is {value!r}; give None or an integer of at least 0.")


def load_tensorrt() -> Any:
    """The package `tensorrt`; ConfigError where it is absent, or older than the oldest that dspfx works with."""
    try:
        trt = importlib.import_module("tensorrt")
    except Exception as error:  # its libraries raise what they like
        raise ConfigError(
            f"TensorRT cannot be imported ({type(error).__name__}: {error}); run: pip install tensorrt-cu13, or "
            f"tensorrt-cu12 where the driver is of CUDA 12."
        ) from error
    if int(str(trt.__version__).partition(".")[0]) < OLDEST:
        raise ConfigError(f"TensorRT {trt.__version__} is too old for dspfx; run: pip install --upgrade tensorrt-cu13")
    return trt


def make_log(trt: Any, verbose: bool) -> Any:
    """A logger that prints what matters (everything if `verbose`) and keeps the errors in `.errors`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            if verbose:
                print(f"[TensorRT] {message}")

    return Log()


def build_engine(file: Path, profile: Profile, options: BuildOptions, cache: bytes) -> tuple[bytes, bytes]:
    """(the engine, the timing cache afterwards) of an ONNX file, on this machine's GPU.

    Args:
        profile: input name -> (smallest, usual, largest shape), for every input with a free size.
        cache: a timing cache, or nothing.

    Raises:
        ConfigError: TensorRT is absent or too old.
        RuntimeBuildError: TensorRT does not start, refuses the file (every error, with its node), or builds nothing.
    """
    trt = load_tensorrt()
    log = make_log(trt, options.verbose)
    builder: api.Builder = start(trt, lambda: trt.Builder(log))
    # Version 11 knows no other networks than strongly typed ones: precision is what the ONNX file says.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if _major(trt) == OLDEST else 0
    network: api.INetworkDefinition = builder.create_network(flags)
    parser: api.OnnxParser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):
        errors = [_told(parser.get_error(i)) for i in range(parser.num_errors)]
        raise RuntimeBuildError(f"TensorRT {trt.__version__} refuses {file.name}:\n" + "\n".join(errors or log.errors))
    config: api.IBuilderConfig = _configured(trt, builder, profile, options, cache)
    engine: api.IHostMemory | None = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeBuildError(
            f"TensorRT {trt.__version__} builds no engine of {file.name}; it says:\n" + "\n".join(log.errors)
        )
    timings: api.ITimingCache = config.get_timing_cache()
    serialized: api.IHostMemory = timings.serialize()
    return bytes(memoryview(engine)), bytes(memoryview(serialized))


def network_inputs(file: Path) -> dict[str, tuple[int, ...]]:
    """Input name -> shape of an ONNX file, -1 where a size is free."""
    graph = importlib.import_module("onnx").load(str(file), load_external_data=False).graph
    known = {tensor.name for tensor in graph.initializer}
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim
        )
        for value in graph.input
        if value.name not in known
    }


def batch_profile(shapes: Mapping[str, tuple[int, ...]], batch: tuple[int, int, int]) -> Profile:
    """The profile of inputs whose first size is free.

    Raises ConfigError where another size is free, or the batches are not in order.
    """
    low, usual, high = batch
    if not 1 <= low <= usual <= high:
        raise ConfigError(f"batch is {batch}; give (smallest, usual, largest) in this order, at least 1.")
    profile = {}
    for name, shape in shapes.items():
        if -1 in shape[1:]:
            raise ConfigError(
                f"{name} has the shape {list(shape)}, where -1 is free; only the batch, the first size, may be: export "
                f"the network for one image size."
            )
        if shape[:1] == (-1,):
            profile[name] = ((low, *shape[1:]), (usual, *shape[1:]), (high, *shape[1:]))
    return profile


def start(trt: Any, make: Any) -> Any:
    """What `make` makes; RuntimeBuildError where TensorRT does not start, which its bindings tell by a TypeError."""
    try:
        made = make()
    except (TypeError, RuntimeError) as error:
        raise RuntimeBuildError(
            f"TensorRT {trt.__version__} does not start ({error}); is it for this driver's CUDA? tensorrt-cu13 is for "
            f"CUDA 13, tensorrt-cu12 for CUDA 12, and nvidia-smi names the newest that the driver has."
        ) from error
    return made


def _major(trt: Any) -> int:
    return int(str(trt.__version__).partition(".")[0])


def _configured(
    trt: Any, builder: api.Builder, profile: Profile, options: BuildOptions, cache: bytes
) -> api.IBuilderConfig:
    config: api.IBuilderConfig = builder.create_builder_config()
    if options.exact:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    if profile:
        shapes: api.IOptimizationProfile = builder.create_optimization_profile()
        for name, (low, usual, high) in profile.items():
            shapes.set_shape(name, tuple(low), tuple(usual), tuple(high))
        config.add_optimization_profile(shapes)
    known: api.ITimingCache | None = config.create_timing_cache(cache)
    # None for what is no cache; not taken is one of another GPU or version.
    if known is None or not config.set_timing_cache(known, ignore_mismatch=False):
        blank: api.ITimingCache = config.create_timing_cache(b"")
        config.set_timing_cache(blank, ignore_mismatch=False)
    return config


def _told(error: api.ParserError) -> str:
    """One error of the parser, whole."""
    place = f"node {error.node()} {error.node_name()!r} ({error.node_operator()})"
    return f"{place}: {error.desc()} [{error.code()}, {error.func()} in {error.file()}:{error.line()}]"
