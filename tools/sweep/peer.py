"""Torch-Pruning on the same models, and whether what it leaves computes the same as the network it was taken from.

Half of the channels of every layer are removed, as in the peer's own torchvision example and with the layers that it
leaves alone there. The reference is the original model in float64 with those very channels zeroed where they are made
(weights, biases and the norms behind them). Batch norms are alive: random scales and shifts, statistics of random
inputs. Needs the extra `peers`.
"""

from __future__ import annotations

import copy
import importlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torchvision.models import VisionTransformer

from dspfx.config import Inputs
from tools.sweep.cases import Case
from tools.sweep.peer_record import BATCH_NORM, Removal

RATIO = 0.5
TOLERANCE = 1e-9
VERDICTS = ("right", "right but for norms", "differs", "fails")
# A detector's graph depends on what it detects while it is traced: the peer gets the attempt that serves it best.
ATTEMPTS = ("alive", "one image", "as initialised")
Row = dict[str, Any]


def check_peer(case: Case) -> Row:
    """The row of a model: verdict "right", "right but for norms", "differs" or "fails", and the reason.

    "Right but for norms" is equal once the reference's norms and attention count the channels left as well.
    """
    start = time.perf_counter()
    rows = []
    for attempt in ATTEMPTS if case.kind == "detection" else ATTEMPTS[:1]:
        rows.append(_attempt(case, attempt))
        if rows[-1]["verdict"] in VERDICTS[:2]:
            break
    row = min(rows, key=lambda row: VERDICTS.index(row["verdict"]))
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _attempt(case: Case, attempt: str) -> Row:
    row: Row = {"verdict": "fails", "attempt": attempt}
    try:
        with _Double():
            _fill(row, case, attempt)
    except Exception as error:
        text = str(error).strip().splitlines()
        row["reason"] = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        frames = traceback.extract_tb(error.__traceback__)
        frame = [f for f in frames if f.filename != __file__ or f is frames[0]][-1]
        row["place"] = f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"
    return row


class _Double(TorchFunctionMode):
    """RAFT asks for float32 in the middle of its forward pass; here it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **(kwargs or {}))


def _fill(row: Row, case: Case, attempt: str) -> None:
    model = case.build().double().eval()
    inputs = _as_double(case.inputs())
    if attempt != "as initialised":
        awaken(model, inputs, case.targets)
    inputs = inputs[:1] if attempt == "one image" else inputs
    dense = copy.deepcopy(model)
    row["stage"] = "pruning"
    removal = prune(model, dense, inputs, case)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, model))
    row["params_left"] = after / before
    row["stage"] = "forward"
    found = _heads(model, inputs)
    row |= _compare(removal, dense, found, inputs)
    row["stage"] = "done"


def awaken(model: nn.Module, inputs: Any, targets: Any) -> None:
    """Random scales and shifts for batch norms, and the statistics of random inputs; eval mode afterwards."""
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.25, 1.0)
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    model.train()
    with torch.no_grad():
        for _ in range(2 if norms else 0):
            given = Inputs.of(_noise(inputs))
            model(*given.args, *((targets(),) if targets else ()), **given.kwargs)
    model.eval()


def prune(model: nn.Module, dense: nn.Module, inputs: Any, case: Case) -> Removal:
    """Prunes `model` in place as the peer's user would, and returns what was removed."""
    tp: Any = importlib.import_module("torch_pruning")
    names = {id(module): name for name, module in model.named_modules()}
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs=inputs,
        forward_fn=lambda network, given: network(*Inputs.of(given).args, **Inputs.of(given).kwargs),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        global_pruning=False,
        pruning_ratio=RATIO,
        ignored_layers=ignored(model, case),
        out_channel_groups=heads,
    )
    removal = Removal(dense)
    for group in pruner.step(interactive=True):
        for dep, indices in group:
            target = dep.target.module
            name = pruner.DG._param_to_name[target] if isinstance(target, nn.Parameter) else names.get(id(target))
            if name is not None:  # concatenations, splits and outputs are no layers
                plain = [getattr(i, "idx", i) for i in indices]
                is_input = dep.handler.__name__ == "prune_in_channels"
                removal.note(name, is_input, plain, dep.target.pruning_dim)
        group.prune()
    if isinstance(model, VisionTransformer):  # it checks a width that its user has to correct
        model.hidden_dim = model.conv_proj.out_channels
    wrong = removal.explains(model, dict(dense.state_dict()))
    assert not wrong, f"the record of what was removed does not explain {wrong}"
    return removal


def ignored(model: nn.Module, case: Case) -> list[nn.Module]:
    """The layers that make the outputs, and in detectors and flow those that the peer's example leaves alone too."""
    last = [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) == case.classes]
    if case.kind not in ("detection", "optical flow"):
        return [m for m in last if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    names = {
        "faster": "rpn.head.cls_logits rpn.head.bbox_pred backbone.fpn roi_heads",
        "keypoint": "rpn.head.cls_logits rpn.head.bbox_pred backbone.fpn.layer_blocks roi_heads.box_head "
        "roi_heads.box_predictor roi_heads.keypoint_predictor",
        "mask": "rpn.head.cls_logits rpn.head.bbox_pred roi_heads.box_predictor roi_heads.mask_predictor",
        "fcos": "head.classification_head.cls_logits head.regression_head.bbox_reg head.regression_head.bbox_ctrness",
        "retinanet": "head.classification_head.cls_logits head.regression_head.bbox_reg",
        "ssd": "head",
        "raft": "corr_block update_block mask_predictor",
    }
    (found,) = [paths for prefix, paths in names.items() if case.name.startswith(prefix)]
    return [module for path in found.split() if isinstance(module := getattr_path(model, path), nn.Module)]


def getattr_path(model: nn.Module, path: str) -> Any:
    """The module at a dotted path, None where there is none (raft_small has no mask predictor)."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _compare(removal: Removal, dense: nn.Module, found: list[Tensor], inputs: Any) -> Row:
    """The verdict on the pruned network's outputs against the dense one's with the removed channels silent."""
    response = _distance(_heads(dense, inputs), _heads(dense, _noise(inputs)))
    removal.silence()
    expected = _heads(dense, inputs)
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (expected, found)]
    if shapes[0] != shapes[1]:
        changed = next((a, b) for a, b in zip(*shapes, strict=True) if a != b)
        return {"verdict": "differs", "reason": f"an output of shape {changed[0]} became {changed[1]}"}
    error = _distance(expected, found)
    row: Row = {"error": error, "response": response, "verdict": "right" if error <= TOLERANCE else "differs"}
    if error > TOLERANCE and any(
        isinstance(m, nn.LayerNorm | nn.GroupNorm | nn.MultiheadAttention) for m in dense.modules()
    ):
        removal.silence(as_pruned=True)
        row["error_as_pruned"] = _distance(_heads(dense, inputs), found)
        if row["error_as_pruned"] <= TOLERANCE:
            row["verdict"] = "right but for norms"
    return row


def _heads(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs; of a detector those of its dense heads, since what follows them sorts, cuts off and suppresses."""
    head: Any = getattr(getattr(model, "rpn", model), "head", None) if isinstance(inputs, list) else None
    caught: list[Any] = []
    hook = head.register_forward_hook(lambda _, __, out: caught.append(out)) if head is not None else None
    given = Inputs.of(inputs)
    with torch.no_grad():
        output = model(*given.args, **given.kwargs)
    if hook is not None:
        hook.remove()
    leaves = pytree.tree_leaves(caught if hook is not None else output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def _distance(expected: list[Tensor], found: list[Tensor]) -> float:
    pairs = zip(expected, found, strict=True)
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in pairs)


def _as_double(inputs: Any) -> Any:
    return _mapped(inputs, lambda x: x.double() if x.is_floating_point() else x)


def _noise(inputs: Any) -> Any:
    return _mapped(inputs, torch.rand_like)


def _mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Inputs):
        return Inputs(*_mapped(inputs.args, change), **_mapped(inputs.kwargs, change))
    return pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, inputs)
