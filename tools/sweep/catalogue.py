"""All models of the sweep, and the few that stand for them in a quick run."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from tools.sweep.cases import Case
from tools.sweep.timm_models import timm_cases
from tools.sweep.torchvision_models import torchvision_cases

SUITES = ("torchvision", "timm", "all", "quick")
# Plain, concatenated, squeezed, grouped, shuffled and permuted networks, segmentation, clips, flow and boxes.
QUICK = (
    "resnet18",
    "squeezenet1_1",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "regnet_x_400mf",
    "shufflenet_v2_x0_5",
    "convnext_tiny",
    "quantized_resnet18",
    "lraspp_mobilenet_v3_large",
    "mc3_18",
    "raft_small",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)


def find_cases(suite: str, only: Iterable[str] = ()) -> list[Case]:
    """The cases of a suite whose names match one of the shell patterns `only`, where any are given."""
    cases = [] if suite == "timm" else torchvision_cases()
    cases += timm_cases() if suite in ("timm", "all") else []
    patterns = list(only)
    return [
        case
        for case in cases
        if (suite != "quick" or case.name in QUICK)
        and (not patterns or any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns))
    ]
