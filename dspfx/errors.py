"""Every error a user can cause is a `DspfxError` that names the place, the two values that disagree and the remedy."""


class DspfxError(Exception):
    """Base of everything dspfx raises on purpose; anything else that escapes is a bug of dspfx."""


class TraceError(DspfxError):
    """The model cannot be written as a graph; the message names the module and the line that stopped it."""


class InputError(DspfxError):
    """Example inputs are missing, have the wrong shape, or sit on another device than the model."""


class ConfigError(DspfxError):
    """A setting is outside its range, or two settings contradict each other."""


class BudgetError(DspfxError):
    """A budget is out of (0, 1] or below the floor that this network can reach."""


class ModelError(DspfxError):
    """The model is not in the state that the call needs (not prepared, still gated, NaN weights, nothing to do)."""


class MismatchError(DspfxError):
    """Two things that must describe one network do not: plan and model, optimizer and model, masked and lowered."""


class StorageError(DspfxError):
    """A file is missing, truncated, of a newer version, or belongs to another model."""


class RuntimeBuildError(DspfxError):
    """A runtime, or the export on the way to it, rejects the network; the message's last line says why."""
