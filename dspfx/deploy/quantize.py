"""INT8 in an ONNX file: explicit pairs of QuantizeLinear and DequantizeLinear, symmetric, as TensorRT takes them.

x -> conv(w)    becomes    x -> Q -> DQ -> conv(w -> Q -> DQ)
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dspfx.config import Inputs
from dspfx.deploy.exported import on_cpu
from dspfx.deploy.onnx import Nesting
from dspfx.errors import ConfigError

QUANTISED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def quantize(path: Path, nesting: Nesting, batches: Iterable[Any]) -> None:
    """Puts the pairs into the file, with scales from the largest values that the batches make.

    Zero points are zero, weights have a scale a channel and stay stored in float32 (what builds an engine folds them),
    biases and outputs are left alone.

    Raises:
        ConfigError: there is no batch.
        InputError: a batch is not as the network is called.
    """
    quantization = importlib.import_module("onnxruntime.quantization")
    names = [value.name for value in importlib.import_module("onnx").load(str(path)).graph.input]
    floating = path.with_name(f"floating_{path.name}")
    path.replace(floating)
    quantization.quantize_static(
        floating,
        path,
        reader(quantization.CalibrationDataReader, names, nesting, batches),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=list(QUANTISED),
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": True,  # TensorRT makes the integers itself
            "QuantizeBias": False,  # it has no int32 DequantizeLinear
            "OpTypesToExcludeOutputQuantization": list(QUANTISED),  # so that what follows is fused first
        },
    )
    floating.unlink()


def reader(base: Any, names: list[str], nesting: Nesting, batches: Iterable[Any]) -> Any:
    """The batches as ONNX Runtime's calibration reads them."""

    def feeds() -> Iterator[dict[str, Any]]:
        for example in batches:
            inputs = on_cpu(Inputs.of(example))
            tensors = nesting.flatten_inputs(inputs.args, inputs.kwargs)
            yield {name: x.detach().contiguous().numpy() for name, x in zip(names, tensors, strict=True)}

    source = feeds()
    first = next(source, None)
    if first is None:
        raise ConfigError("calibration holds no batch; give some hundred images like those that the network will see.")
    waiting = [first]

    class Reader(base):
        def get_next(self) -> Any:
            return waiting.pop() if waiting else next(source, None)

    return Reader()
