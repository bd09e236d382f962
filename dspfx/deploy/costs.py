"""How long a layer takes in each of its forms, measured once on a machine and remembered in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from platformdirs import user_cache_path
from tqdm import tqdm

from dspfx.deploy.engines import OpenVino, start_onnxruntime
from dspfx.deploy.layer_onnx import write_layer
from dspfx.deploy.machine import describe_machine
from dspfx.deploy.quiet import quiet, torch_threads
from dspfx.deploy.runtimes import describe_runtime, find_runtime
from dspfx.deploy.timing import complete, time_alone
from dspfx.forms import FormCase, build_form

STORE_EVERY = 50  # layers: what is measured shall not be lost with a long run
FORMAT = 1  # of the files, and of how their values are measured
# Inductor compiles for seconds what it then runs with the kernels of eager mode, so eager's times stand for its own.
# TensorRT takes as long for an engine a layer: eager's times on its GPU choose what is worth building, and in the end
# whole engines are compared.
MEASURED_IN = {"inductor": "eager", "tensorrt": "eager", "onnxruntime-native": "onnxruntime"}


class CostTable:
    """Milliseconds of a call of a layer, by `FormCase`: `table(case)` looks up, or measures.

    with CostTable("onnxruntime", threads=1) as table:
        table(case)

    Every runtime, version, device, data type and number of threads has a file of its own in the cache folder, which is
    written when the `with` ends, and now and then before. A file that cannot be read is made anew; one that cannot be
    written costs only time.
    """

    def __init__(
        self,
        runtime: str,
        device: torch.device | str = "cpu",
        threads: int = 1,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
    ) -> None:
        find_runtime(runtime)
        self.runtime = MEASURED_IN.get(runtime, runtime)
        self.device, self.threads = torch.device(device), threads
        self.dtype = dtype if self.runtime == "eager" else torch.float32  # exported layers are measured in float32
        machine = describe_machine(self.device, threads)
        self.setting = f"{describe_runtime(self.runtime)}, {str(self.dtype).removeprefix('torch.')}, {machine}"
        name = hashlib.sha256(self.setting.encode()).hexdigest()[:16]
        self.path = (folder or user_cache_path("dspfx", appauthor=False)) / f"costs-{self.runtime}-{name}.json"
        self.times = _read(self.path, self.setting)
        self._stored = len(self.times)
        self._bar: Any = None  # on a terminal, once there is something to measure

    def __call__(self, case: FormCase) -> float:
        if case.key not in self.times:
            if self._bar is None:
                self._bar = tqdm(desc=f"timing layers on {self.runtime}", disable=None, leave=False)
            self.times[case.key] = self._measure(case)
            self._bar.update()
            if len(self.times) >= self._stored + STORE_EVERY:
                self.store()
        return self.times[case.key]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store()
        if self._bar is not None:
            self._bar.close()

    def store(self) -> None:
        """Writes what was measured since the last time, beside what other processes have written meanwhile."""
        if len(self.times) == self._stored:
            return
        self.times = _read(self.path, self.setting) | self.times
        content = json.dumps({"format": FORMAT, "setting": self.setting, "ms": self.times}, indent=0)
        try:
            _write(self.path, content)
        except OSError as error:
            warnings.warn(
                f"the measured costs of layers could not be kept in {self.path} ({error.strerror}); they are measured "
                f"again next time. Make the folder writable, or set XDG_CACHE_HOME to one that is.",
                stacklevel=2,
            )
        self._stored = len(self.times)

    def _measure(self, case: FormCase) -> float:
        with torch_threads(self.threads), torch.inference_mode(), quiet(), torch.random.fork_rng(devices=[]):
            module = build_form(case).eval().to(self.device, self.dtype)
            if self.runtime == "eager":
                x = torch.randn(case.shape).to(self.device, self.dtype)
                return 1e3 * time_alone(complete(lambda: module(x), self.device))
            seconds = self._time_file(module, case.shape)
            if len(case.shape) == 4 and case.kind != "Linear":
                frame = f"frame|{'x'.join(map(str, case.shape))}"
                if frame not in self.times:
                    self.times[frame] = 1e3 * self._time_file(None, case.shape)
                return max(1e3 * seconds - self.times[frame], 1e-4)
            return 1e3 * seconds

    def _time_file(self, module: Any, shape: tuple[int, ...]) -> float:
        with tempfile.TemporaryDirectory(prefix="dspfx-") as folder:
            path = Path(folder) / "layer.onnx"
            outer = write_layer(module, shape, path)
            start: Any = start_onnxruntime if self.runtime == "onnxruntime" else OpenVino
            engine = start(path, ["x"], self.threads)
            array = torch.randn(outer, dtype=self.dtype).numpy()
            return time_alone(lambda: engine([array]))


def _read(path: Path, setting: str) -> dict[str, float]:
    """What a file holds; nothing where it is absent, damaged, or of another format, setting or version."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["setting"] != setting:
            return {}
        return {str(key): float(value) for key, value in content["ms"].items() if 0 < float(value) < float("inf")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {}


def _write(path: Path, content: str) -> None:
    """All of the file or nothing of it; nothing else is left beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
