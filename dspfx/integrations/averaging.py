"""Averages of networks (EMA, SWA) beside a prepared one: timm's ModelEmaV2 and V3, torch's AveragedModel, a deep copy.

ema = ModelEmaV3(gm)                 a deep copy, made before training as usual
dspfx.prune(gm, budget)              the copy knows nothing of it, and its weights fade only slowly
follow(ema, gm)                      now what is pruned is zero there, too, and stays zero: averages of zeros
small = dspfx.lower(ema.module)
"""

from __future__ import annotations

import torch
from torch import nn

from dspfx.errors import MismatchError
from dspfx.integrations.find import find_prepared
from dspfx.modules import GatedLayer
from dspfx.passes.apply_masks import mask_by_gates


def follow(average: nn.Module, network: nn.Module) -> None:
    """Afterwards `average` is pruned exactly as `network` is, in place; what remains keeps its averaged values.

    Call it after `dspfx.prune(network, ...)`, and again before the average is lowered or saved: averages that treat
    all tensors alike (ModelEmaV2, AveragedModel(use_buffers=True)) round the whole numbers of the gates. Twice is
    once. Both may be the networks themselves or hold one each (`ema`, `ema.module`, a compiled or a DDP module).

    Raises:
        ModelError, ConfigError: one of them holds no prepared network, or several.
        MismatchError: they are not prepared alike; nothing was changed.
    """
    copy, original = find_prepared(average), find_prepared(network)
    gates = {name: m for name, m in copy.named_modules() if isinstance(m, GatedLayer)}
    source = {name: m for name, m in original.named_modules() if isinstance(m, GatedLayer)}
    for name in sorted(gates.keys() | source.keys()):
        found, wanted = _describe(gates.get(name)), _describe(source.get(name))
        if found != wanted:
            raise MismatchError(
                f"The gate of {name} has {found} in the average and {wanted} in the network; average a copy of the "
                "prepared network itself."
            )
    with torch.no_grad():
        for name, gate in gates.items():
            gate.gate_group.copy_(source[name].gate_group)
            gate.gate_keep.copy_(source[name].gate_keep)
    mask_by_gates(copy)


def _describe(gate: GatedLayer | None) -> str:
    return f"{gate.gate_groups} groups, {gate.filters} x {gate.channels}" if gate else "no groups"
