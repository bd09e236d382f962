"""What the processes of one distributed training agree on, and the whole of what each of them holds a shard of.

Every rank runs the same calls in the same order. Nothing is pickled: texts travel as bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dspfx import errors
from dspfx.errors import DspfxError, MismatchError, ModelError

ELSEWHERE = "on rank 0: "  # how messages begin on the other ranks
LONGEST_WAIT = timedelta(hours=6)  # while rank 0 measures latencies


_is_alone = False


def count() -> int:
    """How many processes train together; 1 without torch.distributed."""
    is_joined = dist.is_available() and dist.is_initialized() and not _is_alone
    return dist.get_world_size() if is_joined else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself, as if there were no others."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started work together; without torchrun nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among them; 0 without torch.distributed."""
    return dist.get_rank() if count() > 1 else 0


def wait() -> None:
    """Until every rank is here."""
    if count() > 1:
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Makes each tensor, in place, that of rank 0."""
    for tensor in tensors if count() > 1 else ():
        dist.broadcast(tensor, 0)


def average(tensors: list[Tensor]) -> None:
    """Makes each tensor, in place, its mean over the ranks: one message for each dtype and device."""
    kinds = {(t.dtype, t.device) for t in tensors}
    for kind in sorted(kinds, key=str):
        members = [t for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat)
        flat.div_(dist.get_world_size())
        for t, mean in zip(members, flat.split([t.numel() for t in members]), strict=True):
            t.copy_(mean.view_as(t))


def check_same(tensors: Mapping[str, Tensor]) -> None:
    """Raises MismatchError on every rank, naming the first of these tensors that is not, bit for bit, the same on all.

    Any rank may hold other names or shapes than the rest, too.
    """
    own = torch.stack([_fingerprint(name, t) for name, t in tensors.items()])
    sizes = [size for (size,) in _gathered(torch.tensor([len(own)], device=own.device))]
    if len(set(sizes)) > 1:
        raise MismatchError(f"the ranks hold different networks, with {', '.join(map(str, sizes))} gated tensors.")
    rows = _gathered(own)
    for index, name in enumerate(tensors):
        others = [rank for rank, row in enumerate(rows) if row[index] != rows[0][index]]
        if others:
            raise MismatchError(
                f"{name} on rank {others[0]} differs from that on rank 0: the ranks do not train one network. Wrap it "
                "(DistributedDataParallel or fully_shard), start all ranks from the same weights, seed and settings, "
                "or, where every rank is to train a network of its own, give distributed=False."
            )


def decided_by_first(decide: Callable[[], str]) -> str:
    """What `decide()` returns on rank 0, on every rank; a DspfxError there is raised on every rank."""
    if count() == 1:
        return decide()
    kind, text, failure = "", "", None
    if dist.get_rank() == 0:
        try:
            text = decide()
        except Exception as error:  # the others wait to hear of it
            kind, text, failure = type(error).__name__, str(error), error
    kind, text = _sent(kind), _sent(text)
    if failure is not None:
        raise failure
    if kind:
        raised = getattr(errors, kind, ModelError)
        raise (raised if issubclass(raised, DspfxError) else ModelError)(f"{ELSEWHERE}{text}")
    return text


def whole(tensor: Any) -> Tensor:
    """A DTensor gathered from the ranks, which all have to call this; any other tensor as it is."""
    found: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor
    return found


def shared_like(value: Tensor, tensor: Any) -> Tensor:
    """`value`, the same on all ranks and of as many dimensions, on the device of `tensor` and sharded as it is."""
    value = value.to(tensor.device)
    if not is_shard(tensor):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh
    known = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return known.redistribute(placements=tensor.placements)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a model under fully_shard are whole, to be read; a collective call."""
    sharded: list[Any] = [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def is_shard(tensor: Tensor) -> bool:
    """True for a DTensor; asked in a way that imports nothing."""
    return hasattr(tensor, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """True where parameters are DTensors."""
    return any(is_shard(p) for p in model.parameters())


def require_whole(model: nn.Module, call: str) -> None:
    """Raises ModelError where a call needs the whole weights and the model's are sharded."""
    if is_sharded(model):
        raise ModelError(
            f"{call}: this {type(model).__name__} is sharded over the ranks. Gather its state_dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load it into a "
            "network that dspfx.prepare made of an unsharded copy, and use that one."
        )


def _fingerprint(name: str, tensor: Tensor) -> Tensor:
    """int64, from the bits of every element, its place, the shape and the name."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(f"{name} {tuple(tensor.shape)} {tensor.dtype}")) % (1 << 62)
    flat = tensor.detach().reshape(-1).contiguous()
    flat = flat.to(torch.int32) if flat.dtype == torch.bool else flat
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return (bits * places).sum() + seed


def _gathered(row: Tensor) -> list[list[int]]:
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return [r.tolist() for r in rows]


def _sent(text: str) -> str:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()
