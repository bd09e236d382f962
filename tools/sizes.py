"""`python tools/sizes.py ...` is `python -m dspfx sizes ...`."""

import sys

from dspfx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sizes", *sys.argv[1:]]))
