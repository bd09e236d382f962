"""Compressed files of a network whose weights were unified: bytes on disk, and the time to read them on one core.

    OMP_NUM_THREADS=1 python benchmarks/compressed_decode.py --model resnet50
    OMP_NUM_THREADS=1 python benchmarks/compressed_decode.py --model resnet20 --coders    # needs constriction, too

Weights and norms are those of --state, or drawn at random; of each layer's blocks some are pruned and some unified, as
Unifier would leave them. With --coders the symbols of each layer are also written by constriction's asymmetric numeral
systems, with a frequency table of one byte a symbol, and by zstd, alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import nn

import dspfx
from dspfx.cli.models import build
from dspfx.config import BlockConfig
from dspfx.method.blocks import FREE, UNIFIED, Tiling, counts, distortions, magnitudes, projected, select
from dspfx.storage.streams import compress, decompress, pack, pack_trits

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fp16": {"values": "fp16"},
    "8 bits": {"bits": 8},
    "6 bits": {"bits": 6},
    "5 bits": {"bits": 5},
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
    "5 bits, rest fp16": {"bits": 5, "rest": "fp16"},
}


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of convolutions and linear layers."""
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def tiling_of(weight: torch.Tensor, block: tuple[int, int]) -> Tiling:
    return Tiling(tuple(weight.shape), (min(block[0], weight.shape[0]), min(block[1], weight.shape[1])))


@torch.no_grad()
def unify(model: nn.Module, block: tuple[int, int], prune: float, share: float) -> None:
    """Projects every weight onto blocks, in place."""
    for weight in weights_of(model):
        tiling = tiling_of(weight, block)
        blocks = tiling.split(weight)
        alive = blocks != 0
        pruned, unified = counts(tiling.count, prune, share)
        classes = select(*distortions(blocks, alive), unified, pruned)
        weight.copy_(tiling.join(projected(blocks, alive, classes)))


@torch.no_grad()
def fill_norms(model: nn.Module) -> None:
    """Draws what norms have learned, which in a fresh network are zeros and ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for value in (module.bias, module.running_mean):
                value.normal_(0, 0.2)
            for value in (module.weight, module.running_var):
                value.uniform_(0.2, 1.5)


def median_ms(work: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    taken = []
    for _ in range(rounds):
        begin = clock()
        work()
        taken.append(clock() - begin)
    return 1e3 * statistics.median(taken)


def table_of_settings(model: nn.Module, fresh: nn.Module, rounds: int, config: BlockConfig) -> str:
    """Bytes on disk and the time to read them, for each setting."""
    rows = []
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        for name, options in SETTINGS.items():
            path = Path(folder) / "model.safetensors"
            begin = time.perf_counter()
            report = dspfx.write_compressed(model, path, config, **options)
            wrote = time.perf_counter() - begin
            reads = [
                median_ms(lambda path=path: dspfx.read_compressed(path, fresh), rounds, clock)  # type: ignore[misc]
                for clock in (time.perf_counter, time.process_time)
            ]
            bits = f"{8 * report.size / parameters:.3f}"
            times = (f"{wrote:.1f}", *(f"{read:.0f}" for read in reads))
            rows.append([name, f"{report.size:,}", f"{report.ratio:.2f}", bits, *times])
    header = ["values", "bytes on disk", "ratio", "bits a parameter", "written in s", "read in ms", "of these CPU"]
    return tabulate(rows, header, tablefmt="github", colalign=("left", *["right"] * 6), disable_numparse=True)


def symbols_of(model: nn.Module, block: tuple[int, int], bits: int) -> dict[str, list[np.ndarray]]:
    """Kind -> what each layer stores: classes, levels of the shared magnitudes, levels of the free weights."""
    found: dict[str, list[np.ndarray]] = {"classes": [], "magnitudes": [], "free weights": []}
    for weight in weights_of(model):
        blocks = tiling_of(weight, block).split(weight.detach())
        alive = blocks != 0
        cost, zero = distortions(blocks, alive)
        classes = torch.where(zero == 0, 2, torch.where(cost == 0, UNIFIED, FREE)).numpy().astype(np.uint8)
        shared = magnitudes(blocks, alive).flatten()[classes == UNIFIED].numpy()
        free = blocks[classes == FREE].flatten().numpy()
        found["classes"].append(classes)
        for name, values, low, high in (
            ("magnitudes", shared, shared.min(), shared.max()),
            ("free weights", free, -4 * free.std(), 4 * free.std()),
        ):
            level = (values - low) / max(float(high - low), 1e-12) * (2**bits - 1)
            found[name].append(level.round().clip(0, 2**bits - 1).astype(np.uint8))
    return found


def table_of_coders(symbols: dict[str, list[np.ndarray]], rounds: int) -> str:
    """Bytes and decoding time of the same symbols by constriction and by zstd, and their entropy."""
    import constriction  # type: ignore[import-untyped]

    rows = []
    for name, layers in symbols.items():
        entropy, ans, models = 0.0, [], []
        for layer in layers:
            share = np.bincount(layer) / len(layer)
            entropy -= len(layer) * (share[share > 0] * np.log2(share[share > 0])).sum() / 8
            table = np.maximum(np.bincount(layer) * 255 // np.bincount(layer).max(), 1).astype(np.float32)
            models.append(constriction.stream.model.Categorical(table, perfect=False))
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(layer.astype(np.int32), models[-1])
            ans.append(coder.get_compressed())
        table_bytes = sum(int(layer.max()) + 1 for layer in layers)
        frames = [_frame(name, layer) for layer in layers]
        rows.append(
            [
                name,
                f"{sum(map(len, layers)):,}",
                f"{entropy:,.0f}",
                f"{sum(a.nbytes for a in ans) + table_bytes:,}",
                f"{sum(map(len, frames)):,}",
                f"{median_ms(lambda ans=ans, models=models, layers=layers: _decode(ans, models, layers), rounds):.1f}",  # type: ignore[misc]
                f"{median_ms(lambda frames=frames: [decompress(f, 1 << 30) for f in frames], rounds):.1f}",  # type: ignore[misc]
            ]
        )
    header = ["symbols", "number", "entropy in bytes", "constriction", "zstd", "constriction ms", "zstd ms"]
    return tabulate(rows, header, tablefmt="github", colalign=("left", *["right"] * 6), disable_numparse=True)


def _frame(name: str, layer: np.ndarray) -> bytes:
    """The symbols as the file has them: five classes a byte, indices packed where that is smaller."""
    if name == "classes":
        return compress([pack_trits(layer)])
    packings = [n for n in (1, 2, 4) if layer.max() < 2 ** (8 // n)]
    return min((compress([pack(layer, n)]) for n in packings), key=len)


def _decode(ans: list[Any], models: list[Any], layers: list[np.ndarray]) -> None:
    import constriction

    for words, model, layer in zip(ans, models, layers, strict=True):
        constriction.stream.stack.AnsCoder(words).decode(model, len(layer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a name that python -m dspfx compress --model takes")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--state", type=Path, help="a safetensors file of its state_dict")
    parser.add_argument("--block", type=int, nargs=2, default=(4, 4))
    parser.add_argument("--prune", type=float, default=0.3)
    parser.add_argument("--unify", type=float, default=0.5)
    parser.add_argument("--bits", type=int, default=5, help="of the symbols of --coders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--coders", action="store_true", help="compare constriction with zstd instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, fresh = (build(options.model, options.classes) for _ in range(2))
    fill_norms(model)
    if options.state:
        model.load_state_dict(load_file(options.state))
    block = (options.block[0], options.block[1])
    unify(model, block, options.prune, options.unify)
    if options.coders:
        print(table_of_coders(symbols_of(model, block, options.bits), options.rounds))
        return
    print(table_of_settings(model, fresh, options.rounds, BlockConfig(block)))


if __name__ == "__main__":
    main()
