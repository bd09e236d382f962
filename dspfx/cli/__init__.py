"""The command line: `python -m dspfx compress | profile | benchmark`, thin callers of the library."""
