"""`python tools/export.py ...` is `python -m dspfx export ...`."""

import sys

from dspfx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
