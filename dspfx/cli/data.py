"""What `--data` names, read and split: digits in memory, CIFAR-10, any ImageFolder.

Validation is held out of the training images; the test split stays unread until it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, ImageFolder
from tqdm import tqdm

from dspfx.cli.images import FileSplit, Look, MemorySplit, Split, read_image
from dspfx.errors import ConfigError, StorageError

HELP = (
    "digits (scikit-learn's, at 32x32), cifar10:DIR (the published python version or an ImageFolder), or an "
    "ImageFolder: DIR/train/CLASS/* with DIR/test or DIR/val, or DIR/CLASS/* (a fifth becomes the test split). "
    "With both val and test, val is the validation split; with val alone, val is the test split"
)
SMALL_SIZE, SMALL_BYTES = 64, 4 << 30  # up to here images are decoded once and kept in memory


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are split and presented; `image_size` None means as they are if small."""

    spec: str
    image_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    limit_train: int | None
    val_fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"--val-fraction is {self.val_fraction}; give a share of the training images in (0, 1).")
        if self.limit_train is not None and self.limit_train < 2:
            raise ConfigError(f"--limit-train is {self.limit_train}; give at least 2 images.")


@dataclass(frozen=True)
class Data:
    """The splits of a data set; `test()` reads the test images, to be called once, at the end."""

    classes: tuple[str, ...]
    image_size: int
    train: Split
    val: Split
    test: Callable[[], Split]


@dataclass(frozen=True)
class Source:
    """Labels [N] with their images: uint8 [N, 3, H, W], or the paths of files not read yet."""

    images: Tensor | tuple[str, ...]
    labels: Tensor

    def take(self, indices: Tensor) -> Source:
        """The chosen images, in the order of `indices`."""
        if isinstance(self.images, Tensor):
            return Source(self.images[indices], self.labels[indices])
        return Source(tuple(self.images[i] for i in indices.tolist()), self.labels[indices])


@dataclass(frozen=True)
class Sources:
    """What was found: training, test and (where the user made one) validation images."""

    classes: tuple[str, ...]
    train: Source
    test: Source
    val: Source | None = None
    mirrored: bool = True  # a mirrored image still shows its class


def load_data(config: DataConfig, default_size: int, device: torch.device, workers: int) -> Data:
    """Reads and splits what `config.spec` names; `default_size` is the network's, for images that are not small.

    Raises ConfigError for a spec nobody knows, StorageError that names the folder or image that cannot be read.
    """
    found = _find(config.spec)
    train, val = found.train, found.val
    if config.limit_train is not None and config.limit_train < len(train.labels):
        _, kept = stratified(train.labels, config.limit_train / len(train.labels), config.seed)
        train = train.take(kept)
    if val is None:
        rest, held = stratified(train.labels, config.val_fraction, config.seed)
        train, val = train.take(rest), train.take(held)
    size = config.image_size or _common_size(train) or default_size
    look = Look(size, config.mean, config.std, config.flip and found.mirrored, device, workers)
    return Data(
        found.classes,
        size,
        _open(train, look, "train"),
        _open(val, look, "val"),
        lambda: _open(found.test, look, "test"),
    )


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffled indices (rest, held): of each class about `fraction`, and at least one, is held; seeded.

    Raises ConfigError for a class with a single image, of which nothing can be held out.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels[order] == label).nonzero().flatten()
        if len(members) < 2:
            raise ConfigError(
                f"Class {label} (from 0, in alphabetical order) has a single image; at least 2 are needed for a split."
            )
        held[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return order[~held], order[held]


def _find(spec: str) -> Sources:
    if spec == "digits":
        return _digits()
    is_cifar = spec.startswith("cifar10:")
    root = Path(spec.removeprefix("cifar10:")).expanduser()
    if not root.is_dir():
        raise ConfigError(f"--data {spec!r}: {root} is not a folder; give one of {HELP}.")
    if is_cifar and (root / CIFAR10.base_folder).is_dir():
        return _cifar10(root)
    return _image_folder(root)


def _digits() -> Sources:
    """1,797 grey digits of 8x8, enlarged to [N, 3, 32, 32]; a fifth is the test split, the same one in every run."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("--data digits needs scikit-learn; install it with: pip install 'dspfx[data]'.") from error
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float().div(16)[:, None]
    images = F.interpolate(grey, size=(32, 32), mode="bilinear").clamp(0, 1).mul(255).round().to(torch.uint8)
    whole = Source(images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target).long())
    rest, held = stratified(whole.labels, 0.2, seed=0)
    return Sources(tuple("0123456789"), whole.take(rest), whole.take(held), mirrored=False)


def _cifar10(root: Path) -> Sources:
    parts = []
    for is_train in (True, False):
        try:
            part = CIFAR10(str(root), train=is_train)  # refuses files whose checksum is not the published one
        except RuntimeError as error:
            raise StorageError(f"{root / CIFAR10.base_folder} is damaged or incomplete; extract it again.") from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Source(images, torch.tensor(part.targets)))
    return Sources(tuple(part.classes), train=parts[0], test=parts[1])


def _image_folder(root: Path) -> Sources:
    if not (root / "train").is_dir():
        classes, whole = _list_folder(root)
        rest, held = stratified(whole.labels, 0.2, seed=0)
        return Sources(classes, whole.take(rest), whole.take(held))
    classes, train = _list_folder(root / "train")
    names = [name for name in ("test", "val") if (root / name).is_dir()]
    if not names:
        raise StorageError(f"{root} has a train folder but neither test nor val; add one, or give {root / 'train'}.")
    others: list[Source] = []
    for name in names:
        found, source = _list_folder(root / name)
        if found != classes:
            odd = sorted(set(found) ^ set(classes))[0]
            raise StorageError(f"{root / 'train'} and {root / name} differ in class folder {odd!r}; make them equal.")
        others.append(source)
    return Sources(classes, train, test=others[0], val=others[1] if len(others) == 2 else None)


def _list_folder(folder: Path) -> tuple[tuple[str, ...], Source]:
    try:
        found = ImageFolder(str(folder))
    except (FileNotFoundError, OSError) as error:
        raise StorageError(
            f"{folder} is not an ImageFolder ({str(error).splitlines()[0]}); it must hold one folder a class, each "
            "with at least one image."
        ) from error
    paths, labels = zip(*found.samples, strict=True)
    return tuple(found.classes), Source(tuple(paths), torch.tensor(labels))


def _common_size(source: Source) -> int | None:
    """The side of the images where they are square, all alike and small (a sample of files is looked at)."""
    if isinstance(source.images, Tensor):
        return source.images.shape[-1]
    sample = source.images[:: max(1, len(source.images) // 64)]
    sizes = {read_image(path).size for path in sample}
    width, height = next(iter(sizes))
    return width if len(sizes) == 1 and width == height <= SMALL_SIZE else None


def _open(source: Source, look: Look, title: str) -> Split:
    if isinstance(source.images, Tensor):
        if source.images.shape[-1] == look.size:
            return MemorySplit(source.images, source.labels, look)
        resized = F.interpolate(source.images.float(), size=(look.size,) * 2, mode="bilinear", antialias=True)
        return MemorySplit(resized.round().clamp(0, 255).to(torch.uint8), source.labels, look)
    if look.size > SMALL_SIZE or len(source.images) * 3 * look.size**2 > SMALL_BYTES:
        return FileSplit(source.images, source.labels, look)
    return MemorySplit(_decode(source.images, look.size, title), source.labels, look)


def _decode(paths: Sequence[str], size: int, title: str) -> Tensor:
    """uint8 [N, 3, size, size]; images of another size are resized."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    bar = tqdm(paths, desc=f"reading {title}", unit=" images", disable=not sys.stderr.isatty(), leave=False)
    for index, path in enumerate(bar):
        image = read_image(path)
        images[index] = np.asarray(
            image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
