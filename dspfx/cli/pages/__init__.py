"""`python -m dspfx report`: one HTML page of a finished run, which needs nothing but itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from dspfx.cli.checkpoints import write_text
from dspfx.cli.pages.page import render
from dspfx.cli.pages.run import read_run

FILE = "report.html"
DESCRIPTION = """\
Makes report.html in the folder of a finished `compress` run: one page that needs no network, with what was done to
the network, what it bought, and whether that can be trusted. compress makes it itself; this makes it anew, of older
runs too, and says there what these did not record."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `report` to the command line."""
    parser = commands.add_parser("report", help="make the page of a finished run", description=DESCRIPTION)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of a finished `compress` run")
    parser.set_defaults(run=run, interrupted="the page was not written")


def run(args: argparse.Namespace) -> None:
    """Writes the page and prints where it is; raises DspfxError."""
    print(write(args.out))


def write(out: Path) -> Path:
    """Writes report.html in the folder of a finished run, a function of its files alone, and returns where it is.

    Raises:
        ConfigError: the folder holds no finished run.
        StorageError: one of its files is damaged, or they are not of one run.
    """
    write_text(out / FILE, render(read_run(out)))
    return out / FILE
