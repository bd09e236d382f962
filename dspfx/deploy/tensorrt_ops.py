"""The ONNX operations that TensorRT's parser takes, as published with it.

Source: docs/operators.md of github.com/onnx/onnx-tensorrt for TensorRT 10.15 (opset 9 to 24), what is marked "Y" there.
A listed operation can still be refused for how it is used; of that list's restrictions, those are checked here that an
exported network can meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SOURCE = "onnx/onnx-tensorrt, docs/operators.md, TensorRT 10.15"
OPSETS = range(9, 25)
_PUBLISHED = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
BlackmanWindow Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU
Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageScaler
InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RMSNormalization RNN RandomNormal
RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign
RotaryEmbedding Round STFT ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TensorScatter
ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
SUPPORTED = frozenset(_PUBLISHED.split())
_POOLS = ("AveragePool", "MaxPool", "LpPool")


def refused(model: Any) -> tuple[str, ...]:
    """What TensorRT refuses in an onnx.ModelProto, as far as the published list tells; empty where all is fine."""
    found = {why for node in _nodes(model.graph) for why in _objections(node)}
    return tuple(sorted(found))


def operations(model: Any) -> tuple[str, ...]:
    """The kinds of operations in an onnx.ModelProto, sorted; with their domain where it is not ONNX's own."""
    return tuple(sorted({f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in _nodes(model.graph)}))


def _nodes(graph: Any) -> Iterator[Any]:
    """Every node, those in branches and loop bodies too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _objections(node: Any) -> Iterator[str]:
    kind = node.op_type
    if node.domain or kind not in SUPPORTED:
        yield f"{node.domain}.{kind}" if node.domain else kind
        return
    given = {a.name: list(a.ints) or a.i for a in node.attribute}
    if kind in _POOLS and len(given.get("kernel_shape", [])) not in (2, 3):
        yield f"{kind} of {len(given.get('kernel_shape', []))} dimensions"
    if kind in _POOLS and any(step != 1 for step in given.get("dilations", [])):
        yield f"{kind} with dilations"
    if kind == "MaxPool" and any(node.output[1:]):
        yield "MaxPool with indices"
    if kind == "LayerNormalization" and any(node.output[1:]):
        yield "LayerNormalization with a mean"
    if kind == "Resize" and given.get("antialias", 0):
        yield "Resize with antialiasing"
    if kind == "ScatterND" and any(a.name == "reduction" and a.s != b"none" for a in node.attribute):
        yield "ScatterND with a reduction"
