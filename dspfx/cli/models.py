"""The networks that `--model` can name, and reading a trained checkpoint into one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from dspfx.errors import ConfigError, MismatchError, StorageError

CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
CIFAR_VGG = "vgg16_bn_cifar"
BUILT_IN = (*CIFAR_DEPTHS, CIFAR_VGG)
HELP = (
    f"{', '.join(BUILT_IN)} (built in, for 32x32 images), or any classification name of torchvision, with its meaning "
    "there: resnet18, mobilenet_v2, vgg16_bn, ..."
)


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus the parameter-free shortcut of the CIFAR ResNets: every second pixel, zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            before = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.padding - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6n+2 for small images (He et al. 2016, section 4.2); keys conv1, bn1, layer{1,2,3}, linear."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        _he_init(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class CifarVGG16(nn.Module):
    """VGG16 with batch norm in its CIFAR form: thirteen 3x3 convolutions, five poolings, one linear layer."""

    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0 is a pooling

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self.WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        _he_init(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)  # as torchvision's: large logits at first stop all learning

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def _he_init(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)


def build(name: str, num_classes: int) -> nn.Module:
    """A freshly initialised network that maps images [B, 3, H, W] to logits [B, num_classes].

    Every torchvision name keeps torchvision's meaning: `vgg16_bn` is theirs, `vgg16_bn_cifar` is the built-in one.
    Raises ConfigError for a name that neither knows.
    """
    if name in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[name], num_classes)
    if name == CIFAR_VGG:
        return CifarVGG16(num_classes)
    check_name(name)
    # These two warn when nobody says whether they shall initialise their weights.
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def check_name(name: str) -> None:
    """Raises ConfigError for a name that neither this module nor torchvision knows."""
    if name not in BUILT_IN and name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(f"network {name!r} is not known; give one of {HELP}.")


def default_image_size(name: str) -> int:
    """The image height and width that the network was designed for."""
    if name in BUILT_IN:
        return 32
    return 299 if name == "inception_v3" else 224


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads trained weights: a safetensors file, or a `torch.save`d state_dict (read with weights_only=True).

    A state_dict under "state_dict" or "model", and DataParallel's "module." prefix, are understood.
    Raises StorageError for an unreadable file, MismatchError where names or shapes differ; `model` then is unchanged.
    """
    state = _read_state(path)
    own = model.state_dict()
    for key in own:
        if key not in state and not key.endswith("num_batches_tracked"):
            raise MismatchError(
                f"--checkpoint {path} has no {key!r}, which --model needs ({len(state)} entries there, {len(own)} "
                "here); name the network that the file was saved from."
            )
    for key, value in state.items():
        if key not in own:
            raise MismatchError(
                f"--checkpoint {path} holds {key!r}, which --model does not have; name the network that the file was "
                "saved from."
            )
        if value.shape != own[key].shape:
            raise MismatchError(
                f"--checkpoint {path} holds {key!r} of shape {list(value.shape)} where --model with the classes of "
                f"--data has {list(own[key].shape)}; give a checkpoint trained on these classes, or start without "
                "--checkpoint."
            )
    model.load_state_dict({**own, **state})


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise StorageError(f"--checkpoint {path} is not a file; give a safetensors file or a saved state_dict.")
    try:
        content: Any = _read_safetensors(path) or torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise nearly every built-in exception on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(
            f"--checkpoint {path} cannot be read as safetensors nor as a state_dict with weights_only=True ({reason}); "
            "save it again with safetensors or torch.save(model.state_dict(), FILE)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise StorageError(
            f"--checkpoint {path} holds no state_dict; save one with torch.save(model.state_dict(), FILE)."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file; None when the file does not start like one (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return None
    return safetensors.torch.load_file(path)
