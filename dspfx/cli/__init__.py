"""The command line: `python -m dspfx compress | profile | benchmark | estimate`, thin callers of the library."""
