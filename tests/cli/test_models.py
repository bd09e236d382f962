from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from dspfx.cli import models
from dspfx.errors import ConfigError, DspfxError, MismatchError, StorageError
from tests.data import CIFAR_LOSSLESS, RESNET20, RESNET56, needs


def normalised(images: np.ndarray) -> torch.Tensor:
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    return (torch.from_numpy(images).float() / 255 - mean) / std


@needs(RESNET20, CIFAR_LOSSLESS)
def test_trained_resnet20_scores_what_it_is_known_to_score() -> None:
    model = models.build("resnet20", 10)
    models.load_checkpoint(model, RESNET20)
    images = np.load(CIFAR_LOSSLESS)
    with torch.no_grad():
        found = model.eval()(normalised(images["x"])).argmax(1).numpy()
    assert (found == images["y"]).mean() == pytest.approx(0.916, abs=0.002)


@pytest.mark.parametrize(("name", "path"), [("resnet20", RESNET20), ("resnet56", RESNET56)])
def test_keys_are_those_of_the_published_networks(name: str, path: Path) -> None:
    if not path.is_file():
        pytest.skip(f"absent beside the repository: {path.name}")
    result = models.build(name, 10).load_state_dict(safetensors.torch.load_file(path), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Rounded they are table 6 of He et al. (2016): 0.27, 0.46, 0.66 and 0.85 million.
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018)],
)
def test_cifar_resnets_have_the_published_size(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in models.build(name, 10).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn_cifar", "resnet18", "googlenet"])
def test_networks_answer_for_every_class(name: str) -> None:
    size = models.default_image_size(name)
    with torch.no_grad():
        assert models.build(name, 7).eval()(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_torchvision_names_keep_their_meaning() -> None:
    with torch.device("meta"):
        theirs, ours = models.build("vgg16_bn", 10), models.build("vgg16_bn_cifar", 10)
    assert type(theirs).__module__ == "torchvision.models.vgg"
    assert [m.out_channels for m in theirs.modules() if isinstance(m, nn.Conv2d)] == [
        m.out_channels for m in ours.modules() if isinstance(m, nn.Conv2d)
    ]


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=re.escape(f"network 'resnet21' is not known; give one of {models.HELP}.")):
        models.build("resnet21", 10)


def test_detectors_are_no_classifiers() -> None:
    with pytest.raises(ConfigError, match="network 'fasterrcnn_resnet50_fpn' is not known"):
        models.build("fasterrcnn_resnet50_fpn", 10)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "parallel", "safetensors"])
def test_checkpoints_are_read_in_every_usual_form(tmp_path: Path, wrap: str) -> None:
    trained, fresh = models.build("resnet20", 10), models.build("resnet20", 10)
    state, path = trained.state_dict(), tmp_path / "file"
    if wrap == "safetensors":
        safetensors.torch.save_file(state, path)
    elif wrap == "parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state if wrap == "plain" else {wrap: state, "epoch": 3}, path)
    models.load_checkpoint(fresh, path)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


def wrong_width(path: Path) -> str:
    torch.save(models.build("resnet20", 100).state_dict(), path)
    return (
        f"--checkpoint {path} holds 'linear.weight' of shape [100, 64] where --model with the classes of --data has "
        "[10, 64]; give a checkpoint trained on these classes, or start without --checkpoint."
    )


def another_network(path: Path) -> str:
    torch.save(models.build("resnet32", 10).state_dict(), path)
    return (
        f"--checkpoint {path} holds 'layer1.3.conv1.weight', which --model does not have; name the network that the "
        "file was saved from."
    )


def part_of_it(path: Path) -> str:
    torch.save({"conv1.weight": torch.zeros(16, 3, 3, 3)}, path)
    return (
        f"--checkpoint {path} has no 'bn1.weight', which --model needs (1 entries there, 116 here); name the network "
        "that the file was saved from."
    )


def no_state(path: Path) -> str:
    torch.save([1, 2], path)
    return f"--checkpoint {path} holds no state_dict; save one with torch.save(model.state_dict(), FILE)."


def no_file(path: Path) -> str:
    return f"--checkpoint {path} is not a file; give a safetensors file or a saved state_dict."


def truncated(path: Path) -> str:
    safetensors.torch.save_file(models.build("resnet20", 10).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    return f"--checkpoint {path} cannot be read as safetensors nor as a state_dict with weights_only=True ("


class Danger:
    pass


def code_inside(path: Path) -> str:
    torch.save({"x": Danger()}, path)
    return f"--checkpoint {path} cannot be read as safetensors nor as a state_dict with weights_only=True ("


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (wrong_width, MismatchError),
        (another_network, MismatchError),
        (part_of_it, MismatchError),
        (no_state, StorageError),
        (no_file, StorageError),
        (truncated, StorageError),
        (code_inside, StorageError),
    ],
)
def test_bad_checkpoints_are_explained_and_change_nothing(tmp_path: Path, spoil, kind: type[DspfxError]) -> None:  # type: ignore[no-untyped-def]
    model = models.build("resnet20", 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = spoil(tmp_path / "file")
    with pytest.raises(kind, match=re.escape(message)):
        models.load_checkpoint(model, tmp_path / "file")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
