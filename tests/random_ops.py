"""The operations of random networks (tests/random_networks.py): each writes a line or two of a forward function.

A field lists its choices, the plainest first; what is printed of an operation is where it differs from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.random_networks import Value, Writer


class Refused(Exception):
    """An operation that does not fit the values there are; the network goes without it."""


def choice(*values: Any) -> Any:
    """A field with the first of `values` as its default, and all of them to draw from."""
    return field(default=values[0], metadata={"choices": values})


def back() -> Any:
    """Which earlier value an operation reads, counted from the latest."""
    return choice(0, 1, 2, 3, 4, 6)


@dataclass(frozen=True, repr=False)
class Op:
    """One operation of a network."""

    def write(self, w: Writer) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        parts = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(parts)})"


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def alike(w: Writer, x: Value, y: Value) -> tuple[Value, Value]:
    """(x, y) with y resized to x's size where it differs."""
    if any(a[2:] != b[2:] for a, b in zip(x.shapes, y.shapes, strict=True)):
        y = w.value(f"F.interpolate({y.name}, size={x.name}.shape[-2:])")
    return x, y


def equal(w: Writer, x: Value, y: Value) -> tuple[Value, Value]:
    """(x, y) with y brought to x's shape by a 1x1 convolution and resizing where it differs."""
    if y.channels != x.channels:
        y = w.value(f"{w.layer(f'nn.Conv2d({y.channels}, {x.channels}, 1)')}({y.name})")
    return alike(w, x, y)


@dataclass(frozen=True, repr=False)
class Conv(Op):
    x: int = back()
    filters: int = choice(8, 12, 6, 4, 16, 1)
    kernel: int = choice(3, 1)
    stride: int = choice(1, 2)
    dilation: int = choice(1, 2)
    groups: int = choice(1, 2, 4)
    bias: bool = choice(True, False)
    padding: str = choice("half", "valid", "same")
    mode: str = choice("zeros", "zeros", "reflect", "replicate", "circular")
    after: str = choice("", "F.relu({})", "bn", "F.relu(bn)")

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        half = self.kernel // 2 * self.dilation
        padding: object = {"half": half, "valid": 0, "same": "'same'"}[self.padding]
        need(x.smallest > half and x.channels % self.groups == 0, "the kernel or the groups do not fit")
        need(self.padding != "same" or self.stride == 1, "'same' needs stride 1")
        filters = self.filters * self.groups if self.filters % self.groups else self.filters
        options = f"{x.channels}, {filters}, {self.kernel}, stride={self.stride}, padding={padding}"
        options += f", dilation={self.dilation}" * (self.dilation > 1) + f", groups={self.groups}" * (self.groups > 1)
        options += ", bias=False" * (not self.bias) + f", padding_mode='{self.mode}'" * (self.mode != "zeros")
        layer = w.layer(f"nn.Conv2d({options})")
        y = w.value(f"{layer}({x.name})")
        w.layers.append((layer, x.channels))
        if self.after:
            norm = f"{w.layer(f'nn.BatchNorm2d({filters})')}({y.name})" if "bn" in self.after else ""
            w.value(self.after.replace("bn", norm).format(y.name))


@dataclass(frozen=True, repr=False)
class Act(Op):
    x: int = back()
    form: str = choice(
        "F.relu({})", "{}.relu()", "nn.ReLU()", "nn.ReLU(inplace=True)", "F.relu({}, inplace=True)", "nn.SiLU()",
        "torch.sigmoid({})", "nn.Hardswish(inplace=True)", "F.leaky_relu({}, 0.1)", "nn.LeakyReLU(0.2, inplace=True)",
        "nn.PReLU()", "nn.PReLU(C)", "F.gelu({})", "torch.tanh({})", "F.softplus({})", "{}.clamp(min=0.1)",
        "nn.ReLU6()", "1 - {}", "{} * 0.5 - 1", "-{}", "{}.abs()", "{}.relu_()", "{}.clone()",
        "nn.Threshold(0.1, 0.5)", "{} / (1 + {}.abs())", "torch.where({} > 0, {}, 0.1 * {})",
        "{}.square().mean(1, keepdim=True)",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        if self.form.startswith("nn."):
            w.value(f"{w.layer(self.form.replace('(C)', f'({x.channels})'))}({x.name})")
        else:
            w.value(self.form.replace("{}", x.name), degree=2 * x.degree if "square" in self.form else 0)


@dataclass(frozen=True, repr=False)
class Norm(Op):
    x: int = back()
    form: str = choice(
        "nn.BatchNorm2d(C)", "nn.GroupNorm(2, C)", "nn.GroupNorm(C, C)", "nn.GroupNorm(1, C)",
        "nn.InstanceNorm2d(C, affine=True)", "nn.InstanceNorm2d(C)", "nn.LayerNorm(C)",
        "nn.BatchNorm2d(C, affine=False)", "functional", "nn.BatchNorm2d(C, track_running_stats=False)", "F.normalize",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        c = x.channels
        need("Instance" not in self.form or x.smallest > 1, "one pixel has no variance")
        need("GroupNorm(2" not in self.form or c % 2 == 0, "an odd number of channels")
        if self.form == "functional":
            mean, var = w.buffer(f"torch.randn({c}) / 4"), w.buffer(f"torch.rand({c}) + 0.5")
            gain, shift = (w.layer(f"nn.Parameter(torch.rand({c}) + 0.5)") for _ in range(2))
            w.value(f"F.batch_norm({x.name}, {mean}, {var}, {gain}, {shift}, self.training)")
        elif self.form == "F.normalize":
            w.value(f"F.normalize({x.name}, dim=1) * {w.layer(f'nn.Parameter(torch.rand(1, {c}, 1, 1) + 1)')}")
        elif "LayerNorm" in self.form:
            w.value(f"{w.layer(f'nn.LayerNorm({c})')}({x.name}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)")
        else:
            w.value(f"{w.layer(self.form.replace('C)', f'{c})').replace('C,', f'{c},'))}({x.name})")


@dataclass(frozen=True, repr=False)
class Depthwise(Op):
    x: int = back()
    multiplier: int = choice(1, 2)
    kernel: int = choice(3, 1)
    stride: int = choice(1, 2)
    bias: bool = choice(True, False)

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        c = x.channels
        options = f"{c}, {c * self.multiplier}, {self.kernel}, stride={self.stride}, padding={self.kernel // 2}"
        w.value(f"{w.layer(f'nn.Conv2d({options}, groups={c}, bias={self.bias})')}({x.name})")


@dataclass(frozen=True, repr=False)
class Transposed(Op):
    x: int = back()
    filters: int = choice(8, 6, 12)
    kernel: int = choice(2, 3)
    stride: int = choice(2, 1)
    groups: int = choice(1, 2)
    bias: bool = choice(True, False)

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        need(x.channels % self.groups == 0, "the groups do not fit")
        padding = f", padding=1, output_padding={self.stride - 1}" if self.kernel == 3 else ""
        options = f"{x.channels}, {self.filters}, {self.kernel}, stride={self.stride}{padding}"
        w.value(f"{w.layer(f'nn.ConvTranspose2d({options}, groups={self.groups}, bias={self.bias})')}({x.name})")


@dataclass(frozen=True, repr=False)
class Functional(Op):
    """A convolution whose weight is the network's own parameter."""

    x: int = back()
    filters: int = choice(8, 6)
    kernel: int = choice(1, 3)
    bias: bool = choice(True, False)
    name: str = choice("F.conv2d", "torch.conv2d", "F.conv_transpose2d")

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        pair = (x.channels, self.filters) if "transpose" in self.name else (self.filters, x.channels)
        shape = f"{pair[0]}, {pair[1]}, {self.kernel}, {self.kernel}"
        weight = w.layer(f"nn.Parameter(torch.randn({shape}) / {x.channels * self.kernel**2} ** 0.5)")
        bias = w.layer(f"nn.Parameter(torch.randn({self.filters}) / 4)") if self.bias else "None"
        w.value(f"{self.name}({x.name}, {weight}, {bias}, padding={self.kernel // 2})")


@dataclass(frozen=True, repr=False)
class Again(Op):
    """A convolution that was called before, on another value."""

    x: int = back()
    layer: int = choice(0, 1, 2)

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        fitting = [name for name, channels in w.layers if channels == x.channels]
        need(bool(fitting), "no convolution reads that many channels")
        w.value(f"{fitting[-1 - self.layer % len(fitting)]}({x.name})")


@dataclass(frozen=True, repr=False)
class Binary(Op):
    x: int = back()
    y: int = choice(1, 0, 2, 3, 4, 6)
    form: str = choice(
        "{} + {}", "{} - {}", "{} * {}", "torch.add({}, {}, alpha=2)", "{}.sub({}, alpha=0.5)", "torch.maximum({}, {})",
        "sum([{}, {}])", "{} * torch.sigmoid({})", "{} / ({}.abs() + 1)", "torch.stack([{}, {}]).mean(0)",
        "torch.lerp({}, {}, 0.3)", "torch.addcmul({}, {}, Z)",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x, y = equal(w, w.image(self.x), w.image(self.y))
        degree = x.degree + y.degree if "} * {" in self.form or "addcmul" in self.form else 0
        w.value(self.form.replace("Z", x.name).format(x.name, y.name), degree)


@dataclass(frozen=True, repr=False)
class InPlace(Op):
    x: int = back()
    y: int = choice(1, 2, 3, 4)
    form: str = choice("{} += Y", "{}.add_(Y)", "{} *= torch.sigmoid(Y)", "{} -= Y", "{}[:, :2].add_(Y[:, :2])")

    def write(self, w: Writer) -> None:
        x, y = equal(w, w.image(self.x), w.image(self.y))
        need(x.channels > 2 or "[" not in self.form, "too few channels")
        w.change(x, self.form.replace("Y", y.name))


@dataclass(frozen=True, repr=False)
class Overwrite(Op):
    """A statement that changes a tensor, and with it every view of it, whether they were read before or not."""

    x: int = back()
    form: str = choice(
        "{}.relu_()", "{}.add_(2)", "{} += 1", "F.relu({}, inplace=True)", "{} /= 2", "{} *= -1", "{}.clamp_(min=0.1)",
        "{}[:, 1:].mul_(2)", "torch.relu_({})", "{}.fill_(0.5)", "{}[:, :2] = 0.5", "{}[:, 1:] *= 2", "{}[:, ::2] += 1",
        "{}[..., :1] = 0", "{}[:, -2:] = {}[:, :2].clone()", "{}[:] = {}.flip(1)", "{}.copy_({}.roll(1, 1).clone())",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        need(x.channels > 2, "too few channels")
        w.change(x, self.form)


@dataclass(frozen=True, repr=False)
class Alias(Op):
    """Another name for a tensor, as a rule: what changes one changes the other."""

    x: int = back()
    form: str = choice(
        "nn.Identity()", "{}.view({}.shape)", "{}.to({}.dtype)", "F.dropout({}, 0.3, self.training)", "nn.Dropout(0.3)",
        "{}[:]", "{}.permute(0, 2, 3, 1).permute(0, 3, 1, 2)", "{}.contiguous()", "{}.detach()", "{}.expand_as({})",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        w.value(f"{w.layer(self.form)}({x.name})" if self.form.startswith("nn.") else self.form.replace("{}", x.name))


@dataclass(frozen=True, repr=False)
class Gate(Op):
    """Squeeze and excitation in several hands, and attention over pixels."""

    x: int = back()
    form: str = choice("conv", "linear", "view", "pixels", "cbam", "add", "expand")
    gate: str = choice("torch.sigmoid({})", "F.hardsigmoid({})", "torch.tanh({})", "F.softmax({}, dim=1)")

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        c, n = x.channels, x.name
        if self.form == "pixels":
            y = w.value(f"{n} * {self.gate.format(w.layer(f'nn.Conv2d({c}, 1, 3, padding=1)') + f'({n})')}")
        elif self.form == "cbam":
            s = w.value(f"torch.cat([{n}.mean(1, keepdim=True), {n}.amax(1, keepdim=True)], 1)")
            y = w.value(f"{n} * {self.gate.format(w.layer('nn.Conv2d(2, 1, 3, padding=1)') + f'({s.name})')}")
        elif self.form in ("conv", "add"):
            s = w.value(f"F.relu({w.layer(f'nn.Conv2d({c}, 4, 1)')}(F.adaptive_avg_pool2d({n}, 1)))")
            gate = self.gate.format(f"{w.layer(f'nn.Conv2d(4, {c}, 1)')}({s.name})")
            y = w.value(f"{n} {'*' if self.form == 'conv' else '+'} {gate}")
        else:
            s = w.value(f"F.relu({w.layer(f'nn.Linear({c}, 6)')}({n}.mean((2, 3))))")
            t = w.value(self.gate.format(f"{w.layer(f'nn.Linear(6, {c})')}({s.name})"))
            place = {"linear": "[:, :, None, None]", "view": f".view({n}.size(0), -1, 1, 1)"}
            place["expand"] = f".unsqueeze(-1).unsqueeze(-1).expand_as({n})"
            y = w.value(f"{n} * {t.name}{place[self.form]}")
        need(y.channels == c, "a gate changes no shape")


@dataclass(frozen=True, repr=False)
class Cat(Op):
    x: int = back()
    y: int = choice(1, 0, 2, 3, 4, 6)
    more: str = choice("", "x", "-x", "zeros", "ones", "input", "conv")

    def write(self, w: Writer) -> None:
        x, y = alike(w, w.image(self.x), w.image(self.y))
        extra = {"": "", "x": f", {x.name}", "-x": f", -{x.name}", "zeros": f", torch.zeros_like({x.name}[:, :2])"}
        extra |= {"ones": f", {x.name}.new_ones({x.name}.shape[0], 2, *{x.name}.shape[2:])"}
        extra |= {"input": f", F.interpolate(x, size={x.name}.shape[-2:])"}
        extra |= {"conv": f", {x.name} * 0 + 0.5"}
        w.value(f"torch.cat([{x.name}, {y.name}{extra[self.more]}], 1)")


@dataclass(frozen=True, repr=False)
class Split(Op):
    x: int = back()
    form: str = choice("chunk", "split", "unequal", "unbind", "slices", "steps", "chunk3", "narrow")

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        c, n = x.channels, x.name
        need(c >= 4 and (c % 2 == 0 or self.form != "unbind"), "too few channels to split")
        view = f"{n}.view({n}.shape[0], 2, {c // 2}, *{n}.shape[2:]).unbind(1)"
        forms = {"chunk": (f"{n}.chunk(2, dim=1)", 2), "split": (f"torch.split({n}, {c // 2}, 1)", 2 + c % 2)}
        forms |= {"unequal": (f"{n}.split([1, {c - 3}, 2], dim=1)", 3), "unbind": (view, 2)}
        forms |= {"slices": (f"({n}[:, : {c // 3}], {n}[:, {c // 3} :])", 2)}
        forms |= {
            "steps": (f"({n}[:, ::2], {n}[:, 1::2])", 2),
            "chunk3": (f"torch.chunk({n}, 3, 1)", -(-c // -(-c // 3))),
        }
        forms |= {"narrow": (f"({n}.narrow(1, 1, {c - 2}), {n}[:, -2:])", 2)}
        w.values_of(*forms[self.form])


@dataclass(frozen=True, repr=False)
class Stack(Op):
    x: int = back()
    y: int = choice(1, 0, 2, 3)
    form: str = choice(
        "torch.stack([{}, {}], 1).flatten(1, 2)", "torch.stack([{}, {}], 2).flatten(1, 2)",
        "torch.stack([{}, {}], 2).sum(2)", "torch.stack([{}, {}], 1).amax(1)", "torch.stack([{}, {}], -1).mean(-1)",
        "torch.stack(({}, {}), dim=1)[:, 0]",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x, y = equal(w, w.image(self.x), w.image(self.y))
        w.value(self.form.format(x.name, y.name))


@dataclass(frozen=True, repr=False)
class Shuffle(Op):
    x: int = back()
    groups: int = choice(2, 4)
    form: str = choice("view", "module", "function", "roll", "flip", "repeat", "interleave", "index")

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        c, g, n = x.channels, self.groups, x.name
        need(c % g == 0 and c > 2, "the groups do not fit")
        view = f"{n}.view({n}.size(0), {g}, {c // g}, {n}.size(2), {n}.size(3)).transpose(1, 2).reshape({n}.shape)"
        forms = {"view": view if "{" not in view else "", "function": f"F.channel_shuffle({n}, {g})"}
        forms |= {"roll": f"torch.roll({n}, {g}, 1)", "flip": f"{n}.flip(1)", "repeat": f"{n}.repeat(1, {g}, 1, 1)"}
        forms |= {"interleave": f"torch.repeat_interleave({n}, {g}, dim=1)", "index": f"{n}[:, [0, 2, 1, 0]]"}
        if self.form == "module":
            w.value(f"{w.layer(f'nn.ChannelShuffle({g})')}({n})")
        else:
            w.value(forms[self.form].replace(f"{n}.view", f"{n}.contiguous().view"))


@dataclass(frozen=True, repr=False)
class PixelShuffle(Op):
    x: int = back()
    form: str = choice("up", "down", "up module", "down module", "down by view", "focus")

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        n, c = x.name, x.channels
        up = self.form.startswith("up")
        even = all(s % 2 == 0 for shape in x.shapes for s in shape[2:])
        need(c % 4 == 0 if up else even and c <= 16, "not divisible")
        if self.form.endswith("module"):
            w.value(f"{w.layer('nn.PixelShuffle(2)' if up else 'nn.PixelUnshuffle(2)')}({n})")
        elif self.form == "down by view":
            s = f"{n}.shape"
            v = f"{n}.reshape({s}[0], {c}, {s}[2] // 2, 2, {s}[3] // 2, 2).permute(0, 3, 5, 1, 2, 4)"
            w.value(f"{v}.reshape({s}[0], {4 * c}, {s}[2] // 2, {s}[3] // 2)")
        elif self.form == "focus":
            parts = [f"{n}[..., {i}::2, {j}::2]" for j in range(2) for i in range(2)]
            w.value(f"torch.cat([{', '.join(parts)}], 1)")
        else:
            w.value(f"F.pixel_{'' if up else 'un'}shuffle({n}, 2)")


@dataclass(frozen=True, repr=False)
class Pool(Op):
    x: int = back()
    form: str = choice(
        "F.max_pool2d({}, 2)", "F.avg_pool2d({}, 2)", "F.avg_pool2d({}, 3, stride=1, padding=1)",
        "F.adaptive_avg_pool2d({}, 2)", "F.max_pool2d({}, 3, stride=2, padding=1)",
        "nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)", "nn.MaxPool2d(3, 2, ceil_mode=True)",
        "F.adaptive_max_pool2d({}, 3)", "{}.mean((2, 3), keepdim=True)", "{}.amax(dim=(-1, -2), keepdim=True)",
        "{}.flatten(2).max(-1).values[..., None, None]",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        source = f"{w.layer(self.form)}({x.name})" if self.form.startswith("nn.") else self.form.replace("{}", x.name)
        w.value(source)


@dataclass(frozen=True, repr=False)
class Resize(Op):
    x: int = back()
    form: str = choice(
        "F.interpolate({}, scale_factor=2)", "F.interpolate({}, scale_factor=2, mode='bilinear')",
        "F.pad({}, (1, 1, 1, 1))", "F.interpolate({}, size=(6, 5), mode='bilinear', align_corners=True)",
        "nn.Upsample(scale_factor=2)", "F.pad({}, (1, 0, 0, 1), value=0.5)", "F.pad({}, (1, 1, 1, 1), mode='reflect')",
        "F.pad({}, (0, 1, 0, 0), mode='replicate')", "F.pad({}, (-1, 0, 0, 0))", "F.pad({}, (0, 0, 0, 0, 1, 2))",
        "F.pad({}, (0, 0, 0, 0, 2, 0), value=0.5)", "F.pad({}, (1, 0, 0, 0, 0, 2))", "nn.ZeroPad2d((1, 0, 0, 1))",
        "{}[:, :, ::2, 1:]", "{}.transpose(2, 3)", "F.pad({}, (0, 0, 0, 0, -1, 1))", "{}[:, 1:-1]",
        "nn.ReflectionPad2d(1)", "torch.roll({}, 1, 2)",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        need(x.smallest > 1 and (x.channels > 3 or "1:-1" not in self.form), "too small")
        source = f"{w.layer(self.form)}({x.name})" if self.form.startswith("nn.") else self.form.replace("{}", x.name)
        w.value(source)


@dataclass(frozen=True, repr=False)
class Scale(Op):
    """A parameter or buffer of its own for every channel, or one for all."""

    x: int = back()
    form: str = choice("{} * {}", "{} + {}", "{} - {}", "{} / {}", "{1} * {0}", "torch.mul({}, {})", "{}.add({})")
    shape: str = choice("1, C, 1, 1", "C, 1, 1", "view", "", "1", "C, 1, 1 buffer", "index")

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        c = x.channels
        shape = self.shape.partition(" buffer")[0].replace("C", str(c))
        if self.shape == "view":
            operand = w.layer(f"nn.Parameter(torch.rand({c}) + 0.5)") + ".view(1, -1, 1, 1)"
        elif self.shape == "index":
            operand = w.layer(f"nn.Parameter(torch.rand({c}) + 0.5)") + "[None, :, None, None]"
        elif "buffer" in self.shape:
            operand = w.buffer(f"torch.rand({shape}) + 0.5")
        else:
            operand = w.layer(f"nn.Parameter(torch.rand({shape or '()'}) + 0.5)")
        w.value(self.form.format(x.name, operand))


@dataclass(frozen=True, repr=False)
class Unknown(Op):
    """What moves or mixes channels in ways that no table lists, or lists one day."""

    x: int = back()
    form: str = choice(
        "torch.cumsum({}, 1) / 4", "F.softmax({}, 1)", "{}.sort(1).values", "F.local_response_norm({}, 3)",
        "{}.movedim(1, 2).movedim(2, 1)", "torch.einsum('bchw,bdhw->bcd', {}, {}).softmax(-1) @ {}.flatten(2)",
        "F.unfold({}, 3, padding=1)", "F.glu({}, 1)", "torch.einsum('bchw,dc->bdhw', {}, W)",
        "F.linear({}.permute(0, 2, 3, 1), W).permute(0, 3, 1, 2)", "torch.matmul(W, {}.flatten(2))", "linear",
        "{}.unflatten(1, (2, -1)).sum(1)", "{}.reshape({}.shape[0], -1, {}.shape[2] * 2, {}.shape[3])",
        "{}.contiguous()", "{} * ({} > 0)", "{}.masked_fill({} < 0, 0)", "{}.expand(-1, -1, -1, -1)",
    )  # fmt: skip

    def write(self, w: Writer) -> None:
        x = w.image(self.x)
        n, c = x.name, x.channels
        need("glu" not in self.form or c % 2 == 0, "an odd number of channels")
        if self.form == "linear":
            layer = w.layer(f"nn.Linear({c}, 8)")
            w.value(f"{layer}({n}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)")
            return
        weight = w.layer(f"nn.Parameter(torch.randn(8, {c}) / {c} ** 0.5)") if "W" in self.form else ""
        source = self.form.replace("{}", n).replace("W", weight)
        folds = any(word in self.form for word in ("@", "unfold", "matmul"))
        w.value(f"({source}).unflatten(2, {n}.shape[2:])" if folds else source, 3 if "@" in self.form else 0)


@dataclass(frozen=True, repr=False)
class Flatten(Op):
    """From a feature map to a vector, and a linear layer."""

    x: int = back()
    form: str = choice(
        "torch.flatten(F.adaptive_avg_pool2d({}, 2), 1)", "{}.mean((2, 3))",
        "F.adaptive_avg_pool2d({}, 1).view({}.size(0), -1)", "F.adaptive_max_pool2d({}, 2).reshape({}.shape[0], -1)",
        "F.adaptive_avg_pool2d({}, 2).permute(0, 2, 3, 1).flatten(1)", "F.adaptive_avg_pool2d({}, 1)[:, :, 0, 0]",
        "{}.amax((2, 3))", "{}.sum((2, 3))",
    )  # fmt: skip
    after: str = choice("linear", "relu", "bn", "functional", "")

    def write(self, w: Writer) -> None:
        y = w.value(self.form.replace("{}", w.image(self.x).name))
        width = y.channels
        if self.after == "functional":
            weight = w.layer(f"nn.Parameter(torch.randn(8, {width}) / {width} ** 0.5)")
            w.value(f"F.linear({y.name}, {weight})")
        elif self.after:
            z = w.value(f"{w.layer(f'nn.Linear({width}, 8)')}({y.name})")
            if self.after != "linear":
                norm = w.layer("nn.BatchNorm1d(8)") if self.after == "bn" else "F.relu"
                w.value(f"{norm}({z.name})")


@dataclass(frozen=True, repr=False)
class Back(Op):
    """From a vector into a feature map: added or multiplied, channel by channel."""

    x: int = back()
    y: int = back()
    form: str = choice(
        "{} + {}[:, :, None, None]", "{} * {}.unsqueeze(2).unsqueeze(3)", "{} * torch.sigmoid({})[..., None, None]"
    )

    def write(self, w: Writer) -> None:
        x, y = w.image(self.x), w.vector(self.y)
        if y.channels != x.channels:
            y = w.value(f"{w.layer(f'nn.Linear({y.channels}, {x.channels})')}({y.name})")
        w.value(self.form.format(x.name, y.name), x.degree + y.degree if "unsqueeze" in self.form else 0)


OPS: tuple[type[Op], ...] = (
    *(Conv, Act, Norm, Binary, Depthwise, Cat, Split, Conv, Gate, Shuffle, Pool, Scale, Stack, PixelShuffle),
    *(Conv, Resize, InPlace, Transposed, Functional, Again, Flatten, Back, Unknown, Alias, Overwrite),
)
