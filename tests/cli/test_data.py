from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dspfx.cli.data import Data, DataConfig, load_data, stratified
from dspfx.cli.images import FileSplit, MemorySplit
from dspfx.errors import ConfigError, DspfxError, StorageError

CPU = torch.device("cpu")


def configured(spec: str, **changes: object) -> DataConfig:
    settings: dict[str, object] = {
        "spec": spec,
        "image_size": None,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "flip": True,
        "limit_train": None,
        "val_fraction": 0.2,
        "seed": 0,
    }
    return DataConfig(**(settings | changes))  # type: ignore[arg-type]


def load(spec: str, **changes: object) -> Data:
    return load_data(configured(spec, **changes), default_size=96, device=CPU, workers=0)


def write_images(folder: Path, count: int, size: int = 32) -> None:
    """`count` images of each of two classes; every image has a colour of its own."""
    for label, name in enumerate(("bee", "ant")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (size, size), (100 * label, index, 7)).save(folder / name / f"{index:03}.png")


def colours(split: MemorySplit) -> set[tuple[int, ...]]:
    return {tuple(image[:, 0, 0].tolist()) for image in split.images}


def test_digits_are_split_without_overlap() -> None:
    data = load("digits")
    test = data.test()
    assert isinstance(data.train, MemorySplit)
    assert isinstance(data.val, MemorySplit)
    assert isinstance(test, MemorySplit)
    assert data.image_size == 32
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.val) + len(test) == 1797
    seen = [{image.numpy().tobytes() for image in split.images} for split in (data.train, data.val, test)]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert data.train.flip is False


def test_test_split_of_digits_does_not_depend_on_the_seed() -> None:
    first, second = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(first.test().images, second.test().images)  # type: ignore[attr-defined]
    assert not torch.equal(first.val.images, second.val.images)  # type: ignore[attr-defined]


def test_stratified_holds_the_share_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2)
    rest, held = stratified(labels, 0.1, seed=3)
    assert torch.cat([rest, held]).sort().values.tolist() == list(range(62))
    assert torch.bincount(labels[held]).tolist() == [5, 1, 1]
    assert held.tolist() != sorted(held.tolist())  # shuffled, so that its first batches are mixed


def test_train_and_test_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "test", 3)
    data = load(str(tmp_path))
    test = data.test()
    assert isinstance(data.train, MemorySplit)
    assert isinstance(data.val, MemorySplit)
    assert isinstance(test, MemorySplit)
    assert data.classes == ("ant", "bee")
    assert (len(data.train), len(data.val), len(test)) == (16, 4, 6)
    assert colours(data.train) | colours(data.val) == {(100 * label, i, 7) for label in (0, 1) for i in range(10)}
    assert torch.equal(test.labels, (test.images[:, 0, 0, 0] == 0).long())  # "bee" is black in red, and second


def test_val_alone_is_the_test_split_and_stays_unread(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "val", 4)
    data = load(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.val)) == (16, 4)
    (tmp_path / "val" / "ant" / "002.png").write_bytes(b"not an image")
    with pytest.raises(StorageError, match=re.escape(f"Image {tmp_path}/val/ant/002.png cannot be read")):
        data.test()


def test_val_and_test_folders_both_serve(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("val", 4), ("test", 3)):
        write_images(tmp_path / name, count)
    data = load(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test())) == (20, 8, 6)


def test_a_single_folder_of_classes_is_split(tmp_path: Path) -> None:
    write_images(tmp_path, 10)
    data = load(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test())) == (12, 4, 4)


def test_limit_train_includes_validation(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / "test", 3)
    data = load(str(tmp_path), limit_train=10)
    assert (len(data.train), len(data.val), len(data.test())) == (8, 2, 6)


def test_images_are_resized_to_the_size_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path, 10, size=48)
    assert next(load(str(tmp_path)).train.in_order(4))[0].shape == (4, 3, 48, 48)
    assert next(load(str(tmp_path), image_size=24).train.in_order(4))[0].shape == (4, 3, 24, 24)


def test_normalisation() -> None:
    split = load("digits").val
    assert isinstance(split, MemorySplit)
    images, labels = next(split.in_order(8))
    assert torch.equal(labels, split.labels[:8])
    torch.testing.assert_close(images, (split.images[:8].double() / 255 * 4 - 2).float())


def test_augmented_images_are_shifted_and_mirrored_originals(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            noise = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{index}.png")
    split = load(str(tmp_path)).train
    assert isinstance(split, MemorySplit)
    padded = np.pad(split.images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    candidates = {
        crop[:, :, ::step].tobytes()
        for image in padded
        for y in range(9)
        for x in range(9)
        for crop in [image[:, y : y + 12, x : x + 12]]
        for step in (1, -1)
    }
    images = torch.cat([batch for batch, _ in split.epoch(4, seed=5)])
    bytes_again = ((images * 0.25 + 0.5) * 255).round().to(torch.uint8).numpy()
    assert len(images) == 12
    assert all(image.tobytes() in candidates for image in bytes_again)


def same(first: list[tuple[torch.Tensor, torch.Tensor]], second: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [32, 80])
def test_an_epoch_is_a_function_of_its_seed(tmp_path: Path, size: int) -> None:
    write_images(tmp_path, 20, size)
    split = load(str(tmp_path), image_size=size).train
    assert isinstance(split, MemorySplit if size == 32 else FileSplit)
    first = list(split.epoch(8, seed=1))
    torch.rand(3)
    assert same(first, list(split.epoch(8, seed=1)))
    assert not same(first, list(split.epoch(8, seed=2)))
    assert [len(labels) for _, labels in first] == [8, 8, 8]  # of 26 images, the incomplete batch is left out


@pytest.mark.parametrize("size", [32, 80])
def test_processes_share_every_batch(tmp_path: Path, size: int) -> None:
    write_images(tmp_path, 20, size)
    split = load(str(tmp_path), image_size=size).train
    for whole, parts in (
        (list(split.epoch(8, 1)), [list(split.epoch(8, 1, (rank, 3))) for rank in range(3)]),
        (list(split.in_order(8)), [list(split.in_order(8, (rank, 3))) for rank in range(3)]),
    ):
        for i, (images, labels) in enumerate(whole):
            for rank, part in enumerate(parts):
                if len(labels) > rank:
                    assert same([(images[rank::3], labels[rank::3])], [part[i]])
        assert sum(len(labels) for part in parts for _, labels in part) == sum(len(labels) for _, labels in whole)


def test_workers_change_nothing(tmp_path: Path) -> None:
    write_images(tmp_path, 10, size=80)
    alone = load_data(configured(str(tmp_path)), default_size=70, device=CPU, workers=0).train
    helped = load_data(configured(str(tmp_path)), default_size=70, device=CPU, workers=1).train
    assert same(list(alone.epoch(4, seed=1)), list(helped.epoch(4, seed=1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_large_unreadable_images_are_named(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path, 10, size=80)
    data = load_data(configured(str(tmp_path)), default_size=70, device=CPU, workers=workers)
    path = data.train.paths[3]  # type: ignore[attr-defined]
    Path(path).write_bytes(Path(path).read_bytes()[:80])
    message = re.escape(f"Image {path} cannot be read (") + r"[^\n]*\); repair or delete it\."
    with pytest.raises(StorageError, match=rf"^{message}$"):
        list(data.train.in_order(4))


def nothing_there(root: Path) -> tuple[str, str]:
    return str(root / "x"), f"--data '{root}/x': {root}/x is not a folder; give one of digits"


def no_classes(root: Path) -> tuple[str, str]:
    return str(root), f"{root} is not an ImageFolder ("


def empty_class(root: Path) -> tuple[str, str]:
    write_images(root / "train", 4)
    (root / "train" / "cat").mkdir()
    return str(root), f"{root}/train is not an ImageFolder (Found no valid file for the classes cat."


def no_test(root: Path) -> tuple[str, str]:
    write_images(root / "train", 4)
    return str(root), f"{root} has a train folder but neither test nor val; add one, or give {root}/train."


def other_classes(root: Path) -> tuple[str, str]:
    write_images(root / "train", 4)
    write_images(root / "test", 4)
    (root / "test" / "bee").rename(root / "test" / "cat")
    return str(root), f"{root}/train and {root}/test differ in class folder 'bee'; make them equal."


def unreadable(root: Path) -> tuple[str, str]:
    write_images(root, 10)
    for path in (root / "ant").iterdir():
        path.write_bytes(b"GIF89a")
    return str(root), f"Image {root}/ant/"


def damaged_cifar(root: Path) -> tuple[str, str]:
    (root / "cifar-10-batches-py").mkdir()
    return f"cifar10:{root}", f"{root}/cifar-10-batches-py is damaged or incomplete; extract it again."


def single_image(root: Path) -> tuple[str, str]:
    write_images(root, 1)
    return str(root), "Class 0 (from 0, in alphabetical order) has a single image; at least 2 are needed for a split."


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (nothing_there, ConfigError),
        (no_classes, StorageError),
        (empty_class, StorageError),
        (no_test, StorageError),
        (other_classes, StorageError),
        (unreadable, StorageError),
        (damaged_cifar, StorageError),
        (single_image, ConfigError),
    ],
)
def test_bad_data_is_explained(
    tmp_path: Path, spoil: Callable[[Path], tuple[str, str]], kind: type[DspfxError]
) -> None:
    spec, message = spoil(tmp_path)
    with pytest.raises(kind, match=re.escape(message)):
        load(spec)


def test_bad_shares_are_explained() -> None:
    with pytest.raises(ConfigError, match=re.escape("--val-fraction is 1.0; give a share of the training")):
        configured("digits", val_fraction=1.0)
    with pytest.raises(ConfigError, match=re.escape("--limit-train is 1; give at least 2 images.")):
        configured("digits", limit_train=1)
