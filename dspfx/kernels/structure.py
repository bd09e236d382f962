"""What a group convolution computes: its groups as one int32 tensor, its packed weight, and its plain-torch reference.

    weight [O, C, kh, kw], groups  ->  pack  ->  packed [P], structure [5 + 2G + indices]

The structure is on the CPU, whatever device the packed weight is on:

    [O, C, kh, kw, G,  F_0, K_0, ..., F_G-1, K_G-1,  filters of group 0, channels of group 0, filters of group 1, ...]

Group g computes its F_g filters from its K_g input channels. Either may be 0; a filter is in at most one group, a
channel in any number of them. Filters in no group, or in one without channels, read nothing: they are their bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dspfx.errors import ConfigError, InputError
from dspfx.plans import Group

HEAD = 5  # O, C, kh, kw, G
LARGEST = 2**31 - 1
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Structure:
    """A group convolution without its weights; raises ConfigError where the indices do not make one.

    What has passed here is safe to index with: every filter is in [0, O) and in one group at most, every channel in
    [0, C) and once at most in a group. Filters and channels may stand in any order; the packed weight has theirs.
    """

    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        for name, size in (("out_channels", self.out_channels), ("in_channels", self.in_channels)):
            if not _is_size(size):
                raise ConfigError(f"the structure's {name} is {size!r}; give an integer from 1 to {LARGEST}.")
        if len(self.kernel) != 2 or not all(map(_is_size, self.kernel)):
            raise ConfigError(f"the structure's kernel is {self.kernel!r}; give two integers from 1 to {LARGEST}.")
        owner: dict[int, int] = {}
        for g, group in enumerate(self.groups):
            _check_indices(f"group {g}", "channel", group.channels, self.in_channels)
            _check_indices(f"group {g}", "filter", group.filters, self.out_channels)
            for o in group.filters:
                if o in owner:
                    raise ConfigError(f"filter {o} is in group {owner[o]} and in group {g}; leave it in one of them.")
                owner[o] = g

    @property
    def weights(self) -> int:
        """P, the length of the packed weight."""
        return sum(len(g.filters) * len(g.channels) for g in self.groups) * self.kernel[0] * self.kernel[1]

    @property
    def rest(self) -> tuple[int, ...]:
        """The filters that read nothing: those in no group, and those of groups without channels."""
        reading = {o for g in self.groups if g.channels for o in g.filters}
        return tuple(o for o in range(self.out_channels) if o not in reading)

    def encode(self) -> Tensor:
        """The structure tensor, int32 on the CPU; `Structure.read` reads it."""
        values = [self.out_channels, self.in_channels, *self.kernel, len(self.groups)]
        values += [size for g in self.groups for size in (len(g.filters), len(g.channels))]
        values += [index for g in self.groups for index in (*g.filters, *g.channels)]
        return torch.tensor(values, dtype=torch.int32)

    @classmethod
    def read(cls, tensor: Tensor) -> Self:
        """The structure of a structure tensor.

        Raises InputError where the tensor is not laid out as the module's docstring says, ConfigError where its
        numbers make no structure.
        """
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or tensor.device.type != "cpu":
            raise InputError(
                f"the structure is {_describe(tensor)}; it has to be 1-D, torch.int32 and on the CPU, as pack makes it."
            )
        values = tensor.tolist()
        if len(values) < HEAD:
            raise InputError(f"the structure has {len(values)} numbers; its head alone has {HEAD}: O, C, kh, kw, G.")
        count = values[4]
        if not 0 <= count <= (len(values) - HEAD) // 2:
            raise InputError(
                f"the structure names {count} groups, and holds {len(values) - HEAD} numbers behind its head; every "
                f"group has two sizes there."
            )
        start = HEAD + 2 * count
        sizes = values[HEAD:start]
        if min(sizes, default=0) < 0:
            g, is_channels = divmod(sizes.index(min(sizes)), 2)
            raise InputError(f"group {g} has {min(sizes)} {'channels' if is_channels else 'filters'}; 0 is the least.")
        if len(values) != start + sum(sizes):
            raise InputError(
                f"the structure has {len(values)} numbers, and its {count} groups need {start + sum(sizes)}: a head of "
                f"{HEAD}, {2 * count} sizes and {sum(sizes)} indices."
            )
        lists = []
        for size in sizes:
            lists.append(tuple(values[start : start + size]))
            start += size
        groups = tuple(Group(*pair) for pair in zip(lists[::2], lists[1::2], strict=True))
        return cls(values[0], values[1], (values[2], values[3]), groups)


def pack(weight: Tensor, groups: tuple[Group, ...]) -> tuple[Tensor, Tensor]:
    """The packed weight and the structure tensor of a convolution of these groups.

    `weight` is [O, C, kh, kw]; what it holds outside of the groups is left behind, zero or not. The packed weight is
    1-D, in the weight's dtype and on its device: for each group its block [F_g, K_g, kh, kw], flattened, one after the
    other. Gradients flow through it. Raises InputError for a weight of other dimensions, ConfigError for groups that
    do not fit it.
    """
    if weight.dim() != 4:
        raise InputError(f"pack got a weight of shape {tuple(weight.shape)}; it has to be [O, C, kh, kw].")
    structure = Structure(weight.shape[0], weight.shape[1], (weight.shape[2], weight.shape[3]), groups)
    blocks = [weight.new_empty(0)]
    for group in groups:
        filters, channels = _indices(group, weight.device)
        blocks.append(weight.index_select(0, filters).index_select(1, channels).flatten())
    return torch.cat(blocks), structure.encode()


def unpack(packed: Tensor, structure: Tensor) -> Tensor:
    """The dense weight [O, C, kh, kw], zero outside of the groups: the inverse of `pack`.

    Raises what `Structure.read` raises, and InputError for a packed weight of another length.
    """
    known = Structure.read(structure)
    dense = packed.new_zeros(known.out_channels, known.in_channels, *known.kernel)
    for group, block in zip(known.groups, weight_blocks(packed, known), strict=True):
        filters, channels = _indices(group, packed.device)
        dense[filters[:, None], channels] = block
    return dense


def weight_blocks(packed: Tensor, structure: Structure) -> list[Tensor]:
    """Each group's weight as a view [F_g, K_g, kh, kw] of the packed one; InputError where the length is wrong."""
    if packed.dim() != 1 or len(packed) != structure.weights:
        raise InputError(
            f"the packed weight has shape {tuple(packed.shape)}, and its structure needs [{structure.weights}]; give "
            f"the two that one call of pack made."
        )
    shapes = [(len(g.filters), len(g.channels), *structure.kernel) for g in structure.groups]
    sizes = [a * b * c * d for a, b, c, d in shapes]
    return [part.view(shape) for part, shape in zip(packed.split(sizes), shapes, strict=True)] if shapes else []


def reference(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    structure: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The group convolution in plain torch: activation(conv(input) + bias + residual), [N, O, H', W'].

    `input` is [N, C, H, W]; `bias` is [O] or None for zeros; `residual` has the output's shape; stride, padding and
    dilation are (vertical, horizontal); `activation` is one of ACTIVATIONS. Any float dtype, the same everywhere; in
    float64 this is what the kernels are compared with. Raises InputError and ConfigError as `check_call` does.
    """
    known, shape = check_call(input, packed, bias, structure, stride, padding, dilation, residual, activation)
    y = input.new_zeros(shape) if bias is None else bias.view(1, -1, 1, 1).expand(shape).clone()
    for group, block in zip(known.groups, weight_blocks(packed, known), strict=True):
        if block.numel():
            filters, channels = _indices(group, input.device)
            own = None if bias is None else bias.index_select(0, filters)
            part = F.conv2d(input.index_select(1, channels), block, own, tuple(stride), tuple(padding), tuple(dilation))
            y = y.index_copy(1, filters, part)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def check_call(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    structure: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    residual: Tensor | None,
    activation: str,
) -> tuple[Structure, tuple[int, int, int, int]]:
    """The structure and the output's shape of a call of `reference` whose arguments fit each other.

    Raises InputError for tensors that do not fit, ConfigError for the other arguments and what the structure holds.
    """
    known = Structure.read(structure)
    weight_blocks(packed, known)
    return known, check_fit(known, input, packed, bias, stride, padding, dilation, residual, activation)


def check_fit(
    structure: Structure,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    residual: Tensor | None,
    activation: str,
) -> tuple[int, int, int, int]:
    """The output's shape, as `check_call` gives it, for a weight that is packed in any way: its shape is not read."""
    shape = output_shape(tuple(input.shape), structure, stride, padding, dilation)
    if not input.dtype.is_floating_point:
        raise InputError(f"group_conv2d got an input of {input.dtype}; give one of a float dtype.")
    for name, tensor, size in (
        ("packed weight", weight, tuple(weight.shape)),
        ("bias", bias, (structure.out_channels,)),
        ("residual", residual, shape),
    ):
        if tensor is not None and tuple(tensor.shape) != size:
            raise InputError(f"the {name} has shape {tuple(tensor.shape)}; this call needs {size}.")
        if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
            raise InputError(
                f"the {name} is {_describe(tensor)}, the input {_describe(input)}; convert one of them with .to(...)."
            )
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ConfigError(f"activation is {activation!r}, which group_conv2d does not know; give one of {names}.")
    return shape


def output_shape(
    shape: Sequence[int], structure: Structure, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """(N, O, H', W') for an input of `shape` (N, C, H, W); InputError or ConfigError where there is none."""
    if len(shape) != 4 or shape[1] != structure.in_channels:
        raise InputError(
            f"the input has shape {tuple(shape)}; this convolution reads [N, {structure.in_channels}, H, W]."
        )
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ConfigError(f"{name} is {tuple(pair)}; give two integers of at least {least}.")
    windows = zip(shape[2:], structure.kernel, stride, padding, dilation, strict=True)
    sizes = [window_count(*window) for window in windows]
    if min(sizes) < 1:
        raise InputError(
            f"the input has {shape[2]}x{shape[3]} pixels, too few for a kernel of {structure.kernel[0]}x"
            f"{structure.kernel[1]} with padding {tuple(padding)} and dilation {tuple(dilation)}."
        )
    return shape[0], structure.out_channels, sizes[0], sizes[1]


def window_count(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many windows of a kernel there are along an axis of `size`."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _indices(group: Group, device: torch.device) -> tuple[Tensor, Tensor]:
    filters, channels = (torch.tensor(x, dtype=torch.int64, device=device) for x in (group.filters, group.channels))
    return filters, channels


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _check_indices(place: str, what: str, indices: tuple[int, ...], count: int) -> None:
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise ConfigError(f"{place} holds {what} {index!r}; the layer's {what}s are 0 to {count - 1}.")
    if len(set(indices)) < len(indices):
        twice = next(index for i, index in enumerate(indices) if index in indices[:i])
        raise ConfigError(f"{place} holds {what} {twice} twice; leave it in once.")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dim()}-D, {tensor.dtype} and on {tensor.device}"
