"""write_compressed, read_compressed: every bit comes back, little room is taken, and the document says how."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import dspfx
from dspfx.cli.models import build
from dspfx.config import BlockConfig, GateConfig
from dspfx.errors import ConfigError, StorageError
from dspfx.method.blocks import FREE, PRUNED, UNIFIED, Tiling, counts, distortions, projected, select
from dspfx.storage.compressed import compressed_index
from dspfx.storage.report import CompressedRow
from dspfx.storage.streams import compress, from_planes, pack, pack_trits, to_planes, unpack, unpack_trits
from dspfx.storage.words import KINDS, to_words
from tests import format_decoder

DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"
Build = Callable[[], nn.Module]


class Mixed(nn.Module):
    """Every kind of layer and tensor: depthwise, transposed, tied, integers, empty, without axes, complex."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3)
        self.depthwise = nn.Conv2d(6, 6, (1, 5), groups=6, bias=False)
        self.line = nn.Conv1d(3, 5, 2)
        self.volume = nn.Conv3d(2, 3, 2)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.norm = nn.BatchNorm2d(10)
        self.embedding = nn.Embedding(40, 7)
        self.head = nn.Linear(7, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.of_half = nn.Linear(9, 5).half()
        self.of_bfloat = nn.Linear(9, 5).bfloat16()
        self.of_double = nn.Linear(9, 5).double()
        odd = torch.tensor([1.0, -0.0, 0.0, float("nan"), float("-inf"), 1e-45])
        odd.view(torch.int32)[3] = 0x7FA12345  # a signalling NaN with a payload
        self.register_buffer("odd", odd)
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(-7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("wave", torch.complex(torch.randn(3, 2), torch.randn(3, 2)).conj())
        self.register_buffer("bytes", torch.arange(200, dtype=torch.uint8))
        self.register_buffer("table", torch.randn(200, 100))  # large enough for a stream of its own


def unify(model: nn.Module, block: tuple[int, int] = (4, 4), layout: str = "planes", prune: float = 0.3) -> nn.Module:
    """Half of each layer's blocks unified, in place."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach()
            tiling = Tiling(tuple(weight.shape), block, layout)
            blocks = tiling.split(weight)
            pruned, unified = counts(tiling.count, prune, 0.5)
            classes = select(*distortions(blocks, blocks != 0), unified, pruned)
            with torch.no_grad():
                weight.copy_(tiling.join(projected(blocks, blocks != 0, classes)))
    return model


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 18, 3), nn.BatchNorm2d(18), nn.Conv2d(18, 16, 1), nn.Linear(30, 7))


def bits_of(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {n: (v.dtype, tuple(v.shape), to_words(v).tobytes()) for n, v in model.state_dict().items()}


def decoded(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """The same, of a file, by the reader written from the document."""
    size = format_decoder.SIZES
    return {
        name: (KINDS[kind].dtype, tuple(shape), b"".join(word.to_bytes(size[kind], "little") for word in words))
        for name, (kind, shape, words) in format_decoder.decode(path).items()
    }


def row(report: dspfx.storage.report.CompressedReport, name: str) -> CompressedRow:
    return next(r for r in report.rows if r.name == name)


def scrambled(model: nn.Module) -> nn.Module:
    for value in model.state_dict().values():
        value.copy_(torch.ones_like(value))
    return model


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    before = bits_of(model)
    report = dspfx.write_compressed(model, tmp_path / "a")
    assert bits_of(model) == before
    fresh = scrambled(Mixed())
    assert bits_of(fresh) != before
    assert dspfx.read_compressed(tmp_path / "a", fresh) is fresh
    assert bits_of(fresh) == before
    assert decoded(tmp_path / "a") == before
    assert report.size == (tmp_path / "a").stat().st_size
    dspfx.write_compressed(model, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    dspfx.write_compressed(small(), tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert set(file.keys()) == {"index", "data"}
        assert file.metadata()["format"] == "dspfx.compressed"
        sizes = [file.get_tensor(name).numel() for name in ("index", "data")]
    index = compressed_index(tmp_path / "a")
    assert sum(s.size for s in index.streams) == sizes[1]
    assert {name: shape for name, (_, shape) in index.tensors.items()} == {
        name: tuple(value.shape) for name, value in small().state_dict().items()
    }


@pytest.mark.parametrize("layout", ["planes", "gemm"])
@pytest.mark.parametrize("block", [(4, 4), (1, 4), (16, 1), (5, 7)])
def test_unified_networks_come_back_and_are_small(tmp_path: Path, block: tuple[int, int], layout: Any) -> None:
    model = unify(small(), block, layout)
    report = dspfx.write_compressed(model, tmp_path / "a", BlockConfig(block, layout=layout))
    fresh = dspfx.read_compressed(tmp_path / "a", small(1))
    assert bits_of(fresh) == bits_of(model) == decoded(tmp_path / "a")
    found = row(report, "0.weight")
    assert found.counts is not None
    tiling = Tiling((18, 3, 3, 3), block, layout)
    blocks = tiling.split(model.get_parameter("0.weight").detach())
    alive = (blocks != 0).sum(1)
    flat = (blocks.abs().amax(1) == torch.where(blocks == 0, 9.0, blocks.abs()).amin(1)) & (alive > 1)
    assert (found.counts.pruned, found.counts.unified) == (int((alive == 0).sum()), int(flat.sum()))
    assert sum((found.counts.free, found.counts.unified, found.counts.pruned)) == tiling.count


def test_the_blocks_are_found(tmp_path: Path) -> None:
    for block, layout in (((4, 4), "planes"), ((8, 8), "planes"), ((1, 16), "gemm"), ((16, 1), "planes")):
        torch.manual_seed(0)
        model = unify(nn.Sequential(nn.Conv2d(32, 64, 3)), block, layout)
        report = dspfx.write_compressed(model, tmp_path / "a")
        assert row(report, "0.weight").coding == f"{layout} {block[0]}x{block[1]}"


def entropy_bytes(symbols: Any) -> float:
    share = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-len(symbols) * (share * np.log2(share)).sum() / 8)


def test_size_is_near_the_entropy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 128, 3, bias=False))
    nn.init.normal_(model.get_parameter("0.weight"))
    report = dspfx.write_compressed(unify(model), tmp_path / "a", bits=5)
    read = dspfx.read_compressed(tmp_path / "a", nn.Sequential(nn.Conv2d(128, 128, 3, bias=False)))
    blocks = Tiling((128, 128, 3, 3), (4, 4)).split(read.get_parameter("0.weight").detach()).numpy()
    size = np.abs(blocks)
    classes = np.where(size.max(1) == 0, PRUNED, np.where(size.max(1) == size.min(1), UNIFIED, FREE))
    unified = size[classes == UNIFIED]
    least = sum(map(entropy_bytes, (classes, unified[:, 0], blocks[classes == FREE].ravel()))) + unified.size / 8
    least += 4 * (len(np.unique(unified)) + len(np.unique(blocks[classes == FREE])))  # the tables
    assert least < report.rows[0].size < 1.015 * least + 150
    assert report.size - sum(r.size for r in report.rows) < 420


def test_dead_pairs_of_groups_cost_a_map_of_few_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = []
    for kill in (False, True):
        model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False))
        keep = torch.rand(4, 64) < 0.5
        group = torch.arange(64) % 4
        weight = model.get_parameter("0.weight").detach()
        if kill:
            weight *= keep[group][:, :, None, None]
            weight += 0.0  # no negative zeros
        report = dspfx.write_compressed(model, tmp_path / "a", bits=5)
        found = row(report, "0.weight")
        assert found.counts is not None
        sizes.append(found.size)
        assert found.counts.dead == (int((~keep[group]).sum()) * 9 if kill else 0)
        assert decoded(tmp_path / "a") == bits_of(dspfx.read_compressed(tmp_path / "a", model))
    share = float(keep[group].float().mean())
    assert sizes[1] < sizes[0] * share + 4 * 8 + 64 / 4 + 120


def test_dead_pairs_and_unified_blocks_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, bias=False))
    weight = model.get_parameter("0.weight").detach()
    dead = (torch.rand(2, 32) < 0.4)[torch.arange(32) % 2]
    weight[dead] = 0.0
    unify(model)
    report = dspfx.write_compressed(model, tmp_path / "a")
    found = row(report, "0.weight")
    assert found.coding == "planes 4x4"
    assert found.counts is not None
    assert found.counts.dead >= int(dead.sum()) * 9
    assert found.counts.unified > 250
    assert bits_of(dspfx.read_compressed(tmp_path / "a", scrambled(nn.Sequential(nn.Conv2d(32, 32, 3, bias=False)))))
    assert decoded(tmp_path / "a") == bits_of(model)


def test_single_zeros_cost_a_map(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    keep = torch.rand(256, 256) < 0.25
    with torch.no_grad():
        model.weight.masked_fill_(~keep, 0.0)
    report = dspfx.write_compressed(model, tmp_path / "a")
    assert report.rows[0].counts is not None
    assert report.rows[0].counts.dead == int((~keep).sum())
    assert report.rows[0].size < int(keep.sum()) * 4 * 0.88 + 256 * 256 * 0.82 / 8 + 50
    assert decoded(tmp_path / "a") == bits_of(model)


def test_negative_zeros_come_back_and_vanish_when_quantised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    with torch.no_grad():
        model.weight[:, 8:24] *= 0.0
    assert bool((torch.signbit(model.weight) & (model.weight == 0)).any())
    dspfx.write_compressed(model, tmp_path / "a")
    assert (
        bits_of(dspfx.read_compressed(tmp_path / "a", nn.Linear(32, 32))) == bits_of(model) == decoded(tmp_path / "a")
    )
    report = dspfx.write_compressed(model, tmp_path / "a", bits=3)
    fresh = dspfx.read_compressed(tmp_path / "a", nn.Linear(32, 32))
    assert not to_words(fresh.state_dict()["weight"][:, 8:24]).any()
    assert 0 < report.rows[0].error < 0.3


def test_no_structure_costs_no_more_than_byte_planes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(64, 64, 3, bias=False)
    report = dspfx.write_compressed(model, tmp_path / "a")
    planes = compress(to_planes(to_words(model.weight), rotate=True))
    assert report.rows[0].size <= len(planes) < 0.87 * 4 * model.weight.numel()


def test_few_different_values_become_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(16)[torch.randint(16, (64, 64))])
    report = dspfx.write_compressed(model, tmp_path / "a")
    assert report.rows[0].size < 64 * 64 / 2 + 16 * 4 + 40
    assert decoded(tmp_path / "a") == bits_of(model)


@pytest.mark.parametrize(
    "options",
    [
        *({"bits": bits} for bits in (1.5, 2, 3, 4, 5, 8)),
        *({"values": "fp16"}, {"values": "fp16", "rest": "fp16"}, {"bits": 4, "rest": "fp16"}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_quantised_networks_keep_their_structure(tmp_path: Path, options: Any, dtype: str) -> None:
    def make(seed: int) -> nn.Module:
        return unify(small(seed)).to(getattr(torch, dtype))

    model = make(0)
    report = dspfx.write_compressed(model, tmp_path / "a", BlockConfig((4, 4)), **options)
    fresh = dspfx.read_compressed(tmp_path / "a", make(1))
    assert decoded(tmp_path / "a") == bits_of(fresh)
    for name in ("0.weight", "2.weight", "3.weight"):
        old, new = model.get_parameter(name).detach(), fresh.get_parameter(name).detach()
        tiling = Tiling(tuple(old.shape), (4, 4))
        before, after = tiling.split(old), tiling.split(new)
        assert not bool(after[before == 0].any())
        is_unified = (before.abs().amax(1) == torch.where(before == 0, 9, before.abs()).amin(1)) & before.any(1)
        is_unified &= (before != 0).sum(1) > 1
        assert bool(is_unified.any())
        signs = before[is_unified].sign()
        magnitude = after[is_unified].abs().amax(1, keepdim=True)
        assert bool((magnitude > 0).all())
        assert torch.equal(after[is_unified], signs * magnitude)
    for name, value in model.state_dict().items():
        if options.get("rest") != "fp16" and value.dim() < 2:
            assert torch.equal(fresh.state_dict()[name], value)
    assert max(r.error for r in report.rows) < {1.5: 0.4, 2: 0.5, 3: 0.3, 4: 0.15}.get(options.get("bits", 8), 0.08)


def test_more_bits_less_error_more_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    nn.init.normal_(model.weight)
    found = [dspfx.write_compressed(model, tmp_path / "a", bits=bits).rows[0] for bits in range(2, 8)]
    assert [r.size for r in found] == sorted(r.size for r in found)
    assert all(r.size <= 1.06 * bits / 8 * 256**2 + 1500 for bits, r in zip(range(2, 8), found, strict=True))
    # entropy-coded scalars are 1.53 dB above the rate-distortion function of a normal distribution
    decibels = [-20 * math.log10(r.error) for r in found]
    assert decibels == pytest.approx([6.02 * bits - 1.53 for bits in range(2, 8)], abs=0.7)


def test_writing_what_was_read_loses_nothing_more(tmp_path: Path) -> None:
    model = unify(small())
    first = dspfx.write_compressed(model, tmp_path / "a", bits=4)
    read = dspfx.read_compressed(tmp_path / "a", small(1))
    again = dspfx.write_compressed(read, tmp_path / "b")
    assert max(r.error for r in again.rows) == 0
    assert again.size < first.size * 1.3
    assert bits_of(dspfx.read_compressed(tmp_path / "b", small(2))) == bits_of(read)


def test_rest_is_halved_where_float16_is_exact_enough(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(64), nn.BatchNorm1d(64))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape).abs() + 0.1)
        model.get_buffer("0.running_var")[3] = 1e-7
        model.get_buffer("1.running_var")[3] = 1e6
    dspfx.write_compressed(model, tmp_path / "a", rest="fp16")
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = dspfx.read_compressed(tmp_path / "a", scrambled(model)).state_dict()
    exact = {name for name in old if torch.equal(old[name], new[name])}
    assert exact == {"0.running_var", "1.running_var", "0.num_batches_tracked", "1.num_batches_tracked"}
    assert all(torch.equal(new[name], old[name].half().float()) for name in set(old) - exact)


def test_layers_to_skip_stay_exact(tmp_path: Path) -> None:
    model = small()
    report = dspfx.write_compressed(model, tmp_path / "a", BlockConfig(skip=("0", "3")), bits=2, rest="fp16")
    assert [r.error > 0 for r in report.rows][:3] == [False, True, False] or row(report, "2.weight").error > 0
    fresh = dspfx.read_compressed(tmp_path / "a", small(1))
    assert [
        n
        for n in ("0", "2", "3")
        if torch.equal(fresh.get_parameter(f"{n}.weight"), model.get_parameter(f"{n}.weight"))
    ] == ["0", "3"]
    message = "BlockConfig.skip names '1', which is no convolution or linear layer of Sequential."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dspfx.write_compressed(model, tmp_path / "a", BlockConfig(skip=("1",)))


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    dspfx.write_compressed(model, tmp_path / "a")
    index = compressed_index(tmp_path / "a")
    assert index.shared == {"head.weight": "embedding.weight"}
    untied = Mixed()
    untied.head.weight = nn.Parameter(torch.zeros(40, 7))
    dspfx.read_compressed(tmp_path / "a", untied)
    assert torch.equal(untied.head.weight, model.embedding.weight)
    untied.head.weight = nn.Parameter(torch.zeros(40, 7))
    dspfx.write_compressed(untied, tmp_path / "b")
    with pytest.raises(StorageError, match=r"^embedding.weight and head.weight are one tensor in the model and two "):
        dspfx.read_compressed(tmp_path / "b", model)
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
    dspfx.write_compressed(untied, tmp_path / "b")
    assert bits_of(dspfx.read_compressed(tmp_path / "b", Mixed())) == bits_of(untied)


def test_gates_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = build("resnet20", 10), torch.zeros(1, 3, 32, 32)
    gm = dspfx.prepare(model, example, GateConfig(groups=2))
    dspfx.write_compressed(gm, tmp_path / "gated")
    dspfx.write_compressed(model, tmp_path / "plain")
    assert (tmp_path / "gated").read_bytes() == (tmp_path / "plain").read_bytes()
    plain = dspfx.read_compressed(tmp_path / "gated", build("resnet20", 10))
    assert bits_of(plain) == bits_of(model)
    other = dspfx.prepare(build("resnet20", 10), example, GateConfig(groups=2))
    gates = {name: value for name, value in other.state_dict().items() if "gate_" in name}
    assert len(gates) > 20
    for value in gates.values():
        value.copy_(torch.ones_like(value))
    dspfx.read_compressed(tmp_path / "plain", other)
    state = other.state_dict()
    assert all(bool((state[name] == 1).all()) for name in gates)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_memory_format_mode_and_gradients_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fresh = small().to(memory_format=torch.channels_last), small(1).to(memory_format=torch.channels_last).eval()
    dspfx.write_compressed(unify(model), tmp_path / "a")
    weight = fresh.get_parameter("0.weight").requires_grad_(False)
    place, strides = weight.data_ptr(), weight.stride()
    dspfx.read_compressed(tmp_path / "a", fresh)
    assert bits_of(fresh) == bits_of(model) == decoded(tmp_path / "a")
    assert fresh.get_parameter("0.weight") is weight
    assert (weight.data_ptr(), weight.stride(), weight.requires_grad) == (place, strides, False)
    assert strides != small().get_parameter("0.weight").stride()
    assert not fresh.training


def test_a_users_own_buffer_of_that_name_stays(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("gate_keep", torch.arange(4.0))
    dspfx.write_compressed(model, tmp_path / "a")
    fresh = nn.Linear(3, 3)
    fresh.register_buffer("gate_keep", torch.zeros(4))
    assert bits_of(dspfx.read_compressed(tmp_path / "a", fresh)) == bits_of(model)


def _renamed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 18, 3), nn.BatchNorm2d(18), nn.Conv2d(18, 16, 1))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 9, 3)),
            "0.weight is float32 (18, 3, 3, 3) in {}, and float32 (9, 3, 3, 3) in Sequential; ",
        ),
        (
            lambda: small().double(),
            "0.weight is float32 (18, 3, 3, 3) in {}, and float64 (18, 3, 3, 3) in Sequential; ",
        ),
        (lambda: nn.Sequential(*small(), nn.Linear(2, 2)), "{} has no 4.weight, which Sequential has; "),
        (_renamed, "{} has 3.weight, which Sequential does not have; "),
    ],
)
def test_another_network_is_named(tmp_path: Path, other: Build, message: str) -> None:
    path = tmp_path / "a"
    dspfx.write_compressed(small(), path)
    model = other()
    before = bits_of(model)
    remedy = "give the network it was written from, or one with the same state_dict keys and shapes."
    with pytest.raises(StorageError, match=f"^{re.escape(message.format(path) + remedy)}$"):
        dspfx.read_compressed(path, model)
    assert bits_of(model) == before


def test_settings_are_checked(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"bits": 0.4}, "bits is 0.4; give a number from 0.5 to 8, or None for exact values."),
        ({"bits": 9}, "bits is 9; give a number from 0.5 to 8, or None for exact values."),
        ({"bits": "4"}, "bits is '4'; give a number from 0.5 to 8, or None for exact values."),
        ({"bits": 4, "values": "fp16"}, "values is 'fp16' with bits=4; give 'exact', or 'fp16' without bits."),
        ({"rest": "int8"}, "rest is 'int8'; give 'exact' or 'fp16'."),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            dspfx.write_compressed(small(), tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 4] = float("nan")
    dspfx.write_compressed(model, tmp_path / "exact")
    assert bits_of(dspfx.read_compressed(tmp_path / "exact", small(1))) == bits_of(model)
    message = (
        "2.weight: a weight is not finite, so it cannot be quantised; leave out bits and values, or name its layer in "
        "BlockConfig.skip."
    )
    for options in ({"bits": 4}, {"values": "fp16"}):
        with pytest.raises(StorageError, match=f"^{re.escape(message)}$"):
            dspfx.write_compressed(model, tmp_path / "a", **options)
    large = nn.Linear(4, 4)
    nn.init.constant_(large.weight, 1e6)
    with torch.no_grad():
        large.weight += torch.randn(4, 4)
    with pytest.raises(
        StorageError, match=r"^weight: a weight is 10000.*, which float16 cannot hold; write exact values, "
    ):
        dspfx.write_compressed(large, tmp_path / "a", values="fp16")
    with pytest.raises(
        StorageError, match=r"^weight has no values yet; run the network once, or move it from the meta "
    ):
        dspfx.write_compressed(nn.Linear(3, 3, device="meta"), tmp_path / "a")
    with pytest.raises(StorageError, match=r"cannot be written \(.*\); give a file in a folder that can be.$"):
        dspfx.write_compressed(small(), tmp_path / "none" / "a")
    with pytest.raises(
        StorageError, match=r"none cannot be read \(.*\); give a file that dspfx.write_compressed wrote.$"
    ):
        dspfx.read_compressed(tmp_path / "none", small())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exact"]


def test_constant_and_tiny_weights_can_be_quantised(tmp_path: Path) -> None:
    for value in (0.0, 0.25, 1e-44, 3e38, -1.0):
        model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80).half())
        nn.init.constant_(model.get_parameter("0.weight"), value)
        nn.init.constant_(model.get_parameter("1.weight"), max(min(value, 6e4), -6e4))
        report = dspfx.write_compressed(model, tmp_path / "a", bits=2)
        assert max(r.error for r in report.rows) == 0
    model = nn.Sequential(nn.Linear(80, 80))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.randint(1, 300, (80, 80)) * 1e-45)
    assert dspfx.write_compressed(model, tmp_path / "a", bits=2).rows[0].error < 0.2  # steps of the least float32


def test_the_report_accounts_for_every_byte(tmp_path: Path) -> None:
    model = unify(small())
    report = dspfx.write_compressed(model, tmp_path / "a", bits=4)
    text = str(report)
    assert report.dense_bytes == sum(v.nbytes for v in model.state_dict().values())
    assert report.ratio == report.dense_bytes / (tmp_path / "a").stat().st_size
    assert f"{report.size:,}" in text.splitlines()[-1]
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["0.weight", "2.weight", "3.weight"]
    listed = {name: s.size for s in compressed_index(tmp_path / "a").streams for name in s.tensors}
    assert all(listed[r.name] == r.size for r in report.rows if r.shape)


def test_the_documents_example_is_read(tmp_path: Path) -> None:
    dump = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    path = tmp_path / "example"
    path.write_bytes(bytes.fromhex(" ".join(dump)))
    weight = [[0, 0, 0.5, -0.5], [0, 0, -0.5, 0.5], [0.25, -0.25, 1, 2], [0.25, 0.25, 3, -4]]
    model = dspfx.read_compressed(path, nn.Linear(4, 4))
    assert model.state_dict()["weight"].tolist() == weight
    assert model.state_dict()["bias"].tolist() == [1, -1, 0, 0.5]
    assert decoded(path) == bits_of(model)
    index = re.search(r"```json\n(.*)\n```", DOCUMENT.read_text())
    assert index is not None
    assert len(path.read_bytes()) == 435
    assert [s.coding for s in compressed_index(path).streams] == ["planes 2x2", "plain"]


words_of_any_size = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda size: st.lists(st.integers(0, 2 ** (8 * size) - 1), max_size=40).map(lambda x: np.array(x, f"u{size}"))
)


@settings(deadline=None, max_examples=60)
@given(words_of_any_size, st.booleans())
def test_planes_round_trip(words: np.ndarray, rotate: bool) -> None:
    planes = np.frombuffer(b"".join(to_planes(words, rotate)), np.uint8)
    assert np.array_equal(from_planes(planes, len(words), words.dtype.itemsize, rotate), words)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 255), max_size=40), st.sampled_from([1, 2, 4, 8]))
def test_packing_round_trips(numbers: list[int], per_byte: int) -> None:
    entries = (np.array(numbers, np.int64) % 2 ** (8 // per_byte)).astype(np.uint8)
    packed = np.frombuffer(pack(entries, per_byte), np.uint8)
    assert len(packed) == -(-len(entries) // per_byte)
    assert np.array_equal(unpack(packed, len(entries), per_byte), entries)
    trits = (np.array(numbers, np.int64) % 3).astype(np.uint8)
    fives = np.frombuffer(pack_trits(trits), np.uint8)
    assert len(fives) == -(-len(trits) // 5)
    assert np.array_equal(unpack_trits(fives, len(trits)), trits)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from([(), (2,), (3, 3), (1, 1)]))
def test_any_weight_round_trips(seed: int, filters: int, channels: int, kernel: tuple[int, ...]) -> None:
    from dspfx.storage.blockcode import cut_weight, decode_weight, encode_weight, most_bytes
    from dspfx.storage.words import Precision

    draw = np.random.default_rng(seed)
    shape, kind = (filters, channels, *kernel), KINDS["float32"]
    few = draw.choice(
        [0.0, -0.0, 0.5, -0.5, 2.0, np.nan, np.inf], size=shape, p=[0.4, 0.05, 0.2, 0.2, 0.05, 0.05, 0.05]
    )
    values = np.where(draw.random(shape) < draw.choice([0, 0.1, 0.9]), draw.normal(size=shape), few).astype(np.float32)
    tiling = Tiling(shape, (int(draw.integers(1, filters + 1)), int(draw.integers(1, channels + 1))))
    words = values.reshape(-1).view(np.uint32)
    whole, rough = Precision(), Precision(bits=2)
    found, parts, counted = encode_weight(cut_weight(words, shape, kind, [tiling], whole), shape, kind, whole)
    content = b"".join(parts)
    assert len(content) <= most_bytes(shape, kind)
    assert np.array_equal(decode_weight(content, shape, kind, found), words)
    assert counted.free + counted.unified + counted.pruned == (tiling.count if found else 1)
    finite = np.where(np.isfinite(values), values, 1.0).astype(np.float32).reshape(-1)
    _, parts, _ = encode_weight(cut_weight(finite.view(np.uint32), shape, kind, [], rough), shape, kind, rough)
    read = decode_weight(b"".join(parts), shape, kind, None).view(np.float32)
    assert np.abs(read).max() <= np.abs(finite).max() * 1.001


def test_classes_are_those_of_the_method() -> None:
    assert (FREE, UNIFIED, PRUNED) == (0, 1, 2)  # as the file numbers them
