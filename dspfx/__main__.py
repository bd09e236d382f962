"""`python -m dspfx COMMAND`: one clean line for a mistake and exit code 2; 130 after Ctrl-C, 143 after SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dspfx import ranks
from dspfx.cli import benchmark, compress, estimate, export, pages, profile, sizes, verify
from dspfx.errors import DspfxError

EPILOG = """\
one network from beginning to end:
  dspfx estimate resnet50 --runtime onnxruntime                         is it worth it here? two minutes
  dspfx compress --model resnet50 --data DIR --out runs/r50 --dry-run   what would be pruned, how long it would take
  dspfx compress --model resnet50 --data DIR --out runs/r50             train, prune, lower; begun again, it goes on
  dspfx benchmark resnet50 runs/r50/network.safetensors --runtime onnxruntime
  dspfx export runs/r50/network.safetensors --to onnx                   each file is compared with PyTorch

exit codes: 0 done, 2 a mistake that the last line explains, 130 interrupted, 143 terminated"""


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt it passes through `except Exception`."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="dspfx",
        description="Makes convolutional networks smaller and faster.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (compress, profile, sizes, benchmark, estimate, export, verify, pages):
        command.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    args = make_parser().parse_args(argv)
    try:
        with _sigterm_raises():
            args.run(args)
    except DspfxError as error:
        if not str(error).startswith(ranks.ELSEWHERE):  # who met it says so
            print(f"dspfx {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ndspfx {args.command}: interrupted; {args.interrupted}.", file=sys.stderr)
        return 130
    except Terminated:
        print(f"\ndspfx {args.command}: terminated; {args.interrupted}.", file=sys.stderr)
        return 143
    return 0


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Terminated, so that files half-written are cleaned up; outside the main thread nothing changes."""

    def terminate(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first one is being obeyed
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


if __name__ == "__main__":
    sys.exit(main())
