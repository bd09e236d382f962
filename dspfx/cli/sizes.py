"""`python -m dspfx sizes`: bytes of each layer in float32, float16, a general compressor, and dspfx's own files."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import zstandard
from tabulate import tabulate
from torch import Tensor, nn

import dspfx
from dspfx.cli import networks, record
from dspfx.cli.benchmark import several
from dspfx.cli.options import block_shape
from dspfx.config import BlockConfig
from dspfx.errors import ConfigError
from dspfx.storage.compressed import shipped_state
from dspfx.storage.report import CompressedReport

DESCRIPTION = """\
How many bytes each layer takes: in float32, in float16, as float32 through zstd, and in the files that
dspfx.write_compressed makes, exact and with values of so many bits:
python -m dspfx sizes runs/demo/pruned.safetensors --against resnet20 --bits 32,5,4"""
LEVEL = 19  # zstd's highest but for those that need much memory to read


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sizes` to the command line."""
    parser = commands.add_parser("sizes", help="bytes of each layer in several kinds of files", description=DESCRIPTION)
    parser.add_argument("network", help=networks.HELP)
    parser.add_argument("--against", metavar="NAME", help="the class of a pruned network's file, a name")
    parser.add_argument("--classes", type=int, help="of named networks (default: 10 if built in, torchvision's 1000)")
    parser.add_argument("--block", metavar="AxB", help="of the weights (default: whatever is smallest, layer by layer)")
    parser.add_argument("--bits", type=several(float), default=[32.0, 4.0], help="(default: 32,4; 32 is exact)")
    record.add_argument(parser)
    parser.set_defaults(run=run, interrupted="nothing was changed")


def run(args: argparse.Namespace) -> None:
    """Prints the table, and writes the record; raises DspfxError."""
    for bits in args.bits:
        if bits != 32 and not 0.5 <= bits <= 8:
            raise ConfigError(f"--bits {bits:g} is no width of a value; give some of 0.5 to 8, or 32.")
    record.check_target(args.json)
    blocks = None if args.block is None else BlockConfig(block_shape(args.block))
    names = [args.network] if args.against is None else [args.network, args.against]
    network = networks.open_networks(names, args.classes)[0]
    with TemporaryDirectory(prefix="dspfx-") as folder:
        reports = {bits: written(network, Path(folder) / f"{bits}.safetensors", blocks, bits) for bits in args.bits}
        rows = layers(network, reports, Path(folder))
    heads = ["tensors", "float32", "float16", "float32, zstd", *(f"dspfx, {b:g} bits" for b in args.bits)]
    if args.json != "-":
        table = [(name, *(f"{value:,}" for value in row)) for name, row in rows.items()]
        dense = rows["file"][0]
        table.append(("to float32", *(f"{dense / value:.2f}x" for value in rows["file"])))
        print(tabulate(table, heads, colalign=("left", *["right"] * (len(heads) - 1)), disable_numparse=True))
    record.write(
        args.json,
        {
            "versions": record.versions(),
            "bytes": {n: dict(zip(heads[1:], row, strict=True)) for n, row in rows.items()},
        },
    )


def written(network: nn.Module, path: Path, blocks: BlockConfig | None, bits: float) -> CompressedReport:
    """The report of a compressed file."""
    return dspfx.write_compressed(network, path, blocks, bits=None if bits == 32 else bits)


def layers(network: nn.Module, reports: dict[float, CompressedReport], folder: Path) -> dict[str, list[int]]:
    """By layer, then for all other tensors, and for whole files on disk: bytes in each kind of file."""
    first = next(iter(reports.values()))
    own: dict[str, list[int]] = {}
    state = {name: value.contiguous() for name, value in unique(network).items()}
    for row in first.rows:
        sizes = [next((r.size for r in found.rows if r.name == row.name), 0) for found in reports.values()]
        if row.name in state:
            own[row.name] = [*plain_sizes([state.pop(row.name)]), *sizes]
    rest = [sum(r.size for r in found.rows if r.name not in own) for found in reports.values()]
    own["everything else"] = [*plain_sizes(list(state.values())), *rest]
    return own | {"file": [*file_sizes(network, folder), *(found.size for found in reports.values())]}


def unique(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that a compressed file holds, each once."""
    seen: dict[int, str] = {}
    return {n: v.detach() for n, v in shipped_state(network).items() if seen.setdefault(id(v), n) == n}


def plain_sizes(tensors: list[Tensor]) -> list[int]:
    """As they are, in half precision, and through zstd."""
    whole = sum(t.numel() * t.element_size() for t in tensors)
    half = sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)
    content = b"".join(t.cpu().numpy().tobytes() for t in tensors)
    return [whole, half, len(zstandard.ZstdCompressor(level=LEVEL).compress(content))]


def file_sizes(network: nn.Module, folder: Path) -> list[int]:
    """The same of whole files."""
    state = {name: value.clone().contiguous() for name, value in unique(network).items()}
    sizes = []
    for kind in ("float32", "float16"):
        path = folder / f"{kind}.safetensors"
        held = {n: v.half() if kind == "float16" and v.is_floating_point() else v for n, v in state.items()}
        safetensors.torch.save_file(held, path)
        sizes.append(path.stat().st_size)
    content = (folder / "float32.safetensors").read_bytes()
    return [*sizes, len(zstandard.ZstdCompressor(level=LEVEL).compress(content))]
