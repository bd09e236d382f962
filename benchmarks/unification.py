"""Weight unification on the JPEG copy of CIFAR-10: bytes on disk against accuracy, alone, with DSP, beside k-means.

    OMP_NUM_THREADS=1 python -m benchmarks.unification --data DIR --checkpoints FOLDER --out runs/comparison \
        --write docs/results/unification.md

Runs in the folders of benchmarks.cifar_comparison, whose dense networks it starts from. *Alone*: `learn` epochs of
ADMM, projection, `tune` epochs with blocks kept alike; the control is the dense network trained as long. *With DSP*:
the network whose groups were learned, pruned to 40% of the FLOPs, then the same; its control trains as long as both.
Arms of so many bits have few values from the projection on, of that entropy, which train.
The validation split picks the bits of a file; test images are read for what was picked. Stopped, it goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import dspfx
from benchmarks import cifar_comparison as comparison
from benchmarks.cifar_comparison import Run, Settings
from dspfx.cli.checkpoints import write_text
from dspfx.cli.scoring import evaluate, say
from dspfx.cli.training import Stage
from dspfx.passes.plan_unify import block_weights

COMMAND = """\
    OMP_NUM_THREADS=1 python -m benchmarks.unification --data DIR --checkpoints FOLDER --out runs/comparison \\
        --write docs/results/unification.md"""
FLOPS = 0.40
BITS = (6, 5, 4, 3.5, 3, 2.5)
QPS = (-38, -35, -32, -30, -28, -26, -24, -22, -20)
WORTH = 0.002  # of validation accuracy, that fewer bits may cost
ALL = dspfx.BlockConfig((4, 4), 0.0, 1.0)
MIXED = {"prune": 0.3, "unify": 0.5}
CONFIGS: dict[str, dspfx.BlockConfig] = {
    "4x4": dspfx.BlockConfig((4, 4), **MIXED),
    "8x8": dspfx.BlockConfig((8, 8), **MIXED),
    "1x4": dspfx.BlockConfig((1, 4), **MIXED),
    "16x1": dspfx.BlockConfig((16, 1), **MIXED),
    "4x4 gemm": dspfx.BlockConfig((4, 4), **MIXED, layout="gemm"),
    "4x4 network": dspfx.BlockConfig((4, 4), **MIXED, scope="network"),
    "4x4 unified": ALL,
    "4x4 half": dspfx.BlockConfig((4, 4), 0.5, 0.5),
    "2x2 gentle": dspfx.BlockConfig((2, 2), 0.2, 0.5),
    "no blocks": dspfx.BlockConfig((1, 1), 0.0, 0.0),  # what a palette, or DSP, does alone
    "2x2 light": dspfx.BlockConfig((2, 2), 0.1, 0.4),
    "4x4 gentle": dspfx.BlockConfig((4, 4), 0.1, 0.4),
}


@dataclass(frozen=True)
class Arm:
    """What is trained: `blocks` of CONFIGS, with few values of so many `bits` or any, or a k-means `palette` of 2^n
    values a layer; neither: a control, which `coder` may write.
    """

    with_dsp: bool = False
    blocks: str | None = None
    palette: int | None = None
    bits: float | None = None
    coder: str = "ours"

    @property
    def label(self) -> str:
        values = f"palette{self.palette}" if self.palette else f"{self.bits:g} bits" if self.bits else ""
        coder = self.coder if self.coder != "ours" else ""
        what = " ".join(filter(None, (self.blocks, values, coder))) or "control"
        return f"unify{'_dsp' if self.with_dsp else ''}_{what.replace(' ', '_')}"


class Palette:
    """k-means of each layer's weights, kept: after every optimizer step, those of a cluster become their mean."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, bits: int) -> None:
        self.layers = [
            (weight, _clusters(weight.detach().flatten(), 1 << bits)) for weight in block_weights(model).values()
        ]
        optimizer.register_step_post_hook(lambda *_: self.share())
        self.share()

    @torch.no_grad()
    def share(self) -> None:
        """Every weight becomes its cluster's mean."""
        for weight, cluster in self.layers:
            count = cluster.bincount().clamp(min=1)
            mean = torch.zeros(len(count)).index_add_(0, cluster, weight.flatten()) / count
            weight.copy_(mean[cluster].view_as(weight))


def _clusters(values: Tensor, number: int) -> Tensor:
    """Lloyd's algorithm in one dimension, from quantiles; the cluster of every value."""
    means = values.quantile(torch.linspace(0, 1, number))
    for _ in range(50):
        cluster = torch.bucketize(values, (means[1:] + means[:-1]) / 2)
        count = cluster.bincount(minlength=number)
        sums = torch.zeros(number).index_add_(0, cluster, values)
        means = torch.where(count > 0, sums / count.clamp(min=1), means).sort().values
    return torch.bucketize(values, (means[1:] + means[:-1]) / 2)


def start(run: Run, dense: nn.Module, with_dsp: bool) -> nn.Module:
    """The dense network, or the one whose groups were learned, pruned."""
    if not with_dsp:
        return copy.deepcopy(dense)
    gm = comparison.METHODS["dspfx"].learn(run, dense, "dspfx")
    dspfx.prune(gm, dspfx.Budget(flops=FLOPS))
    run.settle(gm)
    return gm


def train(run: Run, dense: nn.Module, arm: Arm) -> nn.Module:
    """The arm's network, in its last state."""
    model = start(run, dense, arm.with_dsp) if arm.blocks else copy.deepcopy(dense)
    optimizer, epochs, lr = run.trainer.optimizer(model), run.settings, run.settings.lr
    if arm.blocks is None:
        cycles = [(epochs.learn, lr)] + [(epochs.learn, lr)] * arm.with_dsp
        run.trainer.fit(model, optimizer, Stage(f"{arm.label}_first", tuple(cycles), keep="last"))
        optimizer, last = (
            run.trainer.optimizer(model),
            Stage(f"{arm.label}_tune", ((epochs.tune, lr),), sum(e for e, _ in cycles)),
        )
        if arm.palette:
            Palette(model, optimizer, arm.palette)
        run.trainer.fit(model, optimizer, last)
        return model
    first = Stage(f"{arm.label}_admm", ((epochs.learn, lr),), keep="last", first_epoch=epochs.learn * arm.with_dsp)
    steps = first.epochs * run.trainer.steps
    with dspfx.Unifier(model, optimizer, CONFIGS[arm.blocks], steps) as unifier:
        run.trainer.fit(model, optimizer, first, unifier)
        say(str(unifier.project(arm.bits)))
    run.settle(model)
    optimizer = run.trainer.optimizer(model)
    with dspfx.Unifier(model, optimizer, CONFIGS[arm.blocks], steps) as kept:
        kept.load_state_dict(unifier.state_dict())
        last = Stage(f"{arm.label}_tune", ((epochs.tune, lr),), first_epoch=first.first_epoch + epochs.learn)
        run.trainer.fit(model, optimizer, last, kept)
    return model


def nncodec_files(run: Run, model: nn.Module, arm: Arm) -> dict[str, Any]:
    """The same for NNCodec (ISO/IEC 15938-17, `pip install nncodec`): its quantisation parameter in place of bits."""
    from nncodec.nn import decode, encode

    def read(path: Path) -> nn.Module:
        back = comparison.build(run.name, None)
        found = {key: torch.from_numpy(x) for key, x in decode(bytearray(path.read_bytes())).items()}
        back.load_state_dict(found, strict=False)  # counters of batches are not written
        return back.eval()

    values = {key: t.detach().numpy() for key, t in model.state_dict().items() if t.is_floating_point()}
    rows: list[dict[str, Any]] = []
    paths = {f"QP {qp}": run.folder / f"{arm.label}_{-qp}.nnc" for qp in QPS}
    for qp, (name, path) in zip(QPS, paths.items(), strict=True):
        path.write_bytes(encode(values, {"qp": qp, "verbose": False, "results": str(run.folder)}))
        rows.append({"bits": name, "bytes": path.stat().st_size, "validation": run.validate(read(path))})
        print(arm.label, rows[-1], flush=True)
    chosen = _smallest(rows)
    chosen["test"] = evaluate(read(paths[chosen["bits"]]), run.data.test(), run.settings.batch_size).accuracy
    parameters = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {"arm": asdict(arm), "files": rows, "chosen": chosen, "fp32": parameters}


def _smallest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The smallest file that is as good as the best, but for WORTH."""
    best = max(row["validation"] for row in rows)
    return min((row for row in rows if row["validation"] >= best - WORTH), key=lambda row: row["bytes"])


def files(run: Run, model: nn.Module, arm: Arm) -> dict[str, Any]:
    """The network's compressed file at every number of bits, read back: bytes and accuracy; the choice is tested."""
    rows: list[dict[str, Any]] = []
    options = (None,) if arm.palette or arm.bits else (None, *BITS)  # few values are found, and written exactly
    for bits in options:
        path = run.folder / f"{arm.label}_{bits or 'exact'}.safetensors"
        report = dspfx.write_compressed(model, path, CONFIGS.get(arm.blocks or ""), bits=bits)
        back = dspfx.read_compressed(path, comparison.build(run.name, None)).eval()
        rows.append({"bits": bits, "bytes": path.stat().st_size, "validation": run.validate(back)})
        print(arm.label, rows[-1], f"{report.ratio:.2f}", flush=True)
    chosen = _smallest(rows)
    path = run.folder / f"{arm.label}_{chosen['bits'] or 'exact'}.safetensors"
    back = dspfx.read_compressed(path, comparison.build(run.name, None)).eval()
    chosen["test"] = evaluate(back, run.data.test(), run.settings.batch_size).accuracy
    parameters = sum(t.numel() * t.element_size() for t in back.state_dict().values())
    return {"arm": asdict(arm), "files": rows, "chosen": chosen, "fp32": parameters}


def page(results: list[dict[str, Any]], settings: str) -> str:
    """The table in Markdown."""
    controls = {(r["network"], r["seed"], r["arm"]["with_dsp"]): r["chosen"]["test"] for r in results if _is_control(r)}
    rows = []
    for r in sorted(results, key=lambda r: (r["network"], r["arm"]["with_dsp"], r["chosen"]["bytes"])):
        arm, chosen = r["arm"], r["chosen"]
        config = CONFIGS.get(arm["blocks"] or "")
        control = controls.get((r["network"], r["seed"], arm["with_dsp"]))
        palette = f"k-means palette of {1 << arm['palette']}" if arm["palette"] else ""
        peer = "dense, NNCodec" if arm.get("coder") == "nncodec" else ""
        what = ", ".join(filter(None, (arm["blocks"], palette, peer))) or "dense"
        rows.append(
            (
                r["network"],
                ("" if not arm["with_dsp"] else f"DSP, {FLOPS:.0%} of FLOPs" if config else "as many epochs as DSP"),
                what,
                f"{config.prune:.0%} / {config.unify:.0%}" if config else "",
                chosen["bits"] or (f"{arm['bits']:g}, trained" if arm.get("bits") else 32),
                chosen["bytes"],
                f"{r['fp32'] / chosen['bytes']:.1f}x",
                f"{chosen['test']:.2%}",
                "" if control is None or _is_control(r) else f"{100 * (control - chosen['test']):.2f}",
            )
        )
    coded = [
        (
            r["network"],
            r["arm"].get("coder", "ours"),
            _setting(file["bits"]),
            file["bytes"],
            f"{file['validation']:.2%}",
        )
        for r in results
        if not (r["arm"]["blocks"] or r["arm"]["palette"] or r["arm"]["with_dsp"])
        for file in sorted(r["files"], key=lambda file: file["bytes"])
    ]
    heads = [
        "network",
        "with",
        "blocks",
        "pruned / unified",
        "bits",
        "bytes on disk",
        "to fp32",
        "test accuracy",
        "loss",
    ]
    return "\n\n".join(
        [
            "# Weight unification: bytes against accuracy",
            __doc__.partition("\n\n    ")[0].strip().partition("\n")[0],
            settings,
            "*bits*: of shared and free values in the file, the fewest that cost at most "
            f"{100 * WORTH:.1f} points on validation images; 32: exact; trained: few values from the projection on, "
            "written exactly. *to fp32*: the state_dict's bytes to the file's. *loss*: points to the dense network "
            "trained for as many epochs, in the file of its own row. A *palette* is k-means of each layer's weights "
            "after `learn` epochs, its values trained for `tune` epochs (deep compression, as in coremltools' "
            "palettisation), in the same file format.",
            tabulate(rows, heads, "github", disable_numparse=True),
            "## Without training for it",
            "The dense network (trained as long), written by `write_compressed(bits=)` and by NNCodec (ISO/IEC "
            "15938-17, with dependent quantisation and DeepCABAC); accuracy on validation images:",
            tabulate(coded, ["network", "written by", "setting", "bytes", "validation"], "github"),
        ]
    )


def _setting(bits: Any) -> str:
    return "exact" if bits is None else bits if isinstance(bits, str) else f"{bits:g} bits"


def _is_control(result: dict[str, Any]) -> bool:
    arm = result["arm"]
    return arm["blocks"] is None and arm["palette"] is None and arm.get("coder", "ours") == "ours"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", choices=comparison.NETWORKS, default="resnet20")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--arms", nargs="+", help="labels, such as unify_4x4 (default: all)")
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    run = comparison.open_run(options, settings, options.network, options.seed)
    dense = comparison.train_dense(run, options.checkpoints)
    arms = [Arm(dsp) for dsp in (False, True)] + [Arm(dsp, blocks) for dsp in (False, True) for blocks in CONFIGS]
    arms += [Arm(palette=bits) for bits in (4, 3, 2)] + [Arm(coder="nncodec")]
    arms += [Arm(dsp, blocks, bits=bits) for dsp in (False, True) for blocks in CONFIGS for bits in (3, 2.5, 2)]
    for arm in arms:
        path = run.folder.parent / f"{arm.label}.json"
        if path.exists() or (options.arms and arm.label not in options.arms):
            continue
        # A peer codes the control, trained on under its own label.
        is_ours = arm.coder == "ours"
        model = train(run, dense, arm if is_ours else Arm())
        found = (files if is_ours else nncodec_files)(run, model, arm)
        write_text(path, json.dumps(found | {"network": run.name, "seed": run.seed}))
    results = [json.loads(file.read_text()) for file in sorted(options.out.glob("*/*/unify*.json"))]
    names = {r["network"] for r in results}
    text = page(results, comparison.pages.settings_of(options.out, names))
    print(text)
    if options.write and results:
        options.write.write_text(f"{text}\n\nMade by\n\n{COMMAND}\n")


if __name__ == "__main__":
    main()
