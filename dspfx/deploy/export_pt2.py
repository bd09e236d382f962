"""A lowered network as torch.export's own format: one .pt2 file that PyTorch runs without the network's sources."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.deploy.export import announce, describe_file
from dspfx.deploy.exported import TOLERANCES, Exported, subject_of, write_and_compare
from dspfx.deploy.onnx import Nesting
from dspfx.deploy.staging import staged

METADATA = "dspfx.json"


def export_pt2(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    tolerance: float | None = None,
    verbose: bool = True,
) -> Exported:
    """Writes a lowered (or any other ungated) network with torch.export, for every batch where its graph allows that.

    The file is read again and compared with the network before it is put in its place. `torch.export.load(path)` reads
    it. What dspfx writes holds JSON and raw weights, no pickle; that function unpickles what other files hold, though,
    so nobody should call it on a file from elsewhere. What the file says of itself is its extra file "dspfx.json".

    Args:
        small: a lowered network, as for `export_onnx`.
        example_inputs: as for `export_onnx`.
        tolerance: as for `export_onnx`.
        verbose: print the result.
        path: ends in .pt2.

    Raises what `export_onnx` raises.
    """
    subject = subject_of(small, example_inputs, "fp32")
    kind = f"torch.export file on torch {torch.__version__}"
    allowed = TOLERANCES["fp32"] if tolerance is None else tolerance
    with staged(path, (".pt2",)) as part:
        programs: list[torch.export.ExportedProgram] = []

        def write(nesting: Nesting) -> None:
            programs[:] = [_program(subject.network, nesting)]
            torch.export.save(programs[0], part)

        written = write_and_compare(subject, kind, allowed, write, lambda nesting: _start(part, nesting))
        metadata = describe_file(subject, written, kind, allowed)
        torch.export.save(programs[0], part, extra_files={METADATA: json.dumps(metadata)})
    result = Exported(Path(path), kind, "fp32", written.max_error, allowed, written.batches, (), metadata)
    return announce(result, verbose)


def read_pt2_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself, nothing where dspfx did not write it; torch.export.load trusts what it reads."""
    extra = {METADATA: ""}
    torch.export.load(path, extra_files=extra)
    found: dict[str, str] = json.loads(extra[METADATA] or "{}")
    return found


def _start(path: Path, nesting: Nesting) -> Any:
    """The function that calls the file; torch.export turns a traced network's lists and dicts into immutable ones."""
    module = torch.export.load(path).module()

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves(module(*args, **kwargs))
        return pytree.tree_unflatten(leaves, nesting.out_spec)

    return call


def _program(network: nn.Module, nesting: Nesting) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    inputs = nesting.nest_inputs(nesting.tensors)
    free = {id(x): is_free for x, is_free in zip(nesting.tensors, nesting.free, strict=True)}
    dynamic = torch.export.ShapesCollection()
    for x in pytree.tree_leaves((inputs.args, inputs.kwargs)):
        if isinstance(x, Tensor) and free[id(x)]:
            dynamic[x] = {0: batch}
    with torch.no_grad():
        program = torch.export.export(network, inputs.args, inputs.kwargs, dynamic_shapes=dynamic)
    program.example_inputs = None  # they would be pickled into the file, images and all
    return program
