"""Command lines that repeat what was done, made from the settings of a run."""

from __future__ import annotations

from typing import Any

from dspfx.cli.arguments import DEFAULTS
from dspfx.cli.forks import AFTERWARDS
from dspfx.cli.options import FULL, QUICK

SHOWN = ("model", "data", "budget")  # even where they are the default


def compress(arguments: dict[str, Any], device: str, threads: int, processes: int = 1) -> list[str]:
    """The words of a `compress` with `Settings.flat()` and no --out: what differs from this version's defaults.

    All processes have that device and that many CPU threads.
    """
    start = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    words = [*start, "-m", "dspfx", "compress"]
    arguments = arguments | {name: value for name, value in DEFAULTS.items() if name not in arguments}  # of old runs
    usual = _usual(arguments)
    for name, value in arguments.items():
        value = list(value) if isinstance(value, tuple) else value
        usual_value = list(usual[name]) if isinstance(usual.get(name), tuple) else usual.get(name)
        if name in SHOWN or value != usual_value:
            words += _option(name, value)
    return [*words, "--device", device, "--threads", str(threads)]


def _usual(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `read_settings` takes where nothing is given, beside these arguments; of a fork, only what says nothing."""
    if arguments.get("fork") is not None:
        inherited = {name: value for name, value in arguments.items() if name not in AFTERWARDS}
        switches = dict.fromkeys(("one_shot", "dense_control"), False)
        return inherited | switches | ({"epochs_tune": 0, "epochs_unify": 0} if arguments["one_shot"] else {})
    usual = DEFAULTS | (QUICK if arguments["data"] == "digits" else FULL)
    if arguments["checkpoint"] is not None:
        usual["epochs_dense"] = 0
    if arguments["one_shot"]:
        usual |= {"epochs_learn": 0, "epochs_tune": 0, "epochs_unify": 0}
    if not arguments["unify"] + arguments["prune_blocks"]:
        usual["epochs_unify"] = 0
    return usual


def _option(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [option] if value else [f"--no-{option[2:]}"]
    return [option, *map(str, value)] if isinstance(value, list) else [option, str(value)]
