"""Picks timm's models for the sweep, the smallest of each of its files, and writes them as data.

python -m tools.sweep.pick_timm        # about five minutes; timm_models.json, beside this file, is committed
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from typing import Any

import torch
from torch import nn

from tools.sweep.timm_models import LIST

timm: Any = importlib.import_module("timm")  # the extra `zoo`
SIZES = (64, 96, 112, 128, 160)
LARGE = 150_000_000  # parameters above which only two of a model's layers are built


def smallest(module: str) -> tuple[str, int]:
    """(model, number of parameters) of a timm file's smallest model, those made for its own tests apart."""
    names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
    counts = {name: count_parameters(name) for name in names}
    return min(counts.items(), key=lambda item: (item[1], item[0]))


def count_parameters(name: str) -> int:
    """Parameters of a model, built without memory where its constructor allows it."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except (NotImplementedError, RuntimeError, ValueError):  # its constructor reads values
        model = timm.create_model(name, pretrained=False)
    return sum(p.numel() for p in model.parameters())


def accepted(name: str, params: int) -> dict[str, Any]:
    """The smallest square image that the model runs on in both modes, and the arguments it takes to build it so."""
    options: dict[str, Any] = {"depth": 2} if params > LARGE else {}
    model = timm.create_model(name, pretrained=False, **options)
    channels, *default = model.default_cfg["input_size"]
    sizes = [size for size in SIZES if size < max(default)]
    for size in sizes:
        if runs(model, channels, size):
            return {"size": size, "channels": channels, "options": options}
    for size in sizes:
        resizing = options | {"img_size": size}
        try:
            resized = timm.create_model(name, pretrained=False, **resizing)
        except Exception:
            continue  # it has no such argument, or not this size
        if runs(resized, channels, size):
            return {"size": size, "channels": channels, "options": resizing}
    return {"size": max(default), "channels": channels, "options": options}


def runs(model: nn.Module, channels: int, size: int) -> bool:
    """True where the model takes two images of this size, in train and in eval mode."""
    try:
        with torch.no_grad():
            for mode in (True, False):
                model.train(mode)(torch.randn(2, channels, size, size))
    except Exception:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for module in timm.list_modules():
        name, params = smallest(module)
        row = {"file": module, "model": name, "params": params, **accepted(name, params)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(json.dumps(row))
    LIST.write_text("[\n  " + ",\n  ".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
