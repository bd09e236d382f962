"""`python tools/compress.py ...` is `python -m dspfx compress ...`."""

import sys

from dspfx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["compress", *sys.argv[1:]]))
