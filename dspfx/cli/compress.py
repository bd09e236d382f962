"""`python -m dspfx compress`: from a network and images to a smaller, faster network."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import SGD

import dspfx
from dspfx import ranks
from dspfx.cli import dry_run, forks, models, pages, report
from dspfx.cli.arguments import DEFAULTS, add_arguments
from dspfx.cli.checkpoints import claim_folder, load_state, save_state, write_atomically, write_text
from dspfx.cli.data import Data, load_data
from dspfx.cli.distill import Teacher
from dspfx.cli.machine import Machine, set_machine
from dspfx.cli.options import Settings, read_settings
from dspfx.cli.scoring import evaluate, recalibrate, say
from dspfx.cli.training import Progress, Trainer
from dspfx.cli.unifying import compressed, unify
from dspfx.config import Budget
from dspfx.coverage import Coverage
from dspfx.deploy.benchmark import Results
from dspfx.deploy.compete import Contest
from dspfx.errors import ConfigError, MismatchError
from dspfx.graph.parts import describe_parts
from dspfx.graph.traced import network_meta
from dspfx.plans import PrunePlan

TOLERANCE = 1e-4  # of the output's scale, between pruned and lowered in float32
DESCRIPTION = """\
Makes a convolutional network smaller and faster: trains or loads it, learns which filters belong together, prunes to a
budget, fine-tunes, and lowers the result to plain torch modules, in the form that is fastest in the runtime it is for.
Started again, the same command goes on from the last finished epoch. torchrun --nproc-per-node N -m dspfx compress ...
trains with N processes, each on its part of every batch. docs/training.md has recipes."""
EXAMPLES = """\
examples:
  dspfx compress --out runs/demo                                  a ResNet20 on scikit-learn's digits, two minutes
  dspfx compress --model resnet50 --checkpoint r50.pth --data /data/imagenet --epochs-learn 20 --epochs-tune 40 \\
      --budget flops=0.5 --out runs/r50 --dry-run                 what that would do, and how long it would take
  dspfx compress --fork runs/r50 --budget latency=0.5 --runtime onnxruntime --out runs/r50-half
                                                                  the same groups, pruned to half of the time"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `compress` to the command line."""
    parser = commands.add_parser(
        "compress", help="make a network smaller and faster", description=DESCRIPTION, epilog=EXAMPLES,
        usage="dspfx compress --out DIR [options]", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    parser.set_defaults(run=run, interrupted="the same command goes on from the last finished epoch")


def run(args: argparse.Namespace) -> None:
    """The job, from checked options to the table of results; raises DspfxError."""
    machine = set_machine(args)
    if args.json is not None and not args.dry_run:
        raise ConfigError("--json goes with --dry-run; a run writes results.json into --out.")
    if args.dry_run:
        dry_run.show(args, read_settings(args), machine)
        return
    with ranks.joined(machine.device):
        _run(read_settings(args), machine, args.out)


def _run(settings: Settings, machine: Machine, out: Path) -> None:
    checkpoints = claim_folder(out, settings.flat(), DEFAULTS)
    if (out / report.FILE).exists():
        if not (out / pages.FILE).exists():  # it was killed right before, or is of an older dspfx
            pages.write(out)
        say(f"This run is finished; give another --out to run again.\n{report.show(out)}")
        return
    if settings.fork is not None:
        forks.take_over(settings.fork, (settings.stage("dense"), settings.stage("learn")), checkpoints)
    data = load_data(settings.data, models.default_image_size(settings.model), machine.device, machine.workers)
    say(f"{len(data.train)} training and {len(data.val)} validation images of {data.image_size} pixels; {machine}")
    trainer = Trainer(settings.recipe, data.train, data.val, checkpoints)
    example = next(data.val.in_order(2))[0]
    single = example[:1].to(machine.timed_on(settings.runtime))

    torch.manual_seed(settings.recipe.seed)
    dense = models.build(settings.model, len(data.classes))
    if settings.checkpoint is not None:
        models.load_checkpoint(dense, Path(settings.checkpoint))
    dense.to(machine.device)
    coverage = rehearse(dense, example, single, settings, trainer)
    curves = {"dense": train_dense(dense, settings, trainer)}
    gm = dspfx.prepare(dense, example, settings.gates)
    curves["learn"] = learn(gm, settings, trainer)
    plan, curves["tune"] = prune_and_tune(gm, dense, single, settings, trainer)
    if settings.is_unified:
        unified, curves["unify"] = unify(gm, settings, trainer)
    controls: dict[str, nn.Module] = {}
    if settings.dense_control:
        controls["control"], curves["control"] = train_control(dense, settings, trainer)
    if ranks.rank() == 0:
        with ranks.alone():
            small, contest = lower(gm, single, settings)
            difference = check_equal(gm, small, example)
            write_text(out / "plan.json", plan.to_json())
            networks = {"dense": dense, "pruned": gm, "lowered": small, **controls}
            if settings.is_unified:
                write_text(out / "unify_plan.json", unified.to_json())
                networks["compressed"] = compressed(gm, dense, settings, out / "compressed.safetensors")
            measured = measure(networks, data, single, plan, settings, out)
            found = report.Findings(plan, measured, contest, coverage, difference)
            report.write(out, settings, machine, found, {n: p.curve for n, p in curves.items()})
            pages.write(out)
    ranks.wait()
    say("\n" + report.show(out))


def rehearse(dense: nn.Module, example: Tensor, single: Tensor, settings: Settings, trainer: Trainer) -> Coverage:
    """Prints and returns what can be gated; whatever prepare, GroupLearner, prune or the runtime refuse ends it here.

    A run that has checkpoints came through this before it made them, and measures no latency again.
    """
    gm = dspfx.prepare(dense, example, settings.gates)
    coverage = dspfx.coverage(gm)
    say(str(coverage))
    make_learner(gm, trainer.optimizer(gm), 1, settings).close()
    if any(trainer.folder.iterdir()):
        return coverage
    latency = settings.budget.latency
    if latency is not None:
        say(
            f"Can this network reach {latency:.1%} of its time on {settings.runtime}? Tried before training; "
            "its layers are measured once on a machine."
        )
    plan = prune_to_budget(gm, single, settings.budget, settings)
    if latency is not None:
        say(f"It can: {plan.latency_left:.1%} was measured, with {plan.flops_left:.1%} of the FLOPs.")
    if ranks.rank() == 0:
        time_together({"dense": dense, "pruned": gm}, single, settings, rounds=2)
    return coverage


def make_learner(gm: nn.Module, optimizer: SGD, steps: int, settings: Settings) -> dspfx.GroupLearner:
    """The learner that the settings ask for."""
    strength = "auto" if settings.strength == "steered" else settings.strength
    return dspfx.GroupLearner(
        gm, optimizer, steps, strength, settings.mode, seed=settings.recipe.seed, budget=settings.steered_by
    )


def train_dense(dense: nn.Module, settings: Settings, trainer: Trainer) -> Progress:
    """Trains the dense network in place (not at all where --epochs-dense is 0) and says what it reaches."""
    progress = trainer.fit(dense, trainer.optimizer(dense), settings.stage("dense"))
    say(f"dense: validation {evaluate(dense, trainer.val, settings.recipe.batch_size)}")
    return progress


def learn(gm: nn.Module, settings: Settings, trainer: Trainer) -> Progress:
    """Trains the network and the groups of its gates together (DSP, section 3)."""
    stage = settings.stage("learn")
    if stage.epochs == 0:
        return Progress()
    optimizer, steps = trainer.optimizer(gm), stage.epochs * trainer.steps
    if settings.fork is not None:
        return trainer.fit(gm, optimizer, stage)  # all its epochs are found, and a learner's budget was another one
    with make_learner(gm, optimizer, steps, settings) as learner:
        return trainer.fit(gm, optimizer, stage, learner)


def prune_to_budget(gm: nn.Module, single: Tensor, budget: Budget, settings: Settings) -> PrunePlan:
    """Prunes `gm` in place; a latency is that of one image, with the threads that PyTorch has now."""
    device = next(gm.parameters()).device
    plan = dspfx.prune(
        gm.to(single.device),
        budget,
        example_inputs=single,
        runtime=settings.runtime,
        threads=torch.get_num_threads(),
    )
    gm.to(device)
    return plan


def prune_and_tune(
    gm: nn.Module, dense: nn.Module, single: Tensor, settings: Settings, trainer: Trainer
) -> tuple[PrunePlan, Progress]:
    """Prunes `gm` and fine-tunes what is left, in as many cycles as asked for; (the last plan, the joint curve).

    What was pruned stays zero. Each cycle begins with the best weights of the one before, and with a new optimizer.
    """
    teacher = Teacher(dense, settings.distill) if settings.distill.share > 0 else None
    whole = Progress()
    for budget, stage in settings.tuning():
        plan = prune(gm, single, budget, f"{stage.name.replace('tune', 'pruned')}.pt", settings, trainer)
        whole.curve += trainer.fit(gm, trainer.optimizer(gm), stage, teacher=teacher).curve
    return plan, whole


def prune(gm: nn.Module, single: Tensor, budget: Budget, file: str, settings: Settings, trainer: Trainer) -> PrunePlan:
    """Prunes `gm` to the budget and re-calibrates its batch norms, or repeats what an earlier start decided."""
    path = trainer.folder / file
    state = load_state(path)
    if state is not None:
        gm.load_state_dict(state["model"])
        plan = PrunePlan.from_json(state["plan"])
        device = next(gm.parameters()).device
        describe_parts(gm.to(single.device), single)  # which pruning does too: the saved network remembers its inputs
        gm.to(device)
    else:
        plan = prune_to_budget(gm, single, budget, settings)
        recalibrate(gm, trainer.train, settings.recipe.batch_size)
        ranks.copy_from_first(gm.buffers())
        save_state(path, {"model": gm.state_dict(), "plan": plan.to_json()})
    say(str(plan))
    say(f"pruned: validation {evaluate(gm, trainer.val, settings.recipe.batch_size)}")
    return plan


def train_control(dense: nn.Module, settings: Settings, trainer: Trainer) -> tuple[nn.Module, Progress]:
    """The dense network, trained on for as many epochs, images and learning rates as the pruned one had."""
    control = copy.deepcopy(dense)
    return control, trainer.fit(control, trainer.optimizer(control), settings.stage("control"))


def lower(gm: nn.Module, single: Tensor, settings: Settings) -> tuple[nn.Module, Contest]:
    """(the form of the pruned network that is fastest on one image, what it was compared with)."""
    twin = copy.deepcopy(gm).to(single.device)
    small = dspfx.lower(twin, single, settings.runtime, threads=torch.get_num_threads())
    contest: Contest = network_meta(small)["contest"]
    say(f"lowered for {settings.runtime}:\n{contest}")
    return small.to(next(gm.parameters()).device), contest


@torch.no_grad()
def check_equal(gm: nn.Module, small: nn.Module, example: Tensor) -> float:
    """The largest difference of the outputs of both, of their scale.

    Raises MismatchError where the lowered network answers otherwise than the pruned one.
    """
    gm.eval()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, found = gm(example), small(example)
    error = float((expected - found).abs().max() / expected.abs().max())
    say(f"lowered and pruned differ by {error:.1e} of the output's scale")
    if not error <= TOLERANCE:
        raise MismatchError(
            f"The lowered network differs from the pruned one by {error:.1e} of the output's scale, allowed is "
            f"{TOLERANCE:.0e}; please report this with the command, the checkpoints in --out hold the pruned network."
        )
    return error


def time_together(networks: dict[str, nn.Module], single: Tensor, settings: Settings, rounds: int = 30) -> Results:
    """The networks' times on one image in the runtime that they are for, and on the device that it is for."""
    twins = {name: copy.deepcopy(network).to(single.device) for name, network in networks.items()}
    return dspfx.benchmark(twins, single, runtime=settings.runtime, rounds=rounds, threads=torch.get_num_threads())


def measure(
    networks: dict[str, nn.Module], data: Data, single: Tensor, plan: PrunePlan, settings: Settings, out: Path
) -> report.Measured:
    """Saves every network, then measures size, speed and, reading the test split here only, accuracy."""
    files = {name: out / f"{name}.safetensors" for name in networks} | {"lowered": out / "network.safetensors"}
    for name, network in networks.items():
        if name in ("pruned", "lowered"):
            dspfx.save(network, files[name])
        elif name != "compressed":
            state = {key: value.contiguous() for key, value in network.state_dict().items()}
            write_atomically(files[name], lambda part, state=state: safetensors.torch.save_file(state, part))  # type: ignore[misc]
    timing = time_together(networks, single, settings)
    test = data.test()
    rows = []
    for name, network in networks.items():
        profile = dspfx.profile(network, single.to("meta"))
        is_compressed = name in ("pruned", "lowered", "compressed")
        rows.append(
            report.Row(
                name=name,
                test=evaluate(network, test, settings.recipe.batch_size),
                flops_needed=plan.flops_left if is_compressed else 1.0,
                params_needed=plan.params_left if is_compressed else 1.0,
                flops=profile.flops,
                params=profile.params,
                file_bytes=files[name].stat().st_size,
                latency_ms=timing[name].median_ms,
                latency_ratio=timing[name].ratio,
                latency_spread=timing[name].spread,
            )
        )
    return report.Measured(rows, timing.setting)
