"""The command: runs what has no row yet, and writes the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.sweep.catalogue import SUITES, find_cases
from tools.sweep.page import page
from tools.sweep.run import Results, run_cases

COMMAND = "python tools/coverage_table.py"


def main(arguments: list[str] | None = None) -> int:
    """0 also where models fail: that is what the page tells. 2 where nothing matches."""
    options = _parser().parse_args(arguments)
    cases = find_cases(options.suite if not options.peer else "torchvision", options.only)
    if not cases:
        print(f"no model of suite {options.suite} matches {' '.join(options.only)}", file=sys.stderr)
        return 2
    path = options.folder / ("coverage_peer.jsonl" if options.peer else "coverage.jsonl")
    results = Results.read(path)
    todo = cases if options.again else [case for case in cases if (case.suite, case.name) not in results.rows]
    if not options.page_only:
        check = "peer" if options.peer else "dspfx"
        run_cases(todo, results, check, options.jobs, options.limit, options.memory)
        everything = find_cases("all")
        results.tidy([(case.suite, case.name) for case in everything])
    rows = Results.read(options.folder / "coverage.jsonl").rows
    peer = Results.read(options.folder / "coverage_peer.jsonl").rows
    options.page.write_text(page(find_cases("all"), rows, peer, COMMAND))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coverage_table.py",
        description="Runs every torchvision model and one of each of timm's files (extra `zoo`) through dspfx, each in "
        "a process of its own, and writes docs/coverage.md. Models that have a row already are skipped.",
    )
    parser.add_argument("--suite", choices=SUITES, default="all")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="names, or shell patterns of names")
    parser.add_argument("--again", action="store_true", help="run models that have a row already, too")
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning instead (extra `peers`)")
    parser.add_argument("--page-only", action="store_true", help="run nothing; write the page from the rows there are")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, each on one thread")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="of one model")
    parser.add_argument("--memory", type=float, default=16, metavar="GIB", help="of one model")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"), help="of the rows")
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"))
    return parser
