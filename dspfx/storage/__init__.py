"""Networks on disk: one safetensors file with a JSON header, read without running anything that it holds."""

from dspfx.storage.files import load, save

__all__ = ["load", "save"]
