"""An engine as a module: torch tensors in and out on the current stream, nothing copied."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dspfx.deploy.onnx import Nesting
from dspfx.deploy.tensorrt_build import load_tensorrt, make_log, start
from dspfx.deploy.tensorrt_file import check_gpu, check_machine, read_engine, this_machine
from dspfx.errors import InputError, RuntimeBuildError, StorageError

if TYPE_CHECKING:
    import tensorrt as api


class TensorRTModule(nn.Module):
    """An engine of `build_tensorrt`, called as the network that it was made of, and returning what that returns.

    It runs on PyTorch's current stream of the current CUDA device. Inputs lie there and are contiguous (others are made
    so, which copies); outputs are new tensors. After a first call with the same shapes, a call can be captured in a
    CUDA graph. Calls from several threads at once need a module each. An engine of a foreign ONNX file takes its inputs
    in order and returns a tensor, or a tuple of them.

    Attributes:
        metadata: what the file says of itself.
        batches: the smallest and the largest batch; None where the engine is for one shape.

    Raises:
        ConfigError: TensorRT is absent or too old, or there is no GPU.
        StorageError: the file is missing or damaged.
        MismatchError: the engine is for another GPU or version.
        RuntimeBuildError: TensorRT does not take it.
    """

    device_type = "cuda"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        trt = load_tensorrt()
        check_gpu("TensorRTModule")
        self.metadata, engine = read_engine(Path(path))
        check_machine(Path(path), self.metadata, this_machine(str(trt.__version__)))
        self._log = make_log(trt, False)
        runtime: api.Runtime = start(trt, lambda: trt.Runtime(self._log))
        self._runtime = runtime  # the engine's owner
        self._open(runtime.deserialize_cuda_engine(engine), Path(path))
        self.nesting = _nesting(self.metadata)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class.

        Raises InputError where the call is of another kind than that of the network, or its batch is outside the
        engine's.
        """
        if self.nesting is None:
            outputs = self._run([x for x in args if isinstance(x, Tensor)])
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        return self.nesting.nest_outputs(self._run(self.nesting.flatten_inputs(args, kwargs)))

    def __deepcopy__(self, memo: Any) -> TensorRTModule:
        """Itself: an engine does not change, and its context is nobody's to copy."""
        return self

    def _open(self, engine: api.ICudaEngine | None, path: Path) -> None:
        """Reads off the engine what a call needs."""
        context: api.IExecutionContext | None = engine.create_execution_context() if engine is not None else None
        if engine is None or context is None:
            raise RuntimeBuildError(f"TensorRT does not take the engine in {path}:\n" + "\n".join(self._log.errors))
        trt = load_tensorrt()
        self._engine, self._context = engine, context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        known = _dtypes(trt)
        self._dtypes = {name: known[engine.get_tensor_dtype(name)] for name in names}
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self.batches: tuple[int, int] | None = None
        for name in self._inputs:
            if tuple(engine.get_tensor_shape(name))[:1] == (-1,):
                low, _, high = engine.get_tensor_profile_shape(name, 0)
                self.batches = (low[0], high[0])

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        self._check(tensors)
        context: api.IExecutionContext = self._context
        shapes = tuple(tuple(x.shape) for x in tensors)
        if shapes != self._shapes:  # a context keeps its shapes; a graph is captured with those of the call before
            for name, shape in zip(self._inputs, shapes, strict=True):
                if not context.set_input_shape(name, shape):
                    self._shapes = ()
                    raise InputError(f"the engine does not take {name} of shape {list(shape)}; build one that does.")
            self._out_shapes = [tuple(context.get_tensor_shape(name)) for name in self._outputs]
            self._shapes = shapes
        held = [x.contiguous() for x in tensors]
        device = held[0].device if held else torch.device(self.device_type)
        outputs = [
            torch.empty(shape, dtype=self._dtypes[name], device=device)
            for name, shape in zip(self._outputs, self._out_shapes, strict=True)
        ]
        for name, x in zip([*self._inputs, *self._outputs], [*held, *outputs], strict=True):
            context.set_tensor_address(name, x.data_ptr())
        if not context.execute_async_v3(_stream(device)):
            raise RuntimeError("TensorRT did not run the engine:\n" + "\n".join(self._log.errors))
        return outputs

    def _check(self, tensors: list[Tensor]) -> None:
        if len(tensors) != len(self._inputs):
            raise InputError(f"the engine takes {len(self._inputs)} tensors and got {len(tensors)}.")
        for name, x in zip(self._inputs, tensors, strict=True):
            if x.device.type != self.device_type or x.dtype != self._dtypes[name]:
                raise InputError(
                    f"{name} is {x.dtype} on {x.device}, and the engine takes {self._dtypes[name]} on the GPU; move or "
                    f"convert it with .to(...)."
                )
            if self.batches and x.dim() and not self.batches[0] <= x.shape[0] <= self.batches[1]:
                low, high = self.batches
                raise InputError(
                    f"{name} has a batch of {x.shape[0]}, and the engine was built for {low} to {high}; split it, or "
                    f"build with batch=({low}, ..., {max(x.shape[0], high)})."
                )


def _stream(device: torch.device) -> int:
    """PyTorch's current stream, as a number."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def _dtypes(trt: Any) -> dict[Any, torch.dtype]:
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT8: torch.int8,
        trt.DataType.UINT8: torch.uint8,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.BOOL: torch.bool,
    }


def _nesting(metadata: dict[str, str]) -> Nesting | None:
    """How the network's inputs and outputs were nested, where the file tells."""
    if "dspfx.nesting" not in metadata:
        return None
    try:
        return Nesting.from_json(metadata["dspfx.nesting"])
    except Exception as error:  # JSON of another shape, or of a type that is not registered here
        raise StorageError(f"the engine's description of its inputs and outputs cannot be read ({error}).") from error
