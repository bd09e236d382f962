"""Compressed files from strangers: whatever is in them, a StorageError or a network, the model whole, little memory."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from torch import nn

import dspfx
from dspfx.config import BlockConfig
from dspfx.errors import StorageError
from dspfx.storage.compressed import compressed_index
from dspfx.storage.words import to_words
from tests.test_compressed import bits_of

DAMAGED = "{} is damaged, or was not written by dspfx.write_compressed: {}; copy it again, or write it again."
# Beside the network's own tensors: the index with what its JSON becomes, pieces of the file, Python itself.
CONSTANT = 48 << 20


def network(seed: int = 0) -> nn.Module:
    """Something of everything: unified and pruned blocks, dead pairs, dead weights, tables, integers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Linear(24, 20), nn.Linear(90, 70), nn.Linear(9, 9)
    )
    with torch.no_grad():
        first = model.get_parameter("0.weight")
        first[:6, :4] = 0
        first[8:, :4] = first[8:, :4].sign() * 0.25
        model.get_parameter("2.weight").copy_(torch.randn(5)[torch.randint(5, (20, 24))])
        model.get_parameter("3.weight")[torch.rand(70, 90) < 0.6] = 0
    return model


class Bundle:
    """A compressed file taken apart: the index, the content of each stream; put together again with right checksums."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8 : 8 + length])
        at = 8 + length + self.header["index"]["data_offsets"][1]
        self.index: dict[str, Any] = json.loads(zstandard.ZstdDecompressor().decompress(data[8 + length : at]))
        self.frames: list[bytes] = []
        for *_, size in self.index["streams"]:
            self.frames.append(data[at : at + size])
            at += size

    def content(self, number: int) -> bytearray:
        return bytearray(zstandard.ZstdDecompressor().decompress(self.frames[number]))

    def put(self, number: int, frame: bytes) -> None:
        self.frames[number] = frame
        self.index["streams"][number][3] = len(frame)

    def pack(self, index: bytes | None = None) -> bytes:
        text = zstandard.compress(json.dumps(self.index).encode()) if index is None else index
        size = sum(map(len, self.frames))
        for name, begin, end in (("index", 0, len(text)), ("data", len(text), len(text) + size)):
            self.header[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        return sealed(self.header, b"".join([text, *self.frames]))


def sealed(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header | {"__metadata__": header["__metadata__"] | {"sha256": "0" * 64}}).encode()
    return seal(len(text).to_bytes(8, "little") + text + rest)


def seal(data: bytes) -> bytes:
    """The file with the right checksum in place of whatever stands there, where there is a place for one."""
    found = re.search(rb'"sha256": ?"([^"]{64})"', data[:4096])
    if found is None:
        return data
    blank = data[: found.start(1)] + b"0" * 64 + data[found.end(1) :]
    return data[: found.start(1)] + hashlib.sha256(blank).hexdigest().encode() + data[found.end(1) :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for name, options in (("exact", {}), ("bits", {"bits": 4}), ("half", {"values": "fp16", "rest": "fp16"})):
        dspfx.write_compressed(network(), folder / name, BlockConfig((4, 4)), **options)
        found[name] = (folder / name).read_bytes()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def outcome(path: Path, data: bytes, model: nn.Module) -> str:
    """Reads the file; whatever happens, the model is as it was or as the file says, and memory was bounded."""
    path.write_bytes(data)
    before = bits_of(model)
    try:
        dspfx.read_compressed(path, model)
    except StorageError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert str(path) in told
        assert bits_of(model) == before
        return "refused"
    assert [(n, d, s) for n, (d, s, _) in bits_of(model).items()] == [(n, d, s) for n, (d, s, _) in before.items()]
    return "loaded"


def refused(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    model = network(1)
    before = bits_of(model)
    with pytest.raises(StorageError, match=f"^{re.escape(message)}$"):
        dspfx.read_compressed(path, model)
    assert bits_of(model) == before


def test_the_parts_put_together_are_the_file(path: Path, whole: dict[str, bytes]) -> None:
    for name, data in whole.items():
        assert outcome(path, Bundle(data).pack(), model := network(1)) == "loaded"
        if name == "exact":
            assert bits_of(model) == bits_of(network())
    codings = {
        s.coding for name, data in whole.items() if path.write_bytes(data) for s in compressed_index(path).streams
    }
    assert {"plain", "half", "free", "planes 4x4"} <= codings


def test_every_cut_and_every_flipped_byte_is_seen(path: Path, whole: dict[str, bytes]) -> None:
    model, data, draw = network(1), whole["bits"], random.Random(0)
    for length in [*range(16), *(draw.randrange(len(data)) for _ in range(30)), len(data) - 1]:
        assert outcome(path, data[:length], model) == "refused"
    for more in (b"\0", bytes(1000), data):
        assert outcome(path, data + more, model) == "refused"
    places = [*range(300), *(draw.randrange(len(data)) for _ in range(100))]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        assert outcome(path, bytes(damaged), model) == "refused", place


def damaged_copy(data: bytes, draw: random.Random) -> bytes:
    """One damaged file: bytes of the file, the index, or a stream's content, with every checksum and size right."""
    way = draw.randrange(6)
    if way == 0:  # raw damage, mostly for the checksum to find
        found = bytearray(data)
        for _ in range(draw.choice((1, 1, 4, 40))):
            found[draw.randrange(len(found))] = draw.randrange(256)
        cut = bytes(found[: draw.randrange(len(found))] if draw.random() < 0.3 else found)
        return cut + draw.randbytes(draw.choice((0, 0, 0, 1, 999)))
    if way == 1:  # the same behind a right checksum
        found = bytearray(data)
        for _ in range(draw.choice((1, 1, 4))):
            found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
        return seal(bytes(found))
    bundle = Bundle(data)
    if way == 2:  # the index, one place
        exchange(bundle.index, draw)
        return bundle.pack()
    number = draw.randrange(len(bundle.frames))
    if way == 3:  # a frame's own bytes
        frame = bytearray(bundle.frames[number])
        frame[draw.randrange(len(frame))] = draw.randrange(256)
        bundle.put(number, bytes(frame[: draw.randrange(len(frame))] if draw.random() < 0.2 else frame))
        return bundle.pack()
    content = bundle.content(number)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(min(len(content), draw.choice((8, 64, 1 << 20)))) if content else 0
        if way == 4 and content:  # a number in a content, mostly at its beginning, where lengths stand
            content[place] = draw.choice((0, 1, 2, 3, 127, 255, draw.randrange(256)))
        elif draw.random() < 0.5:
            content[place:place] = draw.randbytes(draw.choice((1, 4, 5000)))
        else:
            del content[place : place + draw.choice((1, 4, 5000))]
    bundle.put(number, zstandard.compress(bytes(content)))
    return bundle.pack()


def exchange(index: dict[str, Any], draw: random.Random) -> None:
    spots = list(_spots(index))
    (owner, key), (other, place) = draw.choice(spots), draw.choice(spots)
    hostile: list[Any] = [
        None,
        -1,
        0,
        1 << 62,
        10**400,
        1.5,
        True,
        [],
        {},
        "",
        "planes 4x4",
        "gemm 1x1",
        "planes 999999999x1",
    ]
    hostile += [
        "half",
        "free",
        "plain",
        "float16",
        "uint8",
        "complex128",
        [1 << 40],
        [0, 4],
        copy.deepcopy(other[place]),
    ]
    owner[key] = draw.choice(hostile)


def _spots(value: Any) -> Any:
    for key, item in list(enumerate(value)) if isinstance(value, list) else list(value.items()):
        yield value, key
        if isinstance(item, (list, dict)):
            yield from _spots(item)


def fuzz(path: Path, whole: dict[str, bytes], trials: int, seed: int) -> dict[str, int]:
    draw, model, outcomes = random.Random(seed), network(1), {"loaded": 0, "refused": 0}
    allowed = 3 * sum(v.nbytes for v in model.state_dict().values()) + CONSTANT
    tracemalloc.start()
    try:
        for _ in range(trials):
            data = damaged_copy(draw.choice(list(whole.values())), draw)
            tracemalloc.reset_peak()
            outcomes[outcome(path, data, model)] += 1
            assert tracemalloc.get_traced_memory()[1] < allowed
    finally:
        tracemalloc.stop()
    return outcomes


def test_damaged_files_raise_storage_errors_only(path: Path, whole: dict[str, bytes]) -> None:
    outcomes = fuzz(path, whole, 150, seed=0)
    assert outcomes["refused"] > 75
    assert outcomes["loaded"] > 5


@pytest.mark.slow
def test_a_thousand_damaged_files_raise_storage_errors_only(path: Path, whole: dict[str, bytes]) -> None:
    outcomes = fuzz(path, whole, 1000, seed=1)
    assert sum(outcomes.values()) == 1000
    assert outcomes["refused"] > 500
    assert outcomes["loaded"] > 50


def test_checksum_and_sizes_are_named(path: Path, whole: dict[str, bytes]) -> None:
    data = whole["exact"]
    refused(path, data[:-1], DAMAGED.format(path, f"it has {len(data) - 1} bytes where its header says {len(data)}"))
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    right = hashlib.sha256(re.sub(rb"[0-9a-f]{64}", b"0" * 64, flipped, count=1)).hexdigest()
    says = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["sha256"]
    refused(path, flipped, DAMAGED.format(path, f"its checksum is {right}, its header says {says}"))
    absent = (
        f"{path} is no file of dspfx.write_compressed, or ends within its first 4096 bytes; one that dspfx.save wrote "
        "is read with dspfx.load."
    )
    refused(path, b"", absent)
    refused(path, data[:30], absent)
    long = (1 << 62).to_bytes(8, "little") + data[8:]
    refused(path, long, DAMAGED.format(path, f"its header claims {1 << 62} bytes of at most 4096, and has 4096"))


def test_other_files_and_newer_versions_say_so(path: Path, whole: dict[str, bytes]) -> None:
    torch.manual_seed(0)
    dspfx.save(dspfx.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 8, 8)), path)
    with pytest.raises(StorageError, match=r"one that dspfx.save wrote is read with dspfx.load\.$"):
        dspfx.read_compressed(path, network())
    path.write_bytes(whole["exact"])
    with pytest.raises(StorageError, match=r"dspfx\.read_compressed\(path, model\)\.$"):
        dspfx.load(path)
    bundle = Bundle(whole["exact"])
    bundle.header["__metadata__"]["version"] = "2"
    message = (
        f"{path} was written in version 2 of the compressed format by a newer dspfx, this one reads up to version 1; "
        "upgrade dspfx: pip install --upgrade dspfx."
    )
    refused(path, bundle.pack(), message)
    for version in ("", "0", "-1", "²", "1.0", "9" * 30):
        bundle.header["__metadata__"]["version"] = version
        refused(path, bundle.pack(), DAMAGED.format(path, f"its format is 'dspfx.compressed', version {version!r}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["streams"][0].__setitem__(0, "planes 13x1"), "its blocks of 13x1 do not fit 12x8 weights"),
        (lambda d: d["streams"][0].__setitem__(0, "planes 0x4"), "its streams do not hold ['0.weight'] of shape "
         "[(12, 8, 3, 3)] as 'planes 0x4', float32"),
        (lambda d: d["streams"][0].__setitem__(1, "int32"), "its streams do not hold ['0.weight'] of shape "
         "[(12, 8, 3, 3)] as 'planes 4x4', int32"),
        (lambda d: d["streams"][0].__setitem__(1, "object"), "'object' is not an element type"),
        (lambda d: d["streams"][0].__setitem__(2, 2**40), "a stream of its index is ['planes 4x4', 'float32', "
         "1099511627776, {}], with 13 tensors left"),
        (lambda d: d["shapes"].__setitem__(0, [2**30, 2**30]), "a tensor's shape is [1073741824, 1073741824]"),
        (lambda d: d["shapes"].__setitem__(0, [-12, -8, 3, 3]), "a tensor's shape is [-12, -8, 3, 3]"),
        (lambda d: d["names"].__setitem__(0, d["names"][1]), "it has 13 names, 12 different ones, and 13 shapes"),
        (lambda d: d["shared"].__setitem__("x", "y"), "'x' cannot be the same as 'y'"),
        (lambda d: d["shared"].__setitem__("x", ["0.weight"]), "'x' cannot be the same as ['0.weight']"),
        (lambda d: d.pop("names"), "the index's names is None"),
    ],
)  # fmt: skip
def test_impossible_indices_are_named(path: Path, whole: dict[str, bytes], change: Any, message: str) -> None:
    bundle = Bundle(whole["exact"])
    size = bundle.index["streams"][0][3]
    change(bundle.index)
    refused(path, bundle.pack(), DAMAGED.format(path, message.format(size)))


def test_content_is_not_unpacked_beyond_what_the_model_needs(path: Path, whole: dict[str, bytes]) -> None:
    """Frames that claim, or hold, more than their tensors need are refused before anything is allocated."""
    model = network(1)
    bomb = zstandard.compress(bytes(1 << 28))
    assert len(bomb) < 30_000
    claim = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60) + b"\x01\x00\x00"
    cases = {}
    for name, frame in (("bomb", bomb), ("claim", claim), ("long", bytes(1 << 22))):
        for number in (0, 1, -1):
            bundle = Bundle(whole["exact"])
            bundle.put(number, frame)
            cases[f"{name} {number}"] = bundle.pack()
        cases[f"{name} as index"] = Bundle(whole["exact"]).pack(index=frame)
    for name, data in cases.items():
        path.write_bytes(data)
        del data
        tracemalloc.start()
        with pytest.raises(StorageError, match=r"claims|takes|is no zstd frame"):
            dspfx.read_compressed(path, model)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (1 << 20), name


def test_the_first_stream_names_its_tensor(path: Path, whole: dict[str, bytes]) -> None:
    bundle = Bundle(whole["exact"])
    most = 2 * 4 * 12 * 8 * 9 + 8 * 12 + 8192
    bundle.put(0, zstandard.compress(bytes(most + 1)))
    told = f"0.weight: a stream claims {most + 1} bytes where its tensors allow 0 to {most}"
    refused(path, bundle.pack(), DAMAGED.format(path, told))
    last = len(bundle.frames) - 1
    bundle = Bundle(whole["exact"])
    bundle.put(last, zstandard.compress(bytes(9)))
    told = "1.num_batches_tracked: a stream claims 9 bytes where its tensors allow 8"
    refused(path, bundle.pack(), DAMAGED.format(path, told))


def weight_file(path: Path, content: bytes, coding: str = "planes 2x2") -> tuple[nn.Module, bytes]:
    """A 4x4 linear layer and a file whose one stream is this content."""
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(16.0).reshape(4, 4) + 0.3)
    dspfx.write_compressed(model, path)
    bundle = Bundle(path.read_bytes())
    bundle.index["streams"][0][0] = coding
    bundle.put(0, zstandard.compress(content))
    return model, bundle.pack()


ROTATED_ONE = b"\x7f\0\0\0"


@pytest.mark.parametrize(
    ("coding", "content", "message"),
    [
        ("planes 2x2", b"", "its kind of map take 1 bytes, of which 0 are there"),
        ("planes 2x2", b"\x03", "its map of dead weights is of kind 3, which does not exist"),
        ("planes 2x2", b"\x01\0\0\0\0", "its map has 0 distinct rows for 4 filters"),
        ("planes 2x2", b"\x01\xff\xff\xff\xff", "its map has 4294967295 distinct rows for 4 filters"),
        ("planes 2x2", b"\x01\x01\0\0\0\x10", "bits behind the last entry of a map are set"),
        ("planes 2x2", b"\x01\x01\0\0\0\x00\0\0\x01\0", "a filter has row 1 of a map of 1"),
        ("planes 2x2", b"\x02\xff", "its map take 2 bytes, of which 1 are there"),
        ("planes 2x2", b"\x00", "its classes take 1 bytes, of which 0 are there"),
        ("planes 2x2", b"\x00\xf3", "five classes are the byte 243, where the largest is 242"),
        ("planes 2x2", b"\x00\xf2", "bits behind the last entry of a map are set"),
        ("planes 2x2", b"\x00\x50\0", "1 bytes are left over in a stream"),
        ("planes 2x2", b"\x00\x4f\0" + ROTATED_ONE, "its signs take 1 bytes, of which 0 are there"),
        ("planes 2x2", b"\x00\x4f\0" + b"\0\0\0\1", "one of its magnitudes is negative"),
        ("planes 2x2", b"\x00\x4f\0" + ROTATED_ONE + b"\xf0", "bits behind the last entry of a map are set"),
        ("planes 2x2", b"\x00\x4e\0", "its free weights take 16 bytes, of which 0 are there"),
        ("free", b"\x00\x03", "its free weights are of kind 3, which float32 does not have"),
        ("free", b"\x00\x02\x01" + bytes(8) + b"\x03", "its free weights are packed 3 a byte"),
        ("free", b"\x00\x02\x00" + bytes(4) + b"\x04" + b"\x55" * 4, "one of its free weights is level 1 of 1"),
        ("free", b"\x00\x02\xff" + bytes(8), "its levels of free weights take 1024 bytes, of which 8 are there"),
    ],
)
def test_impossible_contents_are_named(path: Path, coding: str, content: bytes, message: str) -> None:
    model, data = weight_file(path, content, coding)
    path.write_bytes(data)
    before = bits_of(model)
    with pytest.raises(StorageError, match=f"^{re.escape(DAMAGED.format(path, f'weight: {message}'))}$"):
        dspfx.read_compressed(path, model)
    assert bits_of(model) == before


def test_bools_are_zero_or_one(path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("flag", torch.tensor([True, False]))
    dspfx.write_compressed(model, path)
    bundle = Bundle(path.read_bytes())
    number = next(i for i, row in enumerate(bundle.index["streams"]) if row[1] == "bool")
    bundle.put(number, zstandard.compress(b"\1\2"))
    path.write_bytes(bundle.pack())
    with pytest.raises(StorageError, match=r": flag: a bool is the byte 2; copy it again"):
        dspfx.read_compressed(path, model)


def test_a_deep_or_endless_index_is_refused(path: Path, whole: dict[str, bytes]) -> None:
    for text in (b"[" * 100_000, b"{" * 9, b'{"streams":' + b"9" * 9999 + b"}", b"\xff\xfe", b"null", b"NaN"):
        assert outcome(path, Bundle(whole["exact"]).pack(index=zstandard.compress(text)), network(1)) == "refused"
    header = Bundle(whole["exact"]).header
    for name, entry in (("data", None), ("index", []), ("more", {}), ("data", {"data_offsets": [0, 1 << 60]})):
        assert outcome(path, sealed(header | {name: entry}, bytes(1000)), network(1)) == "refused"


def test_reading_allocates_no_more_than_a_second_copy(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(128, 128, 3) for _ in range(8)])
    for options in ({}, {"bits": 5}):
        dspfx.write_compressed(model, path, BlockConfig(), **options)  # type: ignore[arg-type]
        tracemalloc.start()
        dspfx.read_compressed(path, model)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        own = sum(value.nbytes for value in model.state_dict().values())
        assert peak < own + 4 * max(value.nbytes for value in model.state_dict().values()) + (1 << 20)
    assert to_words(next(iter(model.state_dict().values()))).any()
