"""Where a run takes place: device, threads, processes that decode images."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import torch

from dspfx.deploy.runtimes import find_runtime
from dspfx.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """Where a run takes place; may change between one start and the next."""

    device: torch.device
    workers: int

    def timed_on(self, runtime: str) -> torch.device:
        """Where networks are timed: on this device, or on the one that the runtime is for."""
        devices = find_runtime(runtime).devices
        return self.device if not devices or self.device.type in devices else torch.device(devices[0])

    def __str__(self) -> str:
        return f"device {self.device}, CPU threads: {torch.get_num_threads()}"


def set_machine(args: argparse.Namespace) -> Machine:
    """Sets the number of threads and picks the device; raises ConfigError for a device that is not there."""
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads is {args.threads}; give at least 1.")
        torch.set_num_threads(args.threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {name} cannot be used ({reason}); give cpu, or cuda where there is one."
        ) from error
    return Machine(device, args.workers)
