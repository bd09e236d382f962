"""Networks on disk: safetensors files with a JSON header, read without running anything that they hold."""

from dspfx.storage.compressed import read_compressed, write_compressed
from dspfx.storage.files import load, save

__all__ = ["load", "read_compressed", "save", "write_compressed"]
