"""`python tools/verify.py ...` is `python -m dspfx verify ...`."""

import sys

from dspfx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
