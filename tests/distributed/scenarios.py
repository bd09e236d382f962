"""What every rank does; a file of results per rank says what came out (run by test_distributed.py)."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dspfx
from dspfx import ranks
from dspfx.cli.images import Look, MemorySplit
from dspfx.cli.training import Recipe, Stage, Trainer

Mode = Literal["fused", "exact"]
BATCH, STEPS = 8, 4
BUDGET = dspfx.Budget(flops=0.5)
SECONDS = 60  # after which a rank that waits for others gives up


class Net(nn.Module):
    """Residual, transposed and pointwise convolutions without batch statistics; six filters do not divide by four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, 6)
        self.b = nn.Conv2d(6, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 10, 2, stride=2)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.norm(self.a(x)))))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return dspfx.prepare(Net().double(), torch.zeros(2, 3, 8, 8, dtype=torch.float64), dspfx.GateConfig(groups=2))


def batches(steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield images, torch.randint(4, (BATCH,), generator=generator)


def share(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    world, rank = ranks.count(), dist.get_rank() if dist.is_initialized() else 0
    return images[rank::world], labels[rank::world]


def train(
    gm: nn.Module,
    call: nn.Module,
    optimizer: torch.optim.Optimizer,
    mode: Mode = "fused",
    micro: int = 1,
) -> dspfx.GroupLearner:
    """Some steps of a plain loop; `micro` parts a batch are accumulated, without messages but for the last."""
    with dspfx.GroupLearner(gm, optimizer, STEPS, strength=0.05, mode=mode, lr=0.05) as learner:
        for images, labels in batches():
            images, labels = share(images, labels)

            def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                return F.cross_entropy(call(images), labels)

            optimizer.zero_grad()
            for i in range(micro):
                if isinstance(call, DistributedDataParallel):
                    call.require_backward_grad_sync = i == micro - 1
                (loss(images[i::micro], labels[i::micro]) / micro).backward()
            optimizer.step()
            if mode == "exact":
                learner.step(loss)
    return learner


def sgd(gm: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def state(gm: nn.Module) -> dict[str, Tensor]:
    return {name: ranks.whole(value).detach().clone() for name, value in gm.state_dict().items()}


def learn_and_prune(
    wrap: Callable[[nn.Module], nn.Module],
    mode: Mode = "fused",
    micro: int = 1,
    optimize: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> dict[str, Any]:
    """Learned weights and logits, the plan, and the weights and momenta after two steps of fine-tuning."""
    gm = build()
    call = wrap(gm)
    optimizer = optimize(gm)
    learner = train(gm, call, optimizer, mode, micro)
    learned = state(gm)
    stats = learner.stats()
    plan = dspfx.prune(gm, BUDGET)
    for images, labels in batches(2):
        images, labels = share(images, labels)
        optimizer.zero_grad()
        F.cross_entropy(call(images), labels).backward()
        optimizer.step()
    momenta = {}
    if isinstance(optimizer, torch.optim.SGD):
        momenta = {n: ranks.whole(optimizer.state[p]["momentum_buffer"]) for n, p in gm.named_parameters()}
    return {"learned": learned, "plan": plan.to_json(), "tuned": state(gm), "stats": stats, "momenta": momenta}


def alone(gm: nn.Module) -> nn.Module:
    return gm


def sharded(gm: nn.Module) -> nn.Module:
    fully_shard(gm)
    return gm


def fused_ddp() -> Any:
    return learn_and_prune(DistributedDataParallel)


def exact_ddp() -> Any:
    return learn_and_prune(DistributedDataParallel, "exact")


def accumulated_ddp() -> Any:
    return learn_and_prune(DistributedDataParallel, micro=2)


def fused_fsdp() -> Any:
    return learn_and_prune(sharded)


def zero_redundancy() -> Any:
    def optimize(gm: nn.Module) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(
            gm.parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3
        )

    return learn_and_prune(DistributedDataParallel, optimize=optimize)


def unified() -> Any:
    """ADMM, projection and training on, of a network that DistributedDataParallel wraps where there are ranks."""
    torch.manual_seed(0)
    model = Net().double()
    call = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = sgd(model)
    with dspfx.Unifier(model, optimizer, dspfx.BlockConfig((2, 2), 0.25, 0.5), STEPS, every=2) as unifier:
        for phase in range(2):
            for images, labels in (share(*batch) for batch in batches()):
                optimizer.zero_grad()
                F.cross_entropy(call(images), labels).backward()
                optimizer.step()
            if phase == 0:
                plan = unifier.project().to_json()
    return {"plan": plan, "tuned": state(model)}


def refusals() -> Any:
    """The messages of what each rank has to refuse, whichever rank is to blame."""

    def message(call: Callable[[], object]) -> str:
        try:
            call()
        except dspfx.DspfxError as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    def train_apart(distributed: bool) -> None:
        gm = build(seed=dist.get_rank())
        optimizer = sgd(gm)
        with dspfx.GroupLearner(gm, optimizer, STEPS, distributed=distributed):
            F.cross_entropy(gm(torch.ones(2, 3, 8, 8, dtype=torch.float64)), torch.tensor([0, 1])).backward()
            optimizer.step()

    def unify_apart(distributed: bool) -> None:
        torch.manual_seed(dist.get_rank())
        model = Net()
        dspfx.Unifier(model, sgd(model), dspfx.BlockConfig(), STEPS, distributed=distributed)

    shard = sharded(build())
    return {
        "unified apart": message(lambda: unify_apart(True)),
        "unified apart, each its own": message(lambda: unify_apart(False)),
        "sharded, unified": message(lambda: dspfx.Unifier(shard, sgd(shard), dspfx.BlockConfig(), 1)),
        "other weights": message(lambda: train_apart(True)),
        "other weights, each its own": message(lambda: train_apart(False)),
        "other weights, pruned": message(lambda: dspfx.prune(build(seed=dist.get_rank()), BUDGET)),
        "pruned, each its own": message(lambda: dspfx.prune(build(seed=dist.get_rank()), BUDGET, distributed=False)),
        "other logits": message(lambda: dspfx.prune(_with_logits(build()), BUDGET)),
        "budget": message(lambda: dspfx.prune(build(), dspfx.Budget(flops=1e-6))),
        "sharded, exact": message(lambda: dspfx.GroupLearner(shard, sgd(shard), 1, mode="exact")),
        "sharded, lowered": message(lambda: dspfx.lower(shard)),
        "sharded, latency": message(lambda: dspfx.prune(shard, dspfx.Budget(latency=0.5), runtime="eager")),
    }


def _with_logits(gm: nn.Module) -> nn.Module:
    gm.get_buffer("a.gate_logits").fill_(float(dist.get_rank() == 1))
    return gm


def command_line() -> Any:
    """The command line's own loop: epochs over shared batches, and validation over shared images."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    look = Look(8, (0.5,) * 3, (0.25,) * 3, True, torch.device("cpu"), 0)
    train, val = (MemorySplit(part, torch.arange(len(part)) % 4, look) for part in (images[:37], images[37:]))
    gm = build().float()
    with TemporaryDirectory() as folder:
        trainer = Trainer(Recipe(8, 1e-3, 0.1, 0), train, val, Path(folder))
        optimizer = trainer.optimizer(gm)
        with dspfx.GroupLearner(gm, optimizer, 2 * trainer.steps, strength=0.05, lr=0.05) as learner:
            curve = trainer.fit(gm, optimizer, Stage("learn", ((2, 0.1),)), learner).curve
    return {"learned": state(gm), "curve": [{**epoch, "seconds": 0.0} for epoch in curve]}


def measured_by_first() -> Any:
    """A latency is measured on rank 0; the others get its plan."""
    gm = dspfx.prepare(Net(), torch.zeros(1, 3, 8, 8))
    DistributedDataParallel(gm)
    return {"plan": dspfx.prune(gm, dspfx.Budget(latency=1.0), runtime="eager").to_json()}


SCENARIOS = (
    fused_ddp, exact_ddp, accumulated_ddp, fused_fsdp, zero_redundancy, command_line, refusals, measured_by_first,
    unified,
)  # fmt: skip


def run(rank: int, world: int, folder: str) -> None:
    """One rank: every scenario, and what came of it in a file of its own."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    found: dict[str, Any] = {}
    for scenario in SCENARIOS:
        try:
            found[scenario.__name__] = scenario()
        except Exception:
            found[scenario.__name__] = {"error": traceback.format_exc()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
