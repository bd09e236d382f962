"""Labelled images as batches: small ones live in memory and are augmented as tensors, large ones are read from disk.

Order and augmentation of an epoch are a function of its seed alone, so that a resumed run repeats them exactly.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dspfx.errors import StorageError

Batch = tuple[Tensor, Tensor]
Part = tuple[int, int]  # (k, n): of every batch, the k-th of each n images, for one of n processes
WHOLE: Part = (0, 1)


class Split(Protocol):
    """Images and labels that can be gone through: [B, 3, H, W] normalised float32, [B] int64, both on the device."""

    def __len__(self) -> int: ...

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        """Every image once, not augmented."""

    def epoch(self, batch_size: int, seed: int, part: Part = WHOLE) -> Iterator[Batch]:
        """Shuffled and augmented full batches; the rest of the last one is left out."""


@dataclass(frozen=True)
class Look:
    """How images are presented: target size, normalisation, mirroring, where tensors go, processes that decode."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    device: torch.device
    workers: int


def read_image(path: str) -> Image.Image:
    """The decoded RGB image; raises StorageError that names an unreadable file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise StorageError(f"Image {path} cannot be read ({error}); repair or delete it.") from error


class MemorySplit:
    """A split whose uint8 images [N, 3, H, W] sit on the device; random crops with padding 4 and mirroring."""

    PADDING = 4

    def __init__(self, images: Tensor, labels: Tensor, look: Look) -> None:
        self.images, self.labels = images.to(look.device), labels.to(look.device)
        self.flip = look.flip
        self.mean = torch.tensor(look.mean, device=look.device)[:, None, None]
        self.std = torch.tensor(look.std, device=look.device)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            if len(labels) > part[0]:
                yield self._normalise(own(images, part)), own(labels, part)

    def epoch(self, batch_size: int, seed: int, part: Part = WHOLE) -> Iterator[Batch]:
        # Drawn on the CPU whatever the device, so that every machine sees the same epoch.
        generator = torch.Generator().manual_seed(seed)
        count, device = len(self), self.images.device
        order = torch.randperm(count, generator=generator).to(device)
        shifts = torch.randint(0, 2 * self.PADDING + 1, (count, 2), generator=generator).to(device)
        mirror = (torch.rand(count, generator=generator) < 0.5).to(device) & self.flip
        for batch in full_batches(count, batch_size):
            rows = own(batch, part)
            chosen = order[rows]
            images = self._shift(self.images[chosen], shifts[rows], mirror[rows])
            yield self._normalise(images), self.labels[chosen]

    def _shift(self, images: Tensor, shifts: Tensor, mirror: Tensor) -> Tensor:
        """Crops [B, 3, H, W] out of the zero-padded images at `shifts` [B, 2], mirrored where `mirror` [B]."""
        height, width = images.shape[2:]
        device = images.device
        across = torch.arange(width, device=device).expand(len(images), width)
        across = torch.where(mirror[:, None], across.flip(1), across) + shifts[:, 1:]
        down = torch.arange(height, device=device) + shifts[:, :1]
        padded = F.pad(images, (self.PADDING,) * 4)
        which = torch.arange(len(images), device=device)
        # Left in the layout that indexing made, channels last, in which convolutions train faster.
        return padded[which[:, None, None], :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


class FileSplit:
    """A split that decodes its files in worker processes: random resized crops and mirroring; centre crops in order."""

    def __init__(self, paths: Sequence[str], labels: Tensor, look: Look) -> None:
        self.paths, self.labels, self.look = tuple(paths), labels, look

    def __len__(self) -> int:
        return len(self.paths)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        starts = range(0, len(self), batch_size)
        batches = [list(own(range(start, min(start + batch_size, len(self))), part)) for start in starts]
        return self._load(_Files(self.paths, self.labels, _centre(self.look), None), batches)

    def epoch(self, batch_size: int, seed: int, part: Part = WHOLE) -> Iterator[Batch]:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = [order[own(rows, part)] for rows in full_batches(len(self), batch_size)]
        return self._load(_Files(self.paths, self.labels, _augment(self.look), seed), batches)

    def _load(self, files: _Files, batches: list[list[int]]) -> Iterator[Batch]:
        device = self.look.device
        loader = DataLoader(
            files,
            batch_sampler=[batch for batch in batches if batch],
            num_workers=min(self.look.workers, len(files)),
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
        )
        try:
            with _signals_held():
                loaded = iter(loader)
            for images, labels in loaded:
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        except StorageError as error:
            # A worker's error arrives wrapped in its traceback; the last line is the message.
            raise StorageError(str(error).strip().splitlines()[-1].rpartition("StorageError: ")[2]) from None


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes that are started meanwhile get no signal until they ask for them; this one gets them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a job; a worker that dies of one before its parent has stopped it makes
    the parent fail with a traceback. A second SIGTERM, with which the parent ends what hangs, works."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class _Files(Dataset[Any]):
    """Decoded files; with a seed, the random choices of each image follow from it and the image's index alone."""

    def __init__(self, paths: Sequence[str], labels: Tensor, transform: v2.Compose, seed: int | None) -> None:
        self.paths, self.labels, self.transform, self.seed = paths, labels, transform, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.paths[index])
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.manual_seed(self.seed * 1_000_003 + index)
            return self.transform(image), int(self.labels[index])


def full_batches(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of `batch_size` over `count` items, the incomplete last one left out; one of all items where too few."""
    if count < batch_size:
        yield slice(0, count)
        return
    for start in range(0, count - batch_size + 1, batch_size):
        yield slice(start, start + batch_size)


def own(batch: Any, part: Part) -> Any:
    """This process's part of a batch: a sequence, a tensor of images, or a slice of consecutive indices."""
    first, each = part
    if isinstance(batch, slice):
        return slice((batch.start or 0) + first, batch.stop, each)
    return batch[first::each]


def _to_tensor(look: Look) -> list[torch.nn.Module]:
    to_float = v2.ToDtype(torch.float32, scale=True)
    return [v2.ToImage(), to_float, v2.Normalize(list(look.mean), list(look.std)), v2.ToPureTensor()]


def _centre(look: Look) -> v2.Compose:
    return v2.Compose(
        [v2.Resize(round(look.size * 8 / 7), antialias=True), v2.CenterCrop(look.size), *_to_tensor(look)]
    )


def _augment(look: Look) -> v2.Compose:
    flip = [v2.RandomHorizontalFlip()] if look.flip else []
    return v2.Compose([v2.RandomResizedCrop(look.size, antialias=True), *flip, *_to_tensor(look)])
