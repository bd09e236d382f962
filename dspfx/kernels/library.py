"""The native kernels as a shared library, compiled once on a machine and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from platformdirs import user_cache_path

from dspfx.errors import RuntimeBuildError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "onnxruntime_op.cpp"))
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
# What torch says of the processor -> what the compiler may use of it, most first; all else is compiled portably.
FEATURES = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
PORTABLE = "portable"
GAIN = "lowered networks run on PyTorch's own kernels, which leave much of the saved work unsaved"


class Library:
    """The functions of native.cpp; onnxruntime_op.cpp, in the same file, is for ONNX Runtime to load."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = ctypes.CDLL(str(path))
        self.run = loaded.dspfx_run
        pointer, places = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)
        arrays = ctypes.POINTER(ctypes.c_void_p)
        self.run.argtypes = [
            pointer, ctypes.c_int64, pointer, pointer, arrays, arrays, places, places, ctypes.c_int64, ctypes.c_int32
        ]  # fmt: skip
        self.run.restype = None
        self.is_safe = loaded.dspfx_is_safe
        count = ctypes.c_int64
        self.is_safe.argtypes = [pointer, count, count, count, count, places, count, places, count]
        self.lanes: int = loaded.dspfx_lanes()
        self.max_filters: int = loaded.dspfx_max_filters()


def processor_features() -> str:
    """A key of FEATURES, or "portable"."""
    found = torch.backends.cpu.get_cpu_capability()
    return next((name for name in FEATURES if name in found), PORTABLE)


def can_run(features: str) -> bool:
    """Whether this processor has them."""
    order = [*FEATURES, PORTABLE]
    return order.index(features) >= order.index(processor_features())


def build_library(features: str, folder: Path | None = None, extra: tuple[str, ...] = ()) -> Path:
    """The library for a processor with these features, compiled (with extra flags) unless the cache folder has it.

    Raises RuntimeBuildError where there is no compiler (`c++`, or what the environment's CXX names), or it fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = (*FLAGS, *FEATURES.get(features, ()), *extra)
    key = hashlib.sha256(repr(([source.read_bytes() for source in SOURCES], flags, compiler)).encode()).hexdigest()[:16]
    folder = folder or user_cache_path("dspfx", appauthor=False)
    path = folder / f"native-{features.lower()}-{key}.so"
    if path.exists():
        return path
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeBuildError(
            f"the native kernels need a C++ compiler, and {' '.join(compiler) or 'CXX'!r} is not there; install one "
            f"(Debian: apt install g++), or name one in the environment variable CXX."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="native-") as scratch:
            made = Path(scratch) / path.name
            # What is preloaded into this process (a sanitizer, an allocator) is not meant for the compiler.
            own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            command = [*compiler, *flags, *map(str, SOURCES), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, env=own)
            if run.returncode:
                raise RuntimeBuildError(f"{compiler[0]} cannot compile the native kernels:\n{run.stderr.strip()}")
            os.replace(made, path)  # another process may have been as fast
    except OSError as error:
        raise RuntimeBuildError(
            f"the native kernels cannot be kept in {folder} ({error.strerror}); make the folder writable, or set "
            f"XDG_CACHE_HOME to one that is."
        ) from error
    return path


@functools.cache
def library() -> Library:
    """The library for this processor; RuntimeBuildError as for `build_library`, or where it cannot be loaded."""
    path = build_library(processor_features())
    try:
        return Library(path)
    except OSError as error:
        raise RuntimeBuildError(f"the native kernels cannot be loaded: {error}; remove {path}.") from error


@functools.cache
def library_or_none() -> Library | None:
    """The library; None where it cannot be had, with one warning that says why and what it would gain."""
    try:
        return library()
    except RuntimeBuildError as error:
        warnings.warn(f"{error} Without them {GAIN}.", stacklevel=2)
        return None
