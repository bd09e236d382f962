"""Networks as small files: blocks of weights that share one absolute value, or are zero, cost next to nothing.

    write_compressed: state_dict -> one stream a weight, the rest together -> zstd frames -> one safetensors file
    read_compressed:  file -> checksum -> index, compared with the model -> stream by stream -> the model's tensors

docs/format.md defines the file byte by byte.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dspfx.config import BlockConfig
from dspfx.errors import ConfigError, StorageError
from dspfx.modules import GATED, GatedLayer
from dspfx.storage import envelope
from dspfx.storage.blockcode import decode_weight, most_bytes
from dspfx.storage.compress import compress_state
from dspfx.storage.envelope import Index, Stream
from dspfx.storage.report import CompressedReport
from dspfx.storage.streams import decompress, from_planes
from dspfx.storage.words import Precision, to_tensor, to_words

_REMEDY = "give the network it was written from, or one with the same state_dict keys and shapes"


def write_compressed(
    model: nn.Module,
    path: str | os.PathLike[str],
    blocks: BlockConfig | None = None,
    *,
    bits: float | None = None,
    values: Literal["exact", "fp16"] = "exact",
    rest: Literal["exact", "fp16"] = "exact",
) -> CompressedReport:
    """Writes the model's state_dict into one small file; `model` is left as it was.

    By default every tensor comes back bit by bit. Weights of convolutions and linear layers are written by blocks:
    a block of zeros costs its share of a map, one whose weights have the same absolute value costs that value and a
    bit a weight. What pruning made zero (pairs of filter and input channel, single weights) is found and costs a map.
    What a prepared network learned about its groups is left out: the file loads into the plain network as well.

    Args:
        path: the file appears whole or not at all.
        blocks: shape and layout of the blocks, and `skip`, the layers that stay exact and are not searched for blocks;
            its fractions do not matter. None: several shapes and both layouts are tried on each layer.
        bits: 0.5 to 8: weights get few values, whose entropy is about so many bits each over the whole network, at the
            least squared error (`method.levels`); so do the shared absolute values, of their own. Dead weights and
            pruned blocks stay zero, unified blocks unified and nonzero; a free weight may become zero. Lists of few
            values stay exact where that is no larger.
        values: "fp16" rounds these values to float16 instead (in float32 and float64 networks).
        rest: "fp16" rounds all other float32 and float64 tensors (norms, biases) to float16, those excepted in which a
            value would be off by more than the rounding of float16's normal numbers.

    Returns:
        What was written: bytes and classes of each layer; prints as a table.

    Raises:
        StorageError: the state_dict holds what has no stored form, a weight that is to be quantised is not finite, or
            `path` cannot be written.
        ConfigError: a setting is outside its range.
    """
    _check_precision(bits, values)
    if rest not in ("exact", "fp16"):
        raise ConfigError(f"rest is {rest!r}; give 'exact' or 'fp16'.")
    named, own, shared = shipped_state(model), {}, {}
    first: dict[int, str] = {}
    for name, value in named.items():
        _check_tensor(name, value)
        if first.setdefault(id(value), name) == name:
            own[name] = value
        else:
            shared[name] = first[id(value)]
    modules = {name: module for name, module in model.named_modules() if issubclass(type(module), tuple(GATED))}
    held = {id(module._parameters.get("weight")): name for name, module in modules.items()}
    layers = {name: held[id(value)] for name, value in own.items() if id(value) in held}
    skip = set(blocks.skip) if blocks else set()
    if unknown := sorted(skip - set(held.values())):
        raise ConfigError(
            f"BlockConfig.skip names {unknown[0]!r}, which is no convolution or linear layer of {type(model).__name__}."
        )
    exact = {name for name, layer in layers.items() if layer in skip}
    precision = Precision(bits, values == "fp16")
    found = compress_state(own, set(layers), exact, blocks, precision, rest == "fp16")
    size = envelope.write_file(Path(path), Index(tuple(found.streams), shared), found.frames)
    return CompressedReport(str(path), size, found.dense_bytes, tuple(found.rows))


def read_compressed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Loads what `write_compressed` wrote into `model`, in place, and returns it.

    The file may come from anywhere: nothing in it is run, and before anything is unpacked what it claims is compared
    with the model's own tensors, so that it takes no more memory than a second copy of these and working space for the
    largest. On any error the model is exactly as it was.

    Raises:
        StorageError: the file is missing, truncated, damaged or of a newer version, or belongs to another network
            (names the first key, shape or element type that disagrees).
    """
    file_path = Path(path)
    targets = shipped_state(model)
    for name, value in targets.items():
        _check_tensor(name, value)
    with _opened(file_path) as file:
        header, entries = envelope.read_header(file_path, file)
        with envelope.damaged(file_path):
            allowed = envelope.MOST_INDEX + sum(256 + 8 * len(name) for name in targets)
            index = envelope.read_index(file, header, entries, allowed)
        _match(file_path, index, targets, type(model).__name__)
        state: dict[str, Tensor] = {}
        for stream, offset in zip(index.streams, envelope.offsets(index), strict=True):
            with envelope.damaged(file_path, f"{next(iter(stream.tensors))}: "):
                state |= _decode(file, stream, offset)
    state |= {name: state[first] for name, first in index.shared.items()}
    _check_ties(file_path, targets, state)
    model.load_state_dict(state)
    return model


def compressed_index(path: str | os.PathLike[str]) -> Index:
    """What a compressed file holds and what each stream takes on disk, without unpacking any tensor."""
    file_path = Path(path)
    with _opened(file_path) as file:
        header, entries = envelope.read_header(file_path, file)
        with envelope.damaged(file_path):
            return envelope.read_index(file, header, entries, 16 * envelope.MOST_INDEX)


def _check_precision(bits: Any, values: Any) -> None:
    is_number = isinstance(bits, (int, float)) and not isinstance(bits, bool)
    if bits is not None and not (is_number and 0.5 <= bits <= 8):
        raise ConfigError(f"bits is {bits!r}; give a number from 0.5 to 8, or None for exact values.")
    if values not in ("exact", "fp16") or (bits is not None and values == "fp16"):
        raise ConfigError(f"values is {values!r} with bits={bits!r}; give 'exact', or 'fp16' without bits.")


def shipped_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict that a file holds: without what gated layers learned."""
    state = model.state_dict(keep_vars=True)
    gated = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, GatedLayer)]
    gates = {f"{name}.{key}" if name else key for name in gated for key in GatedLayer.GATE_KEYS}
    return {name: value for name, value in state.items() if name not in gates}


def _check_tensor(name: str, value: Any) -> None:
    """StorageError unless the entry is a tensor with values of a known type."""
    kinds = {kind.dtype for kind in envelope.KINDS.values()}
    if not isinstance(value, Tensor):
        raise StorageError(f"{name} in the state_dict is a {type(value).__name__}; only tensors can be stored.")
    if is_lazy(value) or value.is_meta:
        raise StorageError(f"{name} has no values yet; run the network once, or move it from the meta device.")
    if str(value.layout) != "torch.strided" or value.dtype not in kinds:
        raise StorageError(f"{name} is {value.dtype}, {value.layout}; only dense tensors of plain types can be stored.")


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error}); give a file that dspfx.write_compressed wrote."
        ) from error


def _match(path: Path, index: Index, targets: dict[str, Tensor], model: str) -> None:
    """StorageError at the first key that file and model do not both have, in the same shape and type."""
    held = index.tensors
    for name, value in targets.items():
        if name not in held:
            raise StorageError(f"{path} has no {name}, which {model} has; {_REMEDY}.")
        kind, shape = held[name]
        if (kind.dtype, shape) != (value.dtype, tuple(value.shape)):
            raise StorageError(
                f"{name} is {kind.name} {shape} in {path}, and {str(value.dtype).removeprefix('torch.')} "
                f"{tuple(value.shape)} in {model}; {_REMEDY}."
            )
    if unknown := next((name for name in held if name not in targets), None):
        raise StorageError(f"{path} has {unknown}, which {model} does not have; {_REMEDY}.")


def _decode(file: IO[bytes], stream: Stream, offset: int) -> dict[str, Tensor]:
    """The tensors of a stream whose shapes were compared with the model's."""
    kind, shapes = stream.kind, list(stream.tensors.values())
    words = [math.prod(shape) * (2 if kind.dtype.is_complex else 1) for shape in shapes]
    plain = stream.coding in (envelope.PLAIN, envelope.HALF)
    itemsize = 2 if stream.coding == envelope.HALF else kind.size
    most = sum(words) * itemsize if plain else most_bytes(shapes[0], kind)
    if stream.size > most + most // 64 + 1024:
        raise StorageError(f"a stream takes {stream.size} bytes where its tensors allow {most}")
    file.seek(offset)
    content = decompress(file.read(stream.size), most, most if plain else 0)
    if not plain:
        found = decode_weight(content, shapes[0], kind, stream.tiling)
    else:
        found = from_planes(np.frombuffer(content, np.uint8), sum(words), itemsize, kind.is_float)
    if stream.coding == envelope.HALF:
        found = found.view(np.float16).astype(f"f{kind.size}").view(f"u{kind.size}")
    ends = np.cumsum(words)[:-1]
    named = zip(stream.tensors, np.split(found, ends), shapes, strict=True)
    return {name: to_tensor(piece, kind, shape) for name, piece, shape in named}


def _check_ties(path: Path, targets: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """StorageError where the model has one tensor under two names and the file has two different ones."""
    first: dict[int, str] = {}
    for name, value in targets.items():
        twin = first.setdefault(id(value), name)
        if state[twin] is not state[name] and not np.array_equal(to_words(state[twin]), to_words(state[name])):
            raise StorageError(f"{twin} and {name} are one tensor in the model and two different ones in {path}.")
