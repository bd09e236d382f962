"""What a time was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def block_width() -> int:
    """Channels that the processor's vectors hold: convolutions compute whole blocks of them (8 or 16)."""
    return 16 if "avx512" in torch.backends.cpu.get_cpu_capability().lower() else 8


def block_widths(runtime: str) -> tuple[int, ...]:
    """Channels that a runtime computes together; of TensorRT those of its fp16 and of its int8 kernels."""
    return (8, 32) if runtime == "tensorrt" else (block_width(),)


def describe_machine(device: torch.device, threads: int) -> str:
    """Device, threads, system and torch, in one line."""
    cpu = f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
    name = f"{torch.cuda.get_device_name(device)} ({cpu})" if device.type == "cuda" else cpu
    return f"{name}, {platform.system()} {platform.machine()}, torch {torch.__version__}"
