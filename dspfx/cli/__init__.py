"""The command line: `python -m dspfx compress | profile`, built on the public names of dspfx only."""
