"""What the processes of a sweep do; imported once, in the server that they are forked from."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from dspfx.deploy.machine import describe_machine
from tools.sweep.catalogue import find_cases
from tools.sweep.check import check
from tools.sweep.peer import check_peer

CHECKS = {"dspfx": check, "peer": check_peer}
LIBRARIES = {"dspfx": {"torchvision": "torchvision", "timm": "timm"}, "peer": {"torchvision": "torch-pruning"}}


def work(suite: str, name: str, which: str) -> dict[str, Any]:
    """The row of one model, with what the page tells of the model and of the machine."""
    torch.set_num_threads(1)
    (case,) = find_cases(suite, [name])
    library = LIBRARIES[which][suite]
    machine = f"{describe_machine(torch.device('cpu'), 1)}, {library} {metadata.version(library)}"
    return {"kind": case.kind, "size": case.size, "note": case.note, "on": machine, **CHECKS[which](case)}
