"""`python -m dspfx profile`: FLOPs and parameters per layer."""

from __future__ import annotations

import argparse


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `profile` to the command line."""
