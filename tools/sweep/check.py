"""One model through all of dspfx: prepared, proven, trained for a step, pruned, lowered, stored; one row."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dspfx
from dspfx.config import Inputs
from dspfx.coverage import Coverage
from dspfx.errors import BudgetError, DspfxError, StorageError
from dspfx.graph.traced import parts_of
from tools.sweep.cases import Case

Row = dict[str, Any]
PRUNED = 0.25  # of what is gated, before the round trips through a file


def check(case: Case) -> Row:
    """What dspfx makes of a model. Never raises: what went wrong is in row["failed"], by stage, with its place."""
    row: Row = {"failed": {}, "places": {}}
    start = time.perf_counter()
    model, inputs = case.build().eval(), case.inputs()
    row["params"] = sum(p.numel() for p in model.parameters())
    row["linear"] = _count(model, nn.Linear) > _count(model, nn.modules.conv._ConvNd)
    with _stage(row, "prepare"):
        gm = _prepare(row, model, inputs)
    if "prepare" not in row["failed"]:
        with _stage(row, "prepared = original"):
            _require(_same(_run(model, inputs), _run(gm, inputs)), "the prepared network's outputs are others")
        with _stage(row, "selfcheck"):
            _prove(row, model, inputs)
        with _stage(row, "training step"):
            _train(gm, inputs, case)
        with _stage(row, "prune"):
            _prune(row, gm)
        with tempfile.TemporaryDirectory() as folder:
            with _stage(row, "store prepared"):
                _store_prepared(gm, model, inputs, Path(folder) / "prepared.safetensors")
            with _stage(row, "store lowered"):
                _store_lowered(row, gm, model, inputs, Path(folder) / "lowered.safetensors")
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


@contextmanager
def _stage(row: Row, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = str(error).strip().splitlines()
        row["failed"][name] = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        if not isinstance(error, DspfxError | _Unequal):  # then it is a bug, and its place is wanted
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            row["places"][name] = [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.line}" for f in frames]


class _Unequal(Exception):
    """Two things that must be equal are not."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Unequal(otherwise)


def _prepare(row: Row, model: nn.Module, inputs: Any) -> nn.Module:
    start = time.perf_counter()
    gm: nn.Module = dspfx.prepare(model, inputs, _config(row))
    row["prepare_s"] = round(time.perf_counter() - start, 2)
    row["parts"] = _parts(gm)
    report = dspfx.coverage(gm)
    layers = len(report.plan.layers)
    row |= {"gated_layers": layers, "layers": layers + len(report.plan.skipped)}
    row |= {"gated": report.gated, "prunable": report.prunable}
    has_conv = any(isinstance(m, nn.modules.conv._ConvNd) for m in gm.modules())
    row["conv_prunable"] = report.convs_prunable if has_conv else None
    row["pins"] = _reasons(report)
    return gm


def _config(row: Row) -> dspfx.GateConfig:
    """Linear layers are gated too where most layers are: in transformers."""
    return dspfx.GateConfig(linear=row["linear"])


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def _parts(gm: nn.Module) -> list[str]:
    """Names of the outermost traced modules; [""] where the whole model is one."""
    return list(parts_of(gm))


def _reasons(report: Coverage) -> list[tuple[str, int]]:
    """The two reasons that hold most filters, with their number."""
    return [(pin.reason, pin.filters) for pin in report.pins[:2]]


def _prove(row: Row, model: nn.Module, inputs: Any) -> None:
    report = dspfx.selfcheck(model, inputs, _config(row))
    for key in ("error", "float_error", "rounding", "response", "flops_left", "flops_run"):
        row[key] = getattr(report, key)


def _train(gm: nn.Module, inputs: Any, case: Case) -> None:
    """One step of SGD in train mode: the loss is finite, and the weights change and stay finite."""
    gm.train()
    given = Inputs.of(inputs)
    more = (case.targets(),) if case.targets else ()
    before = [p.detach().clone() for p in gm.parameters()]
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-6)
    outputs = _floats(gm(*given.args, *more, **given.kwargs))
    loss = torch.stack([x.square().mean() if x.dim() else x for x in outputs]).sum()
    loss.backward()
    optimizer.step()
    gm.eval()
    after = list(gm.parameters())
    _require(bool(loss.isfinite()), f"the loss is {loss.item():.3g}")
    _require(all(bool(p.isfinite().all()) for p in after), "a weight is not finite after the step")
    _require(any(not torch.equal(p, q) for p, q in zip(before, after, strict=True)), "no weight has changed")


def _prune(row: Row, gm: nn.Module) -> None:
    if not row["gated_layers"]:
        return
    try:
        row["pruned_to"] = dspfx.prune(gm, dspfx.Budget(flops=1 - PRUNED * row["gated"])).flops_left
    except BudgetError as error:  # the floor is above it: the network is stored as it is
        row["floor"] = str(error)


def _store_prepared(gm: nn.Module, model: nn.Module, inputs: Any, path: Path) -> None:
    """Saved, and loaded into the original model with all its values overwritten: bitwise the same outputs."""
    expected = _run(gm, inputs)
    dspfx.save(gm, path)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(1)
    back = dspfx.load(path, model=model)
    _require(_same(expected, _run(back, inputs)), "the outputs of what was loaded are others")


def _store_lowered(row: Row, gm: nn.Module, model: nn.Module, inputs: Any, path: Path) -> None:
    """The same for the lowered network; one that has no stored form says so in row["not_stored"]."""
    small = dspfx.lower(gm)
    expected = _run(small, inputs)
    try:
        dspfx.save(small, path)
    except StorageError as error:
        row["not_stored"] = str(error)
        return
    back = dspfx.load(path, model=None if row["parts"] == [""] else model)
    _require(_same(expected, _run(back, inputs)), "the outputs of what was loaded are others")


def _run(network: nn.Module, inputs: Any) -> list[Tensor]:
    given = Inputs.of(inputs)
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(network.eval()(*given.args, **given.kwargs)) if isinstance(x, Tensor)]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _floats(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
