"""What balanced structures cost in accuracy and buy in time, against uneven ones of the same FLOPs.

    python -m benchmarks.balanced_table --run RUN --write docs/results/balanced.md

Accuracy: ResNet20 on the JPEG copy of CIFAR-10, from the dense network of a run of benchmarks/latency_accuracy.py:
pruned at once to half of the FLOPs and fine-tuned for two epochs. Time: random structures of one budget, lowered for
each runtime. Rows are kept in docs/results/balanced.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import dspfx
from benchmarks import latency_accuracy as training
from dspfx.cli.scoring import evaluate
from dspfx.cli.training import Stage
from dspfx.estimate import random_energy

RUNTIMES = ("onnxruntime", "openvino", "eager")
NETWORKS = {"resnet18, 2 groups": ("resnet18", 2, 0.35), "resnet50, 2 groups": ("resnet50", 2, 0.33)}
NETWORKS |= {"resnet18, 4 groups": ("resnet18", 4, 0.35)}
KINDS = {"uneven": False, "balanced": True}
EPOCHS, SHARE = 2, 0.5


def time_structures(label: str, runtime: str) -> dict[str, Any]:
    """The time of both kinds of structure to that of the dense network, side by side."""
    name, groups, share = NETWORKS[label]
    torch.manual_seed(0)
    model, image = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    networks, forms = {"dense": model}, {}
    for kind, balanced in KINDS.items():
        gm = dspfx.prepare(model, image, dspfx.GateConfig(groups=groups, balanced=balanced))
        dspfx.prune(gm, dspfx.Budget(flops=share), random_energy(groups))
        networks[kind] = dspfx.lower(gm, image, runtime)
        plan = networks[kind].meta["lower_plan"]
        forms[kind] = {form: sum(x.form == form for x in plan.layers) for form in ("dense", "branches", "grouped")}
    found = dspfx.benchmark(networks, image, runtime=runtime, rounds=20)
    return {"setting": found.setting.partition(";")[2].strip(), "forms": forms} | {
        kind: [found[kind].ratio, found[kind].spread] for kind in KINDS
    }


def train(run: training.Run, dense: nn.Module, kind: str) -> dict[str, Any]:
    """Accuracies after one-shot pruning and some fine-tuning."""
    gm = dspfx.prepare(dense, run.example, dspfx.GateConfig(balanced=KINDS[kind])).to(memory_format=torch.channels_last)
    plan = dspfx.prune(gm, dspfx.Budget(flops=SHARE))
    run.settle(gm)
    before = run.validate(gm)
    run.trainer.fit(gm, run.trainer.optimizer(gm), Stage(f"one_shot_{kind}", ((EPOCHS, 0.02),)))
    test = evaluate(gm, run.data.test(), run.settings.batch_size).accuracy
    return {"flops_left": plan.flops_left, "before": before, "validation": run.validate(gm), "test": test}


def page(content: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    trained = [
        (kind, f"{row['flops_left']:.1%}", f"{row['before']:.2%}", f"{row['validation']:.2%}", f"{row['test']:.2%}")
        for kind, row in content["trained"].items()
    ]
    timed, settings = [], set()
    for key, row in content["timed"].items():
        settings.add(row["setting"])
        cells = []
        for kind in KINDS:
            forms = ", ".join(f"{count} {form}" for form, count in row["forms"][kind].items() if count)
            cells += [f"{row[kind][0]:.3f} ± {row[kind][1] / 2:.3f}", forms]
        timed.append((*key.split("|"), *cells))
    return "\n\n".join(
        [
            "# Balanced structures",
            "`GateConfig(balanced=True)`: equal groups, equally many kept channels, whole blocks, against the uneven "
            "structures that are the default.",
            f"## Accuracy\n\nResNet20 on the JPEG copy of CIFAR-10, pruned at once to {SHARE:.0%} of the FLOPs (groups "
            f"by clustering, 4 groups), then {EPOCHS} epochs: what the structure costs, not what a schedule can reach.",
            tabulate(
                trained, ["structure", "FLOPs left", "pruned", "validation", "test"], "github", disable_numparse=True
            ),
            "## Time\n\nRandom structures of one budget, lowered for each runtime by measuring; ratios to the dense "
            "network, batch 1, one thread, all three timed side by side.",
            tabulate(
                timed,
                ["network", "runtime", "uneven", "its layers", "balanced", "its layers"],
                "github",
                disable_numparse=True,
            ),
            f"Measured on: {'; '.join(sorted(settings))}.",
            "Made by\n\n    OMP_NUM_THREADS=1 python -m benchmarks.balanced_table --run RUN "
            "--write docs/results/balanced.md"
            "\n\nwhere RUN is the folder of a run of benchmarks/latency_accuracy.py.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder of benchmarks.latency_accuracy: measure accuracy")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="measure times on these; '' for none")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/balanced.json"))
    parser.add_argument("--write", type=Path, help="write the page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = json.loads(options.rows.read_text()) if options.rows.exists() else {"trained": {}, "timed": {}}
    if options.run is not None:
        known = json.loads((options.run / "settings.json").read_text())
        names = [field.name for field in dataclasses.fields(training.Settings)]
        known |= {"flops": None, "out": options.run}
        run = training.open_run(argparse.Namespace(**known), training.Settings(**{name: known[name] for name in names}))
        dense = training.train_dense(run, Path(known["checkpoint"]))
        for kind in KINDS:
            if kind not in content["trained"]:
                content["trained"][kind] = train(run, dense, kind)
                options.rows.write_text(json.dumps(content, indent=1) + "\n")
                print(kind, content["trained"][kind], flush=True)
    for runtime in filter(None, options.runtimes.split(",")):
        for label in NETWORKS:
            if (key := f"{label}|{runtime}") not in content["timed"]:
                content["timed"][key] = time_structures(label, runtime)
                options.rows.write_text(json.dumps(content, indent=1) + "\n")
                print(key, content["timed"][key], flush=True)
    if options.write:
        options.write.write_text(page(content))


if __name__ == "__main__":
    main()
