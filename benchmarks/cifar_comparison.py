"""Pruning methods beside each other on the JPEG copy of CIFAR-10: equal data, epochs, learning rates and FLOPs.

    OMP_NUM_THREADS=1 python -m benchmarks.cifar_comparison --data DIR --checkpoints FOLDER --out runs/comparison \
        --write docs/results/cifar10.md

DIR is an ImageFolder with train/ and test/, FOLDER holds resnet20_cifar10.safetensors and resnet56_cifar10.safetensors.
For every network and seed: dense training from the common checkpoint (vgg16_bn_cifar: from scratch); then every method
learns for some epochs, is pruned to every budget from there, and each result is fine-tuned. The validation split picks
epochs; test images are read once per network, at the end. Stopped, the same command goes on from the last finished
epoch; `--networks`, `--seeds`, `--methods` and `--budgets` do a part.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dspfx
from benchmarks import cifar_comparison_page as pages
from benchmarks import group_norm_peer as peer
from benchmarks.latency_accuracy import HalfTrainer
from benchmarks.projection_resnet import build as build_resnet
from dspfx.cli import models
from dspfx.cli.arguments import IMAGENET_MEAN, IMAGENET_STD
from dspfx.cli.checkpoints import claim_folder, load_state, write_text
from dspfx.cli.data import Data, DataConfig, load_data
from dspfx.cli.scoring import evaluate, recalibrate, say
from dspfx.cli.training import Recipe, Stage
from dspfx.deploy.benchmark import describe_setting
from dspfx.deploy.quiet import torch_threads
from dspfx.deploy.runtimes import build as build_runtime
from dspfx.deploy.timing import compare, interleave

NETWORKS = ("resnet20", "resnet56", "vgg16_bn_cifar")
BUDGETS = (0.65, 0.5, 0.35)
AUTHORS_STRENGTH = {"resnet20": 2e-3, "resnet56": 5e-4}  # elsewhere "auto", as they advise
RATIOS = tuple(i / 100 for i in range(5, 95))


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on; a folder is resumed with the same ones only."""

    images: int = 15_000
    dense: int = 3
    scratch: int = 12  # instead, of a network that has no checkpoint
    learn: int = 4
    tune: int = 4
    lr: float = 0.05
    batch_size: int = 128
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Run:
    """One network with one seed."""

    settings: Settings
    name: str
    seed: int
    folder: Path
    data: Data
    trainer: HalfTrainer

    @property
    def example(self) -> torch.Tensor:
        """Eight validation images, plainly strided."""
        return next(self.data.val.in_order(8))[0].contiguous()

    def learn_stage(self, method: str) -> Stage:
        return Stage(f"{method}_learn", ((self.settings.learn, self.settings.lr),), keep="last")

    def tune_stage(self, label: str) -> Stage:
        return Stage(f"{label}_tune", ((self.settings.tune, self.settings.lr),), first_epoch=self.settings.learn)

    def validate(self, model: nn.Module) -> float:
        return evaluate(model, self.data.val, self.settings.batch_size).accuracy

    def settle(self, model: nn.Module) -> None:
        """Batch norms follow what pruning changed."""
        recalibrate(model, self.data.train, self.settings.batch_size)

    def share(self, model: nn.Module) -> float:
        """Multiply-adds of a network of the same family, to those of the dense one."""
        profiles = [dspfx.profile(m, self.example[:1]).flops for m in (model, build(self.name, None))]
        return profiles[0] / profiles[1]


Pruner = Callable[[Run, nn.Module, float], tuple[nn.Module, float]]  # (pruned copy to be tuned, share of FLOPs)


@dataclass(frozen=True)
class Method:
    """How a method trains before it prunes (returning what it learned), and how it prunes.

    Methods that train alike share `stage`, the name of what they learned.
    """

    stage: str
    learn: Callable[[Run, nn.Module, str], nn.Module]
    prune: Pruner


def build(name: str, checkpoints: Path | None) -> nn.Module:
    """The dense network; ResNets have 1x1 convolutions for shortcuts, which Torch-Pruning needs."""
    if name not in models.CIFAR_DEPTHS:
        return models.build(name, 10).to(memory_format=torch.channels_last)
    return build_resnet(checkpoints and checkpoints / f"{name}_cifar10.safetensors", name)


def groups(gates: dspfx.GateConfig | None = None, **options: Any) -> Callable[[Run, nn.Module, str], nn.Module]:
    """Training with a GroupLearner, of our defaults but for what is given."""

    def learn(run: Run, dense: nn.Module, stage: str) -> nn.Module:
        gm = dspfx.prepare(dense, run.example, gates or dspfx.GateConfig()).to(memory_format=torch.channels_last)
        optimizer, plan = run.trainer.optimizer(gm), run.learn_stage(stage)
        strength = AUTHORS_STRENGTH.get(run.name, "auto") if stage == "dsp" else "auto"
        steps = plan.epochs * run.trainer.steps
        with dspfx.GroupLearner(gm, optimizer, steps, strength, seed=run.seed, **options) as learner:
            run.trainer.fit(gm, optimizer, plan, learner)
        return gm

    return learn


def prune_by(importance: str) -> Pruner:
    """`dspfx.prune` of a copy: one learned network serves every budget."""

    def prune(run: Run, learned: nn.Module, budget: float) -> tuple[nn.Module, float]:
        gm = copy.deepcopy(learned)
        return gm, dspfx.prune(gm, dspfx.Budget(flops=budget), importance).flops_left

    return prune


def prune_untaught(is_random: bool) -> Pruner:
    """Groups found at once, after plain training: by clustering, or drawn."""

    def prune(run: Run, trained: nn.Module, budget: float) -> tuple[nn.Module, float]:
        gm = dspfx.prepare(trained, run.example).to(memory_format=torch.channels_last)
        if is_random:
            generator = torch.Generator().manual_seed(run.seed)
            for name, buffer in gm.named_buffers():
                if name.endswith("gate_logits"):
                    buffer.normal_(generator=generator)
        return gm, dspfx.prune(gm, dspfx.Budget(flops=budget)).flops_left

    return prune


def learn_nothing(run: Run, dense: nn.Module, name: str) -> nn.Module:
    """Plain training for as many epochs."""
    model = copy.deepcopy(dense)
    run.trainer.fit(model, run.trainer.optimizer(model), run.learn_stage(name))
    return model


def learn_group_norms(run: Run, dense: nn.Module, name: str) -> nn.Module:
    """Torch-Pruning's sparse learning, with its own strength."""
    model = copy.deepcopy(dense)
    run.trainer.fit(model, peer.sparsity_optimizer(model, run.example, peer.REGULARISER), run.learn_stage(name))
    return model


def prune_group_norms(run: Run, learned: nn.Module, budget: float) -> tuple[nn.Module, float]:
    """Of a global and a local ranking the one that is better on validation images after an epoch, which is undone."""
    trials = []
    for is_global in (False, True):
        ratio = _ratio(run, budget, lambda r, g=is_global: peer.pruned(learned, run.example, peer.Cut(1, g, r)))  # type: ignore[misc]
        small = peer.pruned(learned, run.example, peer.Cut(1, is_global, ratio))
        run.settle(small)
        label = f"tp_{budget:.2f}_{'global' if is_global else 'local'}_trial"
        run.trainer.fit(small, run.trainer.optimizer(small), Stage(label, ((1, run.settings.lr),)))
        trials.append((run.validate(small), is_global, ratio))
    _, is_global, ratio = max(trials)
    say(f"Torch-Pruning, {budget:.0%}: {trials}")
    small = peer.pruned(learned, run.example, peer.Cut(1, is_global, ratio))
    return small, run.share(small)


def prune_filters(run: Run, learned: nn.Module, budget: float) -> tuple[nn.Module, float]:
    """The same share of every layer's filters, those of the smallest L1 norm."""
    ratio = _ratio(run, budget, lambda r: peer.pruned_by_l1(learned, run.example, r))
    small = peer.pruned_by_l1(learned, run.example, ratio)
    return small, run.share(small)


def _ratio(run: Run, budget: float, pruned: Callable[[float], nn.Module]) -> float:
    """The smallest ratio of pruning whose network is within half a point of the budget, or below."""
    low, high = 0, len(RATIOS) - 1
    while low < high:
        middle = (low + high) // 2
        if run.share(pruned(RATIOS[middle])) <= budget + 0.005:
            high = middle
        else:
            low = middle + 1
    return RATIOS[low]


AUTHORS = dspfx.GateConfig(noise="authors")
METHODS = {
    "dspfx": Method("dspfx", groups(), prune_by("auto")),
    "tp": Method("tp", learn_group_norms, prune_group_norms),
    "l1": Method("plain", learn_nothing, prune_filters),
    "dsp": Method("dsp", groups(AUTHORS, mode="exact", start="zeros"), prune_by("l2")),
    # What makes groups good: one thing changed at a time.
    "l2": Method("dspfx", groups(), prune_by("l2")),
    "zeros": Method("zeros", groups(start="zeros"), prune_by("auto")),
    "exact": Method("exact", groups(mode="exact"), prune_by("auto")),
    "noise": Method("noise", groups(AUTHORS), prune_by("auto")),
    "two": Method("two", groups(dspfx.GateConfig(groups=2)), prune_by("auto")),
    "eight": Method("eight", groups(dspfx.GateConfig(groups=8)), prune_by("auto")),
    "clusters": Method("plain", learn_nothing, prune_untaught(is_random=False)),
    "random": Method("plain", learn_nothing, prune_untaught(is_random=True)),
}
GROUPS = {"two": 2, "eight": 8}  # elsewhere four
COMPARED = ("dspfx", "tp", "l1", "dsp")


def train_dense(run: Run, checkpoints: Path) -> nn.Module:
    """The common start of all methods."""
    torch.manual_seed(run.seed)
    has_checkpoint = run.name in models.CIFAR_DEPTHS
    model = build(run.name, checkpoints if has_checkpoint else None)
    epochs = run.settings.dense if has_checkpoint else run.settings.scratch
    run.trainer.fit(model, run.trainer.optimizer(model), Stage("dense", ((epochs, run.settings.lr),)))
    return model


def finish(run: Run, model: nn.Module, label: str, share: float, started: list[str]) -> None:
    """Writes what was reached, test images read here only, and the hours of training that led there.

    An epoch counts with its stage's median: the run may have stood still meanwhile.
    """
    test = evaluate(model, run.data.test(), run.settings.batch_size).accuracy
    stages = [load_state(run.folder / f"{stage}.pt") or {} for stage in [*started, f"{label}_tune"]]
    curves = [[epoch["seconds"] for epoch in state["progress"]["curve"]] for state in stages if state]
    seconds = sum(len(curve) * statistics.median(curve) for curve in curves if curve)
    found = {"share": share, "validation": run.validate(model), "test": test, "hours": seconds / 3600}
    write_text(run.folder / f"{label}.json", json.dumps(found))
    say(f"{run.name}, seed {run.seed}, {label}: {share:.1%} of FLOPs, validation {found['validation']:.2%}")


def compress(run: Run, dense: nn.Module, name: str, budgets: list[float]) -> None:
    """One method to every budget."""
    method = METHODS[name]
    todo = [budget for budget in budgets if not (run.folder / f"{name}_{budget:.2f}.json").exists()]
    if not todo:
        return
    learned = method.learn(run, dense, method.stage)
    for budget in todo:
        label = f"{name}_{budget:.2f}"
        model, share = method.prune(run, learned, budget)
        run.settle(model)
        run.trainer.fit(model, run.trainer.optimizer(model), run.tune_stage(label))
        finish(run, model, label, share, [f"{method.stage}_learn"])


def train_control(run: Run, dense: nn.Module) -> None:
    """The dense network, trained on for as many epochs as the methods."""
    if (run.folder / "control.json").exists():
        return
    model, settings = copy.deepcopy(dense), run.settings
    cycles = ((settings.learn, settings.lr), (settings.tune, settings.lr))
    run.trainer.fit(model, run.trainer.optimizer(model), Stage("control_tune", cycles))
    finish(run, model, "control", 1.0, [])


def finished(run: Run, label: str) -> nn.Module:
    """The network of a label, as it was tuned; weights do not matter for time."""
    name, _, budget = label.rpartition("_")
    dense = build(run.name, None)
    if not name:
        return dense.eval()
    state = load_state(run.folder / f"{label}_tune.pt") or {}
    if name not in ("tp", "l1"):
        gm = dspfx.prepare(dense, run.example, dspfx.GateConfig(groups=GROUPS.get(name, 4)))
        gm.load_state_dict(state["model"])
        return gm
    dense.load_state_dict((load_state(run.folder / f"{METHODS[name].stage}_learn.pt") or {})["model"])
    return METHODS[name].prune(run, dense, float(budget))[0]


def measure_times(run: Run, labels: list[str]) -> dict[str, Any]:
    """Times of all results of a run to that of the dense network in ONNX Runtime, batch 1, one thread.

    Each in ONNX Runtime, lowered for it where it is ours, and as `dspfx.lower` makes it for PyTorch.
    """
    image = run.example[:1]
    calls: dict[str, Callable[[], Any]] = {}
    for label in ["control", *labels]:
        network = finished(run, label).to(memory_format=torch.contiguous_format)
        is_ours = not label.startswith(("tp", "l1", "control"))
        stock = dspfx.lower(network, image, runtime="onnxruntime") if is_ours else network
        native = dspfx.lower(network, image, runtime="eager")
        calls[f"{label} onnxruntime"] = partial(build_runtime("onnxruntime", stock.eval(), image), image)
        calls[f"{label} native"] = partial(native, image)
    times: dict[str, Any] = {}
    for name, call in calls.items():  # two by themselves: others between them would empty the caches of both
        with torch_threads(1), torch.inference_mode():
            r = compare(interleave({"dense": calls["control onnxruntime"], name: call}, 60))[name]
        times[name] = {"ratio": r.ratio, "ms": r.median_ms, "spread": r.spread}
    return times | {"setting": describe_setting("onnxruntime", image.device, 1)}


def open_run(options: argparse.Namespace, settings: Settings, name: str, seed: int) -> Run:
    """The folder of a network and a seed, new or resumed."""
    folder = claim_folder(options.out / name / str(seed), asdict(settings))
    config = DataConfig(str(options.data), 32, IMAGENET_MEAN, IMAGENET_STD, True, settings.images, 0.1, seed)
    data = load_data(config, 32, torch.device("cpu"), workers=0)
    recipe = Recipe(settings.batch_size, settings.weight_decay, 0.0, seed)
    return Run(settings, name, seed, folder, data, HalfTrainer(recipe, data.train, data.val, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=COMPARED)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument(
        "--time", action="store_true", help="measure the latency of what is finished; best on an idle machine"
    )
    parser.add_argument("--write", type=Path, help="write the result page to this file, and its plots beside it")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    for seed in options.seeds:
        for name in options.networks:
            run = open_run(options, settings, name, seed)
            if options.time:
                found = sorted(run.folder.glob("*.json"))
                labels = [p.stem for p in found if p.stem.rpartition("_")[0] in options.methods]
                write_text(run.folder.parent / "times.json", json.dumps(measure_times(run, labels)))
                continue
            dense = train_dense(run, options.checkpoints)
            for method in options.methods:
                compress(run, dense, method, list(options.budgets))
            train_control(run, dense)
            pages.write(options.out, options.write)
    pages.write(options.out, options.write)


if __name__ == "__main__":
    main()
