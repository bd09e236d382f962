"""Machine-readable records of measurements: what they were made on, and the option that says where they go."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision

import dspfx
from dspfx.cli.checkpoints import write_text
from dspfx.deploy.machine import processor
from dspfx.errors import StorageError


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Processor, device, cores, threads and system."""
    return {
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of Python, dspfx and what it computes with."""
    return {
        "python": platform.python_version(),
        "dspfx": dspfx.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def add_argument(parser: argparse._ActionsContainer) -> None:
    """Declares --json."""
    parser.add_argument("--json", metavar="FILE", help="write a complete record; - prints it, and nothing else")


def check_target(target: str | None) -> None:
    """Raises StorageError where `write` could not write."""
    if target is None or target == "-":
        return
    path = Path(target)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise StorageError(f"--json {target} cannot be written; give a file in a folder that exists, or - to print.")


def write(target: str | None, content: dict[str, Any]) -> None:
    """Writes JSON to the file, prints it for "-", does nothing for None."""
    text = json.dumps(content, indent=1)
    if target == "-":
        print(text)
    elif target is not None:
        write_text(Path(target), text)
