"""`python tools/profile_flops.py ...` is `python -m dspfx profile ...`."""

import sys

from dspfx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
