"""Networks traced in parts on disk: prepared ones are traced again, lowered ones come back with their graphs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.errors import StorageError
from dspfx.graph.inputs import propagate
from dspfx.graph.parts import trace_parts
from dspfx.graph.traced import network_meta, parts_of, set_network_meta, settle_eval
from dspfx.plans import LowerPlan
from tests.compare import fingerprint, leaves, same, unchanged
from tests.nets.untraceable import Backbone, Detector, Refiner
from tests.test_storage import fails, metadata, rewrite


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in ((16, 16), (12, 20))]


def settled(model: nn.Module) -> Any:
    """A network in parts with graphs for eval mode alone, as lowering leaves it, nothing removed."""
    network = settle_eval(trace_parts(model, images() if isinstance(model, Detector) else torch.randn(2, 3, 16, 16)))
    for part in parts_of(network).values():
        propagate(part, part.meta["inputs"])
    network_meta(network)["lower_plan"] = LowerPlan(())
    return network


def test_graphs_of_parts_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, path = Detector(), tmp_path / "a"
    network = settled(model)
    network.get_parameter("backbone.stem.1.0.weight").requires_grad_(False)
    dspfx.save(network, path)
    other = Detector(threshold=0.5)  # what the file does not hold is the instance's own
    before = fingerprint(other)
    again = dspfx.load(path, other)
    assert unchanged(before, fingerprint(other))
    assert not again.training
    assert again.threshold == 0.5
    again.threshold = 0.0
    assert isinstance(again.backbone, Backbone)
    assert again.backbone.out_channels == 8
    assert list(parts_of(again)) == list(parts_of(network))
    for key in ("user_class", "lower_plan", "untraced"):
        assert network_meta(again)[key] == network_meta(network)[key]
    assert not again.get_parameter("backbone.stem.1.0.weight").requires_grad
    assert same(leaves(again(images())), leaves(network(images())))
    for ours, theirs in zip(parts_of(again).values(), parts_of(network).values(), strict=True):
        assert ours.meta["work"] == theirs.meta["work"]
        shapes = [[getattr(n.meta.get("val"), "shape", None) for n in p.graph.nodes] for p in (ours, theirs)]
        assert shapes[0] == shapes[1]
    dspfx.save(again, tmp_path / "b")
    assert metadata(tmp_path / "b") == metadata(path)


def test_modules_that_lowering_took_out_stay_out(tmp_path: Path) -> None:
    path, network = tmp_path / "a", settled(Refiner())
    stem = parts_of(network)["stem"]
    conv, norm = (cast(Any, stem.get_submodule(name)) for name in ("0.0", "0.1"))
    stem.set_submodule("0.0", torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
    node = next(n for n in stem.graph.nodes if n.target == "0.1")
    node.replace_all_uses_with(node.args[0])
    stem.graph.erase_node(node)
    stem.delete_submodule("0.1")
    stem.recompile()
    dspfx.save(network, path)
    again = dspfx.load(path, Refiner())
    assert list(again.state_dict()) == list(network.state_dict())
    assert "stem.0.1.weight" not in again.state_dict()
    x = torch.randn(2, 3, 20, 24)
    assert torch.equal(again(x), network(x))


class Wider(Refiner):
    """Another network with the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 7)


def test_a_model_is_needed_and_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dspfx.save(settled(Refiner()), path)
    owner = "tests.nets.untraceable.Refiner"
    with fails(
        f"{path} holds a lowered {owner}, which needs an instance of that class: dspfx.load({str(path)!r}, "
        f"model=Refiner(...))."
    ):
        dspfx.load(path)
    remedy = f"Give an instance of {owner} built with the arguments it had when it was prepared."
    message = f"{path} does not fit this Detector: Detector has no submodule 'stem' to trace: "
    with pytest.raises(StorageError, match=f"^{re.escape(message)}.*{re.escape(remedy)}$"):
        dspfx.load(path, Detector())
    with fails(
        f"{path} does not fit this Wider: last.weight is torch.float32 (4, 5), its layer (7, 5). {remedy}",
    ):
        dspfx.load(path, Wider())


@pytest.mark.parametrize("name", ["", "stem.0", "nowhere", "stem.__class__"])
def test_parts_that_the_file_invents_are_refused(name: str, tmp_path: Path) -> None:
    path, network = tmp_path / "a", settled(Refiner())
    dspfx.save(network, path)
    parts = json.loads(metadata(path)["parts"])
    rewrite(path, parts=json.dumps(parts | {name: parts["stem"]}))
    with pytest.raises(StorageError, match=f"^{re.escape(str(path))} (does not fit this Refiner|is damaged)"):
        dspfx.load(path, Refiner())


@pytest.mark.parametrize(
    ("key", "value"), [("work", float("nan")), ("work", -1.0), ("work", 2), ("inputs", []), ("network", {})]
)
def test_damaged_parts_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a"
    dspfx.save(settled(Refiner()), path)
    parts = json.loads(metadata(path)["parts"])
    parts["stem"][key] = value
    rewrite(path, parts=json.dumps(parts))
    with pytest.raises(StorageError, match=f"^{re.escape(str(path))} is damaged, or was not written by dspfx.save: "):
        dspfx.load(path, Refiner())


def test_a_network_in_parts_that_nobody_prepared_is_not_saved(tmp_path: Path) -> None:
    network = trace_parts(Refiner())
    set_network_meta(network, {})
    with fails("Refiner is neither prepared nor lowered; save what dspfx.prepare or dspfx.lower returned."):
        dspfx.save(network, tmp_path / "a")
    assert not (tmp_path / "a").exists()
