"""`python tools/coverage_table.py` runs every model of the catalogue through dspfx and writes docs/coverage.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.sweep, from wherever this is started

from tools.sweep.main import main

if __name__ == "__main__":
    sys.exit(main())
