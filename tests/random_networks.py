"""Random networks for property tests: a list of small operations, written out as the source of a module.

    program = Program((Conv(stride=2), Shuffle(groups=2), Cat(y=1)), head="pooled", seed=3)
    print(program.source())  # a class that can be pasted into a report
    model = program.build()  # alive and the same at every build

Every operation refers to earlier values by counting back from the latest, so a list without some of its operations is
a network too: hypothesis shrinks a failing one to the few operations that matter.
"""

from __future__ import annotations

import itertools
import linecache
import re
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.random_ops import OPS, Op, Refused

SIZES = ((8, 8), (12, 10))  # what every random network accepts, height and width
CHANNELS = 3
_MOST_CHANNELS, _LARGEST = 64, 32
_NAMESPACE: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
_NAME = re.compile(r"\bv\d+\b")
_BUILDS = itertools.count()


@dataclass(frozen=True)
class Value:
    """One variable of the forward function.

    Attributes:
        name: as in the source.
        shapes: at batch 2, for each of SIZES.
        degree: how many factors that depend on the input are multiplied in it; too many overflow.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    degree: int = 1

    @property
    def channels(self) -> int:
        return self.shapes[0][1]

    @property
    def height(self) -> int:
        return self.shapes[0][2]

    @property
    def width(self) -> int:
        return self.shapes[0][3]

    @property
    def smallest(self) -> int:
        return min(self.height, self.width)


class Writer:
    """Writes a network line by line, running every line on meta tensors to learn the shapes it makes."""

    def __init__(self) -> None:
        self.made: list[str] = []  # lines of __init__
        self.lines: list[tuple[str, str]] = []  # lines of forward, and the part of each that reads
        self.values: list[Value] = []
        self.layers: list[tuple[str, int]] = []  # (name, input channels) of what may be called again
        self._module = nn.Module()
        self._env = [{"x": torch.empty(2, CHANNELS, *size, device="meta"), "self": self._module} for size in SIZES]

    def image(self, back: int) -> Value:
        """The feature map written `back` before the latest one, counting around."""
        images = [v for v in self.values if len(v.shapes[0]) == 4]
        return images[-1 - back % len(images)]

    def vector(self, back: int) -> Value:
        """The same among values [B, C]; refuses where there is none."""
        vectors = [v for v in self.values if len(v.shapes[0]) == 2]
        if not vectors:
            raise Refused("no vector was made yet")
        return vectors[-1 - back % len(vectors)]

    def layer(self, source: str) -> str:
        """A new attribute, such as "self.m4", that holds what `source` makes."""
        name = f"m{len(self.made)}"
        with torch.device("meta"):
            setattr(self._module, name, eval(source, _NAMESPACE))
        self.made.append(f"self.{name} = {source}")
        return f"self.{name}"

    def buffer(self, source: str) -> str:
        """A new buffer."""
        name = f"m{len(self.made)}"
        with torch.device("meta"):
            self._module.register_buffer(name, eval(source, _NAMESPACE))
        self.made.append(f'self.register_buffer("{name}", {source})')
        return f"self.{name}"

    def value(self, source: str, degree: int = 0) -> Value:
        """A new variable; refuses what torch refuses, and what grows too large."""
        name = f"v{len(self.values)}"
        found: list[Tensor] = [self._run(env, name, source) for env in self._env]
        degree = degree or max((v.degree for v in self.values if v.name in _NAME.findall(source)), default=1)
        value = Value(name, tuple(tuple(t.shape) for t in found), degree)
        self._check(value)
        self.lines.append((f"{name} = {source}", source))
        self.values.append(value)
        return value

    def values_of(self, source: str, count: int) -> list[Value]:
        """New variables for each part of a tuple."""
        start = len(self.values)
        names = [f"v{start + i}" for i in range(count)]
        found: list[list[Tensor]] = [self._run(env, "parts", source) for env in self._env]
        values = [Value(n, tuple(tuple(f[i].shape) for f in found)) for i, n in enumerate(names)]
        for value, *tensors in zip(values, *found, strict=True):
            self._check(value)
            for env, tensor in zip(self._env, tensors, strict=True):
                env[value.name] = tensor
        self.lines.append((f"{', '.join(names)} = {source}", source))
        self.values += values
        return values

    def change(self, value: Value, line: str) -> None:
        """A line that changes `value`, written as {}, in place; what else it names it reads."""
        for env in self._env:
            env |= _executed(line.replace("{}", value.name), env)
        self.lines.append((line.replace("{}", value.name), line))

    def _run(self, env: dict[str, Any], name: str, source: str) -> Any:
        env |= _executed(f"{name} = {source}", env)
        return env[name]

    def _check(self, value: Value) -> None:
        for shape in value.shapes:
            if len(shape) not in (2, 4) or min(shape) == 0 or (len(shape) == 2 and shape[1] > 256):
                raise Refused(f"no operation goes on from {shape}")
            if len(shape) == 4 and (shape[1] > _MOST_CHANNELS or max(shape[2:]) > _LARGEST):
                raise Refused(f"{shape} is too large")
        if value.degree > 3:
            raise Refused("too many factors")

    def forget(self, made: int, lines: int, values: int, layers: int) -> None:
        """Goes back to when there were so many of each."""
        for index in range(made, len(self.made)):
            delattr(self._module, f"m{index}")
        del self.made[made:], self.lines[lines:], self.values[values:], self.layers[layers:]

    def unread(self) -> list[Value]:
        """Values that no line reads, the latest one where there are none."""
        read = {name for _, source in self.lines for name in _NAME.findall(source)}
        return [v for v in self.values if v.name not in read] or self.values[-1:]


def _executed(source: str, env: dict[str, Any]) -> dict[str, Any]:
    local = dict(env)
    try:
        with torch.enable_grad():  # which refuses to change some views in place
            exec(source, _NAMESPACE, local)
    except (RuntimeError, ValueError, IndexError) as error:
        raise Refused(str(error)) from error
    return local


@dataclass(frozen=True)
class Program:
    """A network as a list of operations.

    Attributes:
        ops: what follows the stem of two convolutions.
        head: "pooled" and "flattened" end in a linear layer over all that was left unread; "maps" in a 1x1
            convolution over each of it.
        outputs: values returned beside the head's, counted back.
        width: channels of the first convolution; the second one has eight.
        zeros: filters and columns of the weights are zero from the start, so that channels are constant or unread.
        seed: of the weights.
    """

    ops: tuple[Op, ...]
    head: str = "pooled"
    outputs: tuple[int, ...] = ()
    width: int = 8
    zeros: bool = False
    seed: int = 0

    def written(self) -> tuple[Writer, str]:
        """The writer with every line of the network, and what its forward returns."""
        w = Writer()
        w.value(f"F.relu({w.layer(f'nn.Conv2d({CHANNELS}, {self.width}, 3, padding=1)')}(x))")
        w.layers.append((w.layer(f"nn.Conv2d({self.width}, 8, 3, padding=1)"), self.width))
        w.value(f"F.relu({w.layers[0][0]}(v0))")
        for op in self.ops:
            before = len(w.made), len(w.lines), len(w.values), len(w.layers)
            try:
                op.write(w)
            except Refused:
                w.forget(*before)
        extra = [w.values[-1 - back % len(w.values)].name for back in self.outputs]
        results = [*self._head(w), *extra]
        return w, results[0] if len(results) == 1 else f"[{', '.join(results)}]"

    def _head(self, w: Writer) -> list[str]:
        ends = w.unread()
        if self.head == "maps":
            kinds = ["nn.Conv2d({}, 2, 1)" if len(v.shapes[0]) == 4 else "nn.Linear({}, 2)" for v in ends]
            return [f"{w.layer(k.format(v.channels))}({v.name})" for k, v in zip(kinds, ends, strict=True)]
        spatial = "{}.mean((2, 3))" if self.head == "pooled" else "F.adaptive_avg_pool2d({}, 2).flatten(1)"
        parts = [spatial.format(v.name) if len(v.shapes[0]) == 4 else v.name for v in ends]
        width = sum(v.channels * (4 if len(v.shapes[0]) == 4 and self.head == "flattened" else 1) for v in ends)
        joined = parts[0] if len(parts) == 1 else f"torch.cat([{', '.join(parts)}], 1)"
        return [f"{w.layer(f'nn.Linear({width}, 5)')}({joined})"]

    def source(self) -> str:
        """The network as a class `Net`."""
        w, result = self.written()
        made = "".join(f"        {line}\n" for line in w.made)
        lines = "".join(f"        {line}\n" for line, _ in w.lines)
        return (
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{made}\n    def forward(self, x):\n{lines}        return {result}\n"
        )

    def build(self) -> nn.Module:
        """A fresh instance in training mode, float32, the same one every time; the global RNG stays as it is."""
        source = self.source()
        file = f"<random network {next(_BUILDS)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # tracebacks show its lines
        namespace: dict[str, Any] = dict(_NAMESPACE)
        exec(compile(source, file, "exec"), namespace)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = namespace["Net"]()
            _enliven(model, self.zeros)
        return model


def _enliven(model: nn.Module, zeros: bool) -> None:
    """Weights that keep the signal's size, random biases, scales, shifts and statistics; zeros where asked for."""
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        elif isinstance(weight, nn.Parameter):
            nn.init.uniform_(weight, 0.5, 1.5)
        if isinstance(bias, nn.Parameter):
            nn.init.normal_(bias, 0.2, 0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if zeros and isinstance(module, (nn.Conv2d, nn.Linear)):
            _zero_some(module)


@torch.no_grad()
def _zero_some(layer: nn.Conv2d | nn.Linear) -> None:
    """A third of the filters makes constants, half of these zeros; a third of the input channels goes unread."""
    filters, channels = layer.weight.shape[:2]
    dead, unread = torch.rand(filters) < 1 / 3, torch.rand(channels) < 1 / 3
    layer.weight[dead] = 0
    layer.weight[:, unread] = 0
    if layer.bias is not None:
        layer.bias[dead & (torch.rand(filters) < 1 / 2)] = 0


def _instances(kind: type[Op]) -> st.SearchStrategy[Op]:
    return st.builds(kind, **{f.name: st.sampled_from(f.metadata["choices"]) for f in fields(kind)})


def programs(longest: int = 12) -> st.SearchStrategy[Program]:
    """Programs of up to `longest` operations."""
    return st.builds(
        Program,
        ops=st.lists(st.one_of([_instances(kind) for kind in OPS]), min_size=1, max_size=longest).map(tuple),
        head=st.sampled_from(("pooled", "flattened", "maps")),
        outputs=st.lists(st.integers(0, 5), max_size=2).map(tuple),
        width=st.sampled_from((8, 12)),
        zeros=st.booleans(),
        seed=st.integers(0, 999),
    )
