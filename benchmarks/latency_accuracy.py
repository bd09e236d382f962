"""Accuracy at equal measured latency: ResNet20 on the JPEG copy of CIFAR-10, dspfx beside Torch-Pruning.

    OMP_NUM_THREADS=1 python -m benchmarks.latency_accuracy --data DIR --checkpoint resnet20_cifar10.safetensors \
        --out runs/latency_accuracy --write docs/results/latency_accuracy.md

DIR is an ImageFolder with train/ and test/. Both arms start from one dense network, see the same images in the same
order with the same learning rates, and are pruned to the same latency in ONNX Runtime at batch 1 on one thread. The
validation split, held out of train, picks epochs; test images are read once, at the end. Stopped, the same command
goes on from the last finished epoch. `--arms` runs some of the parts.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dspfx
from benchmarks import group_norm_peer as peer
from benchmarks.latency_accuracy_page import page
from benchmarks.projection_resnet import build
from dspfx.cli.arguments import IMAGENET_MEAN, IMAGENET_STD
from dspfx.cli.checkpoints import claim_folder, load_state, read_json, save_state, write_text
from dspfx.cli.data import Data, DataConfig, load_data
from dspfx.cli.scoring import evaluate, recalibrate, say
from dspfx.cli.training import Progress, Recipe, Stage, Trainer

ARMS = ("dense", "peer", "ours", "control")
LAST_STAGES = ("peer_tune", "ours_tune", "control")


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on; a folder is resumed with the same ones only."""

    dense: int = 4
    learn: int = 5
    tune: int = 10
    lr: float = 0.05
    batch_size: int = 128
    weight_decay: float = 5e-4
    target: float = 0.5
    seed: int = 0
    groups: int = 1  # of our arm: ONNX Runtime gains from whole channels in layers of this size
    strength: float = 2.0  # of our arm's regulariser, to the default's, which is meant for more epochs


class HalfTrainer(Trainer):
    """Trains with convolutions in bfloat16 on a CPU too, for every arm alike; validates in float32."""

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = model(images)
        return self._cross_entropy(logits, labels), logits


@dataclass(frozen=True)
class Run:
    """Everything the arms share."""

    settings: Settings
    out: Path
    data: Data
    trainer: HalfTrainer

    @property
    def example(self) -> Tensor:
        """Eight validation images, plainly strided."""
        return next(self.data.val.in_order(8))[0].contiguous()

    def learn_stage(self, name: str) -> Stage:
        return Stage(name, ((self.settings.learn, self.settings.lr),), keep="last")

    def tune_stage(self, name: str) -> Stage:
        return Stage(name, ((self.settings.tune, self.settings.lr),), first_epoch=self.settings.learn)

    def validate(self, model: nn.Module) -> float:
        return evaluate(model, self.data.val, self.settings.batch_size).accuracy

    def settle(self, model: nn.Module) -> None:
        """Batch norms follow what pruning changed."""
        recalibrate(model, self.data.train, self.settings.batch_size)


def train_dense(run: Run, checkpoint: Path) -> nn.Module:
    """The common start: the checkpoint, trained on these images."""
    model = build(checkpoint)
    stage = Stage("dense", ((run.settings.dense, run.settings.lr),))
    run.trainer.fit(model, run.trainer.optimizer(model), stage)
    return model


def peer_strengths(run: Run) -> dict[str, float]:
    """Torch-Pruning's own strength, and one that shrinks the weights as far in this run's fewer, larger steps."""
    ours = sum(run.learn_stage("").lr(i / run.trainer.steps) for i in range(run.settings.learn * run.trainer.steps))
    return {"peer_learn": peer.REGULARISER, "peer_learn_strong": peer.REGULARISER * peer.AUTHORS_LR_STEPS / ours}


def train_peer(run: Run, dense: nn.Module) -> nn.Module:
    """Torch-Pruning: sparsity learning (two strengths), the best network of the latency asked for, fine-tuning."""
    learned = {}
    for name, strength in peer_strengths(run).items():
        model = copy.deepcopy(dense)
        run.trainer.fit(model, peer.sparsity_optimizer(model, run.example, strength), run.learn_stage(name))
        learned[name] = model
    path = run.out / "peer.json"
    if not path.exists():
        write_text(path, json.dumps(choose_peer(run, dense, learned), indent=1))
    choice = read_json(path)
    model = peer.pruned(learned[choice["learned"]], run.example, peer.Cut(**choice["cut"]))
    run.settle(model)
    run.trainer.fit(model, run.trainer.optimizer(model), run.tune_stage("peer_tune"))
    return model


def choose_peer(run: Run, dense: nn.Module, learned: dict[str, nn.Module]) -> dict[str, Any]:
    """Of the finalists of both strengths the one that is best on validation images after one epoch, which is undone."""
    options = []
    for name, model in learned.items():
        log = run.out / f"{name}_timed.json"
        for found in peer.finalists(dense, model, run.example, run.settings.target, log):
            small = peer.pruned(model, run.example, found.cut)
            run.settle(small)
            trial = Stage(f"trial_{name}_{found.cut.label}", ((1, run.settings.lr),))
            run.trainer.fit(small, run.trainer.optimizer(small), trial)
            options.append({"learned": name, **asdict(found), "validation": run.validate(small)})
            say(f"{name}: {found}, validation {options[-1]['validation']:.2%} after one epoch")
    if not options:
        raise SystemExit(f"No structure of Torch-Pruning reaches {run.settings.target} of the dense latency here.")
    return {**max(options, key=lambda option: option["validation"]), "options": options}


def prune_ours(run: Run, gm: nn.Module, budget: dspfx.Budget) -> str:
    """Prunes `gm`, or repeats what an earlier start decided; returns the plan's table."""
    path = run.trainer.folder / "ours_pruned.pt"
    state = load_state(path)
    if state is None:
        runtime: dict[str, Any] = {"runtime": "onnxruntime"} if getattr(budget, "latency", None) else {}
        plan = dspfx.prune(gm, budget, example_inputs=run.example[:1], **runtime)
        run.settle(gm)
        state = {"model": gm.state_dict(), "plan": str(plan)}
        say(f"ours: validation {run.validate(gm):.2%} before fine-tuning")
        save_state(path, state)
    gm.load_state_dict(state["model"])
    return state["plan"]


def train_ours(run: Run, dense: nn.Module, budget: dspfx.Budget) -> nn.Module:
    """dspfx: group learning, pruning to the latency, fine-tuning; lowered for ONNX Runtime."""
    torch.manual_seed(run.settings.seed)
    gates = dspfx.GateConfig(groups=run.settings.groups)
    gm = dspfx.prepare(dense, run.example, gates).to(memory_format=torch.channels_last)
    optimizer, steps = run.trainer.optimizer(gm), run.settings.learn * run.trainer.steps
    strength = run.settings.strength * 540 / sum(p.numel() for p in gm.parameters())
    with dspfx.GroupLearner(gm, optimizer, steps, strength=strength, seed=run.settings.seed) as learner:
        run.trainer.fit(gm, optimizer, run.learn_stage("ours_learn"), learner)
    say(prune_ours(run, gm, budget))
    run.trainer.fit(gm, run.trainer.optimizer(gm), run.tune_stage("ours_tune"))
    return lower(run, gm)


def lower(run: Run, gm: nn.Module) -> nn.Module:
    """The lowered network; measured again, up to eight times, while the machine is too busy for a decision."""
    for attempt in range(8):
        if attempt:
            time.sleep(15)
        small = dspfx.lower(gm, run.example[:1], runtime="onnxruntime")
        if not small.meta["contest"].is_noisy:
            break
    say(f"{small.meta['lower_plan']}\n{small.meta['contest']}")
    return small


def train_control(run: Run, dense: nn.Module) -> nn.Module:
    """The dense network, trained on for as many epochs, images and learning rates as the arms."""
    model = copy.deepcopy(dense)
    cycles = ((run.settings.learn, run.settings.lr), (run.settings.tune, run.settings.lr))
    run.trainer.fit(model, run.trainer.optimizer(model), Stage("control", cycles))
    return model


def measure_latency(run: Run, networks: dict[str, nn.Module]) -> dict[str, Any]:
    """Times of all networks side by side, and what they compute; the control has the dense network's structure."""
    timed = {name: network for name, network in networks.items() if name != "control"}
    timings = {batch: peer.quietest(timed, run.example[:batch], rounds=60, limit=0.06, patience=8) for batch in (1, 8)}
    profiles = {name: dspfx.profile(network, run.example[:1]) for name, network in networks.items()}
    return {
        "setting": timings[1].setting,
        "latency": {
            name: {batch: asdict(t[name if name in t else "dense"]) for batch, t in timings.items()}
            for name in networks
        },
        "macs": {name: profile.flops for name, profile in profiles.items()},
        "params": {name: profile.params for name, profile in profiles.items()},
    }


def measure_accuracy(run: Run, networks: dict[str, nn.Module]) -> dict[str, Any]:
    """Shares of right answers; the test images are read here only."""
    test, batch_size = run.data.test(), run.settings.batch_size
    scores = {name: evaluate(network, test, batch_size).accuracy for name, network in networks.items()}
    validation = {name: run.validate(network) for name, network in networks.items()}
    return {"test": scores, "validation": validation, "images": len(test)}


def said(options: argparse.Namespace) -> str:
    """The options that differ from the defaults, as they were given."""
    own = asdict(Settings()) | {"flops": None}
    return "".join(f" --{n.replace('_', '-')} {getattr(options, n)}" for n in own if getattr(options, n) != own[n])


def cached(path: Path, trained: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned when the file was written; refused where the networks have been trained anew since."""
    if not path.exists():
        write_text(path, json.dumps(make() | {"of": trained}, indent=1))
    found: dict[str, Any] = read_json(path)
    if found.pop("of", None) != trained:
        raise SystemExit(f"{path} is of networks that were trained otherwise; delete it to measure those of now.")
    return found


def curves(run: Run) -> dict[str, list[dict[str, float]]]:
    """The learning curve of every stage that was trained, earlier tries that were put into another folder included."""
    files = sorted(run.out.rglob("*.pt"), key=lambda file: (file.parent != run.trainer.folder, file.stat().st_mtime))
    found: dict[str, list[dict[str, float]]] = {}
    for file in files:
        state = load_state(file) or {}
        if not file.stem.startswith((*ARMS, "trial")) or "progress" not in state:
            continue
        curve = Progress(**state["progress"]).curve
        if curve not in found.values():
            found[file.stem if file.parent == run.trainer.folder else f"{file.parent.name}: {file.stem}"] = curve
    return found


def open_run(options: argparse.Namespace, settings: Settings) -> Run:
    """The run in --out, new or resumed."""
    flat = asdict(settings) | {name: str(getattr(options, name)) for name in ("data", "checkpoint", "flops")}
    folder = claim_folder(options.out, flat)
    config = DataConfig(str(options.data), 32, IMAGENET_MEAN, IMAGENET_STD, True, None, 0.1, settings.seed)
    data = load_data(config, 32, torch.device("cpu"), workers=0)
    recipe = Recipe(settings.batch_size, settings.weight_decay, 0.0, settings.seed)
    return Run(settings, options.out, data, HalfTrainer(recipe, data.train, data.val, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all, and the measurement")
    parser.add_argument("--flops", type=float, help="prune our arm to this share of FLOPs, not to the latency")
    parser.add_argument("--retime", action="store_true", help="measure the latencies again, on a quieter machine")
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = open_run(options, Settings(**{name: getattr(options, name) for name in asdict(Settings())}))
    networks = {"dense": train_dense(run, options.checkpoint)}
    if "peer" in options.arms:
        networks["peer"] = train_peer(run, networks["dense"])
    if "ours" in options.arms:
        share = {"flops": options.flops} if options.flops else {"latency": run.settings.target}
        networks["ours"] = train_ours(run, networks["dense"], dspfx.Budget(**share))
    if "control" in options.arms:
        networks["control"] = train_control(run, networks["dense"])
    if not {"peer", "ours"} <= set(networks):
        return  # to be continued with the other arm
    for network in networks.values():
        network.eval().to(memory_format=torch.contiguous_format)
    if options.retime:
        (run.out / "latency.json").unlink(missing_ok=True)
    content: dict[str, Any] = {"settings": asdict(run.settings), "flops": options.flops, "curves": curves(run)}
    content |= {"peer": read_json(run.out / "peer.json"), "options": said(options)}
    trained = {name: curve[-1] for name, curve in content["curves"].items() if name in LAST_STAGES}
    content |= cached(run.out / "latency.json", trained, lambda: measure_latency(run, networks))
    content |= cached(run.out / "accuracy.json", trained, lambda: measure_accuracy(run, networks))
    text = page(content)
    say(text)
    if options.write:
        write_text(options.write, text)


if __name__ == "__main__":
    main()
