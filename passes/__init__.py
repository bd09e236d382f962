"""One graph transformation a file; every pass is a function `GraphModule -> GraphModule`. Imported as dspfx.passes."""

if __name__ != "dspfx.passes":
    # From the repository's root this folder is also found as `passes`; a second copy of every pass would follow.
    raise ImportError(f"this package was imported as {__name__!r}; its name is dspfx.passes: import dspfx.passes")
