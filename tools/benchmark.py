"""`python tools/benchmark.py ...` is `python -m dspfx benchmark ...`."""

import sys

from dspfx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
