"""A finished run, read from its folder: what every layer became, and what is not known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dspfx.cli.checkpoints import read_json
from dspfx.cli.report import FILE
from dspfx.errors import ConfigError, StorageError
from dspfx.plans import GatePlan, LoweredLayer, LowerPlan, PrunedLayer, PrunePlan, Skipped

NOISE = 0.1  # of a ratio of equal work from 1, beyond which times are not to be trusted


@dataclass(frozen=True)
class Structure:
    """Which filters (by index) form which group, -1 is dead, and for each group which input channels it reads."""

    group: tuple[int, ...]
    keep: tuple[tuple[bool, ...], ...]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(filters, input channels) of every group that has both."""
        shapes = [(self.group.count(index), sum(row)) for index, row in enumerate(self.keep)]
        return [(filters, channels) for filters, channels in shapes if filters and channels]

    @property
    def dead(self) -> int:
        """Filters in no group, or in one that reads nothing."""
        return len(self.group) - sum(filters for filters, _ in self.groups)

    @property
    def unread(self) -> int:
        """Input channels that no filter reads."""
        used = set(self.group)
        living = [row for index, row in enumerate(self.keep) if index in used]
        return sum(not any(column) for column in zip(*living, strict=True)) if living else len(self.keep[0])

    @property
    def left(self) -> float:
        """Share of the (filter, input channel) pairs that are kept."""
        pairs = len(self.group) * len(self.keep[0])
        return sum(filters * channels for filters, channels in self.groups) / pairs if pairs else 1.0


@dataclass(frozen=True)
class Layer:
    """A gated layer: what is left by plan, its structure, and the form it was lowered to, as far as they are known."""

    plan: PrunedLayer
    structure: Structure
    lowered: LoweredLayer | None

    @property
    def left(self) -> float:
        """Share of its multiply-adds that are kept."""
        return self.plan.macs_left / self.plan.macs if self.plan.macs else self.structure.left


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
        results: results.json.
        layers: the gated ones; empty where there is no plan.json.
        lowered: every layer that carries channels, in the form that it was lowered to; empty where it is not known.
        skipped: layers without a gate, and why; None where that is not known.
        is_as_planned: pruned.safetensors has plan.json's structure; None where that was not compared.
        missing: what could not be shown and why, a sentence each.
    """

    results: dict[str, Any]
    layers: tuple[Layer, ...] = ()
    lowered: tuple[LoweredLayer, ...] = ()
    skipped: tuple[Skipped, ...] | None = None
    is_as_planned: bool | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def is_noisy(self) -> bool:
        """True where the pruned network, the dense one with zeros, did not take the same time."""
        pruned = self.results["networks"].get("pruned")
        return pruned is not None and abs(pruned["latency_ratio"] - 1) > NOISE


def read_run(out: Path) -> Run:
    """What the folder of a finished run holds; files that are missing are named in `missing`.

    Raises:
        ConfigError: there is no results.json: no run, or one that is not finished.
        StorageError: a file is damaged.
    """
    if not (out / FILE).is_file():
        raise ConfigError(
            f"{out} holds no {FILE}, which a finished run has; give the --out of a `compress`, or start that command "
            "again, which goes on where it was."
        )
    results, missing = read_json(out / FILE), list[str]()
    _check(results, out / FILE)
    missing += _unrecorded(results)
    gate_text = _metadata(out / "pruned.safetensors", "gate_plan", missing)
    lower_text = _metadata(out / "network.safetensors", "lower_plan", missing)
    skipped = None if gate_text is None else GatePlan.from_json(gate_text).skipped
    lowered = {} if lower_text is None else {layer.name: layer for layer in LowerPlan.from_json(lower_text).layers}
    if not (out / "plan.json").is_file():
        missing.append("What is left of each layer: plan.json is not there.")
        return Run(results, (), tuple(lowered.values()), skipped, None, missing)
    plan = PrunePlan.from_json((out / "plan.json").read_text())
    planned = {layer.name: _planned(layer) for layer in plan.layers}
    saved = None if gate_text is None else _saved(out / "pruned.safetensors", list(planned))
    layers = tuple(Layer(layer, (saved or planned)[layer.name], lowered.get(layer.name)) for layer in plan.layers)
    same = None if saved is None else all(_masks(saved[name]) == _masks(planned[name]) for name in planned)
    return Run(results, layers, tuple(lowered.values()), skipped, same, missing)


def _check(results: Any, path: Path) -> None:
    """Raises StorageError that names the first thing which every version wrote and this file lacks."""
    rows = ("test", "flops_needed", "params_needed", "flops", "params", "file_bytes", "latency_ms", "latency_ratio")
    top = ("arguments", "versions", "machine", "networks", "left", "runtime", "latency", "contest", "curves")
    wanted = [*top, *(f"networks/{name}/{key}" for name in ("dense", "lowered") for key in rows)]
    wanted += [f"arguments/{name}" for name in ("model", "data", "budget", "seed")]
    for keys in wanted:
        value = results
        for key in keys.split("/"):
            if not isinstance(value, dict) or key not in value:
                raise StorageError(f"{path} has no {keys}, which compress writes; run it again.")
            value = value[key]


def _metadata(path: Path, key: str, missing: list[str]) -> str | None:
    """A text in a safetensors file's metadata; None, and a sentence in `missing`, where there is none."""
    what = {"gate_plan": "Which layers were left alone, and why", "lower_plan": "The form of each layer"}[key]
    if not path.is_file():
        missing.append(f"{what}: {path.name} is not there.")
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(key)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read ({error}); take it away to have the page without it.") from error
    if text is None:
        missing.append(f"{what}: {path.name} does not hold it.")
    return text


def _saved(path: Path, names: list[str]) -> dict[str, Structure]:
    """The gates that the pruned network was saved with."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {
                name: Structure(
                    tuple(map(int, file.get_tensor(f"{name}.gate_group"))),
                    tuple(tuple(map(bool, row)) for row in file.get_tensor(f"{name}.gate_keep")),
                )
                for name in names
            }
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} has other layers than plan.json ({error}); they are of two runs.") from error


def _planned(layer: PrunedLayer) -> Structure:
    group, keep = [-1] * layer.out_channels, []
    for index, members in enumerate(layer.groups):
        for filter_ in members.filters:
            group[filter_] = index
        channels = set(members.channels)
        keep.append(tuple(channel in channels for channel in range(layer.in_channels)))
    return Structure(tuple(group), tuple(keep) or ((False,) * layer.in_channels,))


def _masks(structure: Structure) -> list[tuple[bool, ...]]:
    """What each filter reads; two structures with equal ones are the same."""
    nothing = (False,) * len(structure.keep[0])
    return [nothing if index < 0 else structure.keep[index] for index in structure.group]


def _unrecorded(results: dict[str, Any]) -> list[str]:
    """What an older dspfx did not write into results.json."""
    found = []
    if "coverage" not in results:
        found.append("What holds channels in place (coverage): it was not recorded yet when this run was made.")
    if "difference" not in results:
        found.append("How far the lowered network is from the pruned one: it was printed, and not recorded yet.")
    learned = results.get("curves", {}).get("learn", [])
    if learned and not any("entropy" in epoch for epoch in learned):
        found.append("How groups were decided over time (entropy): it was not recorded yet when this run was made.")
    return found


def compact(layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """The structures for the page's script: the group of each filter, and a digit for each channel of each group."""
    return [
        {
            "name": layer.plan.name,
            "group": list(layer.structure.group),
            "keep": ["".join("01"[kept] for kept in row) for row in layer.structure.keep],
        }
        for layer in layers
    ]
