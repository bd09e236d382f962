"""Puts the real Python bindings of TensorRT 10 and 11, without their libraries, where the contract test looks for them.

python -m tests.deploy.tensorrt_bindings

Both majors have one package name, so each lies in a folder of its own, build/tensorrt-bindings/MAJOR; ten megabytes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "tensorrt-bindings"
WHEELS = {10: "tensorrt-cu12-bindings>=10.13,<11", 11: "tensorrt-cu13-bindings>=11.4,<12"}


def main() -> None:
    """Installs what is not there yet."""
    for major, wheel in WHEELS.items():
        target = FOLDER / str(major)
        if not (target / "tensorrt_bindings").is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), wheel]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
