"""timm's part of the catalogue: the models that `pick_timm` chose, as committed beside this file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from tools.sweep.cases import Case, images, printed

LIST = Path(__file__).with_name("timm_models.json")


def timm_cases() -> list[Case]:
    """The smallest model of each of timm's files; building one needs the extra `zoo`."""
    return [_case(**row) for row in json.loads(LIST.read_text())]


def _case(file: str, model: str, params: int, size: int, channels: int, options: dict[str, Any]) -> Case:
    def make() -> nn.Module:
        built: nn.Module = importlib.import_module("timm").create_model(model, pretrained=False, **options)
        return built

    shape = (channels, size, size)
    note = ", ".join(f"{key}={value}" for key, value in options.items())
    return Case(model, "timm", file, printed(shape), make, images(*shape), note=note)
