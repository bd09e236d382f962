"""The page as text: what it says, what it escapes, and what it says when something is missing."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dspfx.__main__ import main
from dspfx.cli import pages
from dspfx.cli.pages.run import read_run
from dspfx.plans import Group
from tests.cli.pages.folder import EVIL, PLAN, make_run, results


class Elements(HTMLParser):
    """Every start tag with its attributes, and the texts outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.is_broken = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.is_broken = tag == "wbr"  # a name goes on
        if tag not in ("meta", "link", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            if self.is_broken and self.texts:
                self.texts[-1] += data
            else:
                self.texts.append(data)
        self.is_broken = False


def page(out: Path) -> str:
    return pages.write(out).read_text()


def words(text: str) -> str:
    return " ".join(" ".join(Elements(text).texts).split())


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = page(make_run(tmp_path))
    tags = Elements(text).tags
    links = [str(attributes[key]) for _, attributes in tags for key in ("src", "href") if key in attributes]
    assert sorted(set(links)) == ["#layers", "data:,"]
    assert not re.search(r"url\(|@import|https?:", text)
    assert [attributes.get("type") for name, attributes in tags if name == "script"] == ["application/json", None]


def test_names_from_files_are_text(tmp_path: Path) -> None:
    text = page(make_run(tmp_path))
    elements = Elements(text)
    assert "img" not in {name for name, _ in elements.tags}
    assert EVIL not in text
    assert words(text).count(" ".join(EVIL.split())) >= 4  # the layer, a reason, a pin, a note, the command
    data = re.search(r'<script type="application/json" id="structures">(.*?)</script>', text)
    assert data is not None
    assert [layer["name"] for layer in json.loads(data[1])] == ["conv1", EVIL]
    assert json.loads(data[1])[0] == {"name": "conv1", "group": [0, 1, 0, -1], "keep": ["110", "010"]}


def test_tables_have_captions_and_header_cells(tmp_path: Path) -> None:
    elements = Elements(page(make_run(tmp_path))).tags
    names = [name for name, _ in elements]
    assert names.count("table") == names.count("caption") >= 8
    assert {attributes.get("scope") for name, attributes in elements if name == "th"} == {"row", "col"}
    charts = [a for name, a in elements if name == "svg" and a.get("aria-hidden") != "true"]
    assert len(charts) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert "entropy, nats), by epoch: while groups were learned from 0.6 to 0.05" in str(charts[2]["aria-label"])


def test_the_page_answers_the_readers_questions(tmp_path: Path) -> None:
    said = words(page(make_run(tmp_path)))
    for sentence in (
        "2.0 times as fast as the dense network, 25% of its bytes, accuracy −1.00 points (can be chance).",
        "65.0% of the multiply-adds (FLOPs) and 60.0% of the weights were kept.",
        "Asked for was at most 65.0% of the FLOPs: met, with 65.0%.",
        "In 1 of 2 layers the filters fall into two or more groups, each of which reads only the input channels that "
        "it needs. 1 of 6 filters were removed altogether.",
        "Training took 1 epoch of dense training, 2 epochs of learning groups, 2 epochs of fine-tuning.",
        "Time: 1.00 ms an image instead of 2.00 ms, in PyTorch, one image at a time. That is 2.0 times as fast",
        "It gets 10 images fewer right than the dense network (91.00%, −1.00 points); with this many images a "
        "difference of up to 2.57 points can be chance, so this one can be chance.",
        "their outputs differ by 2.0e-07 of their scale",
        "pruned.safetensors holds exactly the groups that plan.json decided",
        "filters had decided which group they belong to: the mean entropy of a filter's probabilities was 0.050 nats",
        "Forms of single layers: 1 branches (a convolution a group), 1 dense (one plain layer of what is left).",
        "2 of 3 layers have groups; they make 95.0% of the multiply-adds, and 100.0% could be pruned.",
    ):
        assert sentence in said
    assert "What this page cannot show" not in said


def slow() -> dict[str, Any]:
    networks = results()["networks"]
    networks["lowered"] |= {"latency_ratio": 1.0, "latency_ms": 2.0, "file_bytes": 4000}
    return {"networks": networks, "contest": results()["contest"] | {"winner": "dense"}}


def test_it_says_when_nothing_was_bought(tmp_path: Path) -> None:
    said = words(page(make_run(tmp_path, slow())))
    assert "It bought nothing: no faster than the dense network, a file that is no smaller, accuracy −1.00" in said
    assert "Time: nothing. Of all forms that were timed, the one with every layer as it was is the fastest" in said
    assert "Size: nothing; network.safetensors takes 4 kB instead of 4 kB (100%)." in said


def test_it_says_when_it_is_slower_or_misses_the_budget_or_was_noisy(tmp_path: Path) -> None:
    content = slow()
    content["networks"]["lowered"] |= {"latency_ratio": 1.5}
    content["networks"]["pruned"] |= {"latency_ratio": 1.4}
    content["contest"] |= {"winner": "fastest forms", "is_noisy": True}
    content["left"] = results()["left"] | {"flops": 0.8}
    said = words(page(make_run(tmp_path, content)))
    assert "It bought nothing: slower than the dense network (1.50 times its time)" in said
    assert "Time: it is slower than the dense network" in said
    assert "Asked for was at most 65.0% of the FLOPs: not met, with 80.0%." in said
    assert "Mind: The machine was busy while forms were timed" in said
    assert "Mind: Times varied widely: the pruned network, which does the dense one's work, came out at 1.40" in said


def test_accuracy_is_compared_with_a_dense_network_that_trained_as_long(tmp_path: Path) -> None:
    networks = results()["networks"]
    networks["control"] = networks["dense"] | {"test": {"loss": 0.1, "accuracy": 0.97, "images": 1000}}
    said = words(page(make_run(tmp_path, {"networks": networks})))
    assert "accuracy −7.00 points to a dense network trained as long." in said
    assert "It gets 70 images fewer right than the dense network that trained for as many epochs (97.00%" in said


def test_an_untrained_dense_network_is_no_one_to_compare_with(tmp_path: Path) -> None:
    said = words(page(make_run(tmp_path, {"arguments": results()["arguments"] | {"epochs_dense": 0}})))
    assert "25% of its bytes, and no accuracy to compare, since the dense network was never trained." in said
    assert "Mind: The dense network in these tables was never trained: its accuracy means nothing." in said


def test_old_runs_have_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    content = results()
    for name in ("command", "coverage", "difference"):
        del content[name]
    for epoch in content["curves"]["learn"]:
        for name in ("entropy", "penalty", "hypergradient"):
            epoch.pop(name, None)
    for row in content["networks"].values():
        del row["latency_spread"]
    content["arguments"] |= {"unify": 0.0, "prune_blocks": 0.0}
    (out / "results.json").write_text(json.dumps(content))
    said = words(page(out))
    for sentence in (
        "What holds channels in place (coverage): it was not recorded yet when this run was made.",
        "How far the lowered network is from the pruned one: it was printed, and not recorded yet.",
        "How groups were decided over time (entropy): it was not recorded yet when this run was made.",
        "python -m dspfx compress --model tiny --data digits --budget flops=0.65",
    ):
        assert sentence in said
    for name in ("network.safetensors", "pruned.safetensors", "plan.json"):
        (out / name).unlink()
    said = words(page(out))
    assert "The form of each layer: network.safetensors is not there." in said
    assert "Which layers were left alone, and why: pruned.safetensors is not there." in said
    assert "What is left of each layer: plan.json is not there." in said


def test_a_file_that_is_not_as_planned_is_told(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    tensors = safetensors.torch.load_file(out / "pruned.safetensors")
    tensors["conv1.gate_keep"] = torch.ones(2, 3, dtype=torch.bool)
    safetensors.torch.save_file(tensors, out / "pruned.safetensors", {"gate_plan": read_gates(out)})
    run = read_run(out)
    assert run.is_as_planned is False
    assert run.layers[0].structure.groups == [(2, 3), (1, 3)]  # the picture is of the file
    assert "Mind: pruned.safetensors holds other groups than those that plan.json decided" in words(page(out))


def read_gates(out: Path) -> str:
    with safetensors.safe_open(out / "pruned.safetensors", framework="numpy") as file:
        return str(file.metadata()["gate_plan"])


def test_structures_are_counted(tmp_path: Path) -> None:
    first, second = (layer.structure for layer in read_run(make_run(tmp_path)).layers)
    assert (first.groups, first.dead, first.unread, first.left) == ([(2, 2), (1, 1)], 1, 1, 5 / 12)
    assert (second.groups, second.dead, second.unread, second.left) == ([(2, 4)], 0, 0, 1.0)


def test_the_command_writes_the_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = make_run(tmp_path)
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    first = (out / "report.html").read_bytes()
    other = tmp_path / "elsewhere"
    shutil.copytree(out, other)
    assert main(["report", str(other)]) == 0
    assert (other / "report.html").read_bytes() == first  # no path, no date


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", None, "{out} holds no results.json, which a finished run has; give the --out of a `compress`"),
        ("results.json", "{", "{out}/results.json cannot be read ("),
        ("results.json", "[]", "{out}/results.json has no arguments, which compress writes; run it again."),
        ("plan.json", "{}", "This is not the JSON of a PrunePlan: "),
        ("network.safetensors", "no", "{out}/network.safetensors cannot be read ("),
        ("pruned.safetensors", "no", "{out}/pruned.safetensors cannot be read ("),
    ],
)
def test_folders_without_a_run_are_explained(
    file: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_run(tmp_path)
    (out / file).unlink()
    if content is not None:
        (out / file).write_text(content)
    assert main(["report", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"dspfx report: error: {message.format(out=out)}")


def test_a_page_of_a_large_network_stays_small(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    layer = PLAN.layers[0]
    shapes = [(64, 64), (256, 64), (128, 512), (512, 1024), (2048, 512)] * 11  # more pairs than ResNet50 has
    layers = tuple(
        replace(
            layer,
            name=f"layer{index}",
            out_channels=o,
            in_channels=c,
            groups=tuple(Group(tuple(range(g, o, 4)), tuple(range(g, c, 3))) for g in range(4)),
        )
        for index, (o, c) in enumerate(shapes)
    )
    (out / "plan.json").write_text(replace(PLAN, layers=layers).to_json())
    (out / "pruned.safetensors").unlink()
    assert len(page(out).encode()) < 1_000_000
    assert html.escape("layer54") in page(out)
