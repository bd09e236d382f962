"""The README's examples run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dspfx

README = Path(__file__).parents[1] / "README.md"


def test_every_name_it_mentions_is_public() -> None:
    names = {name for name in re.findall(r"\bdspfx\.([A-Za-z]\w*)", README.read_text()) if name != "passes"}
    assert {"prepare", "selfcheck", "benchmark"} <= names
    assert names <= set(dspfx.__all__)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, deployment, kernels, unification = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    small, gm, plan = names["small"], names["gm"], names["plan"]
    assert isinstance(small, torch.nn.Module)
    assert isinstance(gm, torch.nn.Module)
    images = torch.randn(3, 3, 48, 80)
    with torch.no_grad():
        expected, found = gm.eval()(images), small(images)
    assert torch.allclose(expected, found, atol=1e-4 * float(expected.abs().max()))
    assert abs(plan.flops_left - 0.35) < 0.005
    exec(compile(deployment, str(README), "exec"), names)
    with torch.no_grad():
        expected = small(names["images"])
    exec(compile(kernels, str(README), "exec"), names)
    for runtime in ("onnxruntime", "openvino", "torch", "kernels"):
        found = torch.as_tensor(names[f"by_{runtime}"]).detach()
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max())), runtime
    exec(compile(unification, str(README), "exec"), names)
    with torch.no_grad():
        expected, found = names["gm"].eval()(images), names["restored"].eval()(images)
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), 0) > 0.99
    files = [
        "fast.avx2.so",
        "fast.onnx",
        "network.safetensors",
        "small.bin",
        "small.onnx",
        "small.pt2",
        "small.safetensors",
        "small.xml",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
