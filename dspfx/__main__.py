"""`python -m dspfx COMMAND`: one clean line for a mistake and exit code 2; 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dspfx.cli import benchmark, compress, estimate, export, profile, verify
from dspfx.errors import DspfxError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    parser = argparse.ArgumentParser(prog="dspfx", description="Makes convolutional networks smaller and faster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (compress, profile, benchmark, estimate, export, verify):
        command.register(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except DspfxError as error:
        print(f"dspfx {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ndspfx {args.command}: interrupted; {args.interrupted}.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
