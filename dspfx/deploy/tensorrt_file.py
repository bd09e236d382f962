"""An engine in a file that says what it was built for: 8 bytes, the length of its JSON (4 bytes), JSON, the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from dspfx.errors import ConfigError, MismatchError, StorageError

MAGIC = b"dspfxTRT"
SUFFIXES = (".engine", ".plan")


def write_engine(path: Path, engine: bytes, metadata: Mapping[str, str]) -> None:
    """Writes the file; not atomically, see `staged`."""
    text = json.dumps(dict(metadata)).encode()
    path.write_bytes(MAGIC + len(text).to_bytes(4, "little") + text + engine)


def read_engine(path: Path) -> tuple[dict[str, str], bytes]:
    """(what the file says of itself, the engine as TensorRT's own tools take it).

    Raises StorageError where it is missing, truncated, or was not written by `build_tensorrt`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error}); give a file of dspfx.build_tensorrt.") from error
    start = len(MAGIC) + 4
    length = int.from_bytes(content[len(MAGIC) : start], "little")
    if not content.startswith(MAGIC) or len(content) <= start + length:
        raise StorageError(
            f"{path} is no engine of dspfx.build_tensorrt, or a part of one; a bare engine says nothing of the GPU and "
            f"the version that it needs. Build it again from its ONNX file."
        )
    try:
        metadata = json.loads(content[start : start + length])
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}; build it again.") from error
    return {str(key): str(value) for key, value in metadata.items()}, content[start + length :]


def check_gpu(what: str) -> None:
    """ConfigError where PyTorch sees no CUDA device."""
    if _gpu() is None:
        raise ConfigError(f"{what} needs an NVIDIA GPU, and PyTorch sees none (torch.cuda.is_available() is False).")


def this_machine(version: str) -> dict[str, str]:
    """What an engine depends on: TensorRT's version, the GPU and what it can do."""
    name, capability = _gpu() or ("none", "none")
    return {"tensorrt.version": version, "gpu.name": name, "gpu.capability": capability}


def _gpu() -> tuple[str, str] | None:
    """The current GPU's name and its compute capability, "9.0"."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


def check_machine(path: Path, metadata: Mapping[str, str], here: Mapping[str, str]) -> None:
    """MismatchError unless the engine was built by this version of TensorRT for this GPU."""
    for key, value in here.items():
        if metadata.get(key) != value:
            raise MismatchError(
                f"{path} was built where {key} is {metadata.get(key, 'not known')!r}, and here it is {value!r}; an "
                f"engine runs on the GPU and the version it was built on: build it here from the same ONNX file, "
                f'dspfx.build_tensorrt("network.onnx", {str(path)!r}).'
            )
