"""Other people's compilers: kept quiet, limited in threads, and their failures told in one line."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch

_WHERE = ("Exception from ", "Check '", "While validating ONNX node")  # lines that say where in OpenVINO, not what


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed, logged or warned of inside: exporters tell of their progress, and repeat what they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch computes with this many CPU threads inside."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reason(error: BaseException) -> str:
    """What went wrong, in one line: of the first cause, the first line that says more than a place."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(_WHERE)]
    return f"{type(error).__name__}: {(told or lines or ['no message'])[0]}"
