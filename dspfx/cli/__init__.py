"""The command line, `python -m dspfx COMMAND`: each command is a thin caller of the library."""
