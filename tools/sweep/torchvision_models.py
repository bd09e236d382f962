"""torchvision's part of the catalogue: all its models, at sizes that a small machine can check."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import convnext, regnet, vision_transformer
from torchvision.models.video import mvit

from dspfx.config import Inputs
from tools.sweep.cases import BATCH, Case, images, printed

COUNT = 121  # with torchvision 0.29
SIZE = 64
SIZES = {"inception_v3": 299, "quantized_inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
CLIP = (4, 32, 32)
S3D = (8, 32, 32)
DETECTORS: dict[str, Any] = {"min_size": 64, "max_size": 96}
PROPOSALS = {f"rpn_{what}_nms_top_n_{mode}": 12 for what in ("pre", "post") for mode in ("train", "test")}


def torchvision_cases() -> list[Case]:
    """All of them; AssertionError where a torchvision has another number than the catalogue knows."""
    kinds = {
        "classification": (models, _image_case),
        "segmentation": (models.segmentation, _segmentation_case),
        "quantizable": (models.quantization, _image_case),
        "video": (models.video, _video_case),
        "detection": (models.detection, _detection_case),
        "optical flow": (models.optical_flow, _flow_case),
    }
    found = [make(kind, name) for kind, (module, make) in kinds.items() for name in models.list_models(module=module)]
    assert len(found) == COUNT, f"torchvision lists {len(found)} models, this catalogue was written for {COUNT}"
    return found


def _get(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, **options)


def _image_case(kind: str, name: str) -> Case:
    size = SIZES.get(name, SIZE)
    options: dict[str, Any] = {"init_weights": False} if "googlenet" in name or "inception" in name else {}
    options |= {"image_size": size} if name.startswith("vit_") else {}
    make, note = _get(name, **options), ""
    if name in SMALLER:
        note, module, builder, change = SMALLER[name]
        make = _changed(module, builder, change, make)
    return Case(name, "torchvision", kind, printed((3, size, size)), make, images(3, size, size), note=note)


def _segmentation_case(kind: str, name: str) -> Case:
    make = _get(name, weights_backbone=None, aux_loss=None if name.startswith("lraspp") else True)
    if name.startswith("lraspp"):
        make = _get(name, weights_backbone=None)
    return Case(name, "torchvision", kind, printed((3, 48, 48)), make, images(3, 48, 48), classes=21)


def _video_case(kind: str, name: str) -> Case:
    shape = (3, *(S3D if name == "s3d" else CLIP))
    make, note = _get(name), ""
    if name == "s3d":
        make, note = _small_s3d, "last pooling window of 1x1x1"
    if name.startswith("mvit"):  # its positions are made for one size, which its constructor fixes
        make, note = _changed(mvit, "_mvit", _small_clip, make), "made for clips of this size"
    return Case(name, "torchvision", kind, printed(shape), make, images(*shape), classes=400, note=note)


def _detection_case(kind: str, name: str) -> Case:
    fixed = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name)
    options = {} if fixed else DETECTORS | (PROPOSALS if "rcnn" in name else {})
    make = _get(name, weights_backbone=None, **options)
    note = f"resizes to {fixed}x{fixed}" if fixed else f"min_size={DETECTORS['min_size']}"
    return Case(
        name, "torchvision", kind, "3x64x80, 3x72x64", make, _photographs, 91, note, lambda: _boxes("keypoint" in name)
    )


def _flow_case(kind: str, name: str) -> Case:
    updates, note = {"raft_small": (3, "3 updates of 12")}.get(name, (12, ""))

    def frames() -> Inputs:
        return Inputs(torch.rand(BATCH, 3, 128, 128), torch.rand(BATCH, 3, 128, 128), num_flow_updates=updates)

    return Case(name, "torchvision", kind, "2 of 3x128x128", _get(name), frames, classes=2, note=note)


def _photographs() -> list[Tensor]:
    return [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]


def _boxes(keypoints: bool) -> list[dict[str, Tensor]]:
    """A box an image, with a mask and, for those that learn them, keypoints."""
    targets = []
    for photograph in _photographs():
        height, width = photograph.shape[1:]
        target = {
            "boxes": torch.tensor([[4.0, 6.0, 44.0, 50.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.zeros(1, height, width, dtype=torch.uint8),
        }
        target["masks"][:, 6:50, 4:44] = 1
        if keypoints:
            target["keypoints"] = torch.tensor([[[10.0 + i, 12.0 + i, 1.0] for i in range(17)]])
        targets.append(target)
    return targets


def _changed(module: Any, builder: str, change: Callable[[dict[str, Any]], None], make: Any) -> Callable[[], nn.Module]:
    """`make`, with the arguments that it gives to torchvision's own `module.builder` changed on the way."""
    original = getattr(module, builder)

    def build(*args: Any, **options: Any) -> nn.Module:
        given = inspect.signature(original).bind(*args, **options).arguments
        given |= given.pop("kwargs", {})
        change(given)
        made: nn.Module = original(**given)
        return made

    def smaller() -> nn.Module:
        with mock.patch.object(module, builder, build):
            made: nn.Module = make()
        return made

    return smaller


def _small_clip(options: dict[str, Any]) -> None:
    options |= {"temporal_size": CLIP[0], "spatial_size": CLIP[1:]}


def _small_s3d() -> nn.Module:
    """Its last pooling window, 2x7x7, wants clips of 13x209x209 at least, thirty times the work."""
    model = models.video.s3d(weights=None)
    model.avgpool = nn.AvgPool3d(1)
    return model


def _two_layers(options: dict[str, Any]) -> None:
    options["num_layers"] = 2


def _short_stages(options: dict[str, Any]) -> None:
    for stage in options["block_setting"]:
        stage.num_layers = min(stage.num_layers, 3)


def _shallow(options: dict[str, Any]) -> None:
    options["block_params"].depths = [1 for _ in options["block_params"].depths]


# Above 150 million parameters the copies in float64 do not fit a small machine: the same blocks, fewer of them.
SMALLER: dict[str, tuple[str, Any, str, Callable[[dict[str, Any]], None]]] = {
    "vit_l_16": ("2 of 24 layers", vision_transformer, "_vision_transformer", _two_layers),
    "vit_l_32": ("2 of 24 layers", vision_transformer, "_vision_transformer", _two_layers),
    "vit_h_14": ("2 of 32 layers", vision_transformer, "_vision_transformer", _two_layers),
    "convnext_large": ("3 of 27 blocks in stage 3", convnext, "_convnext", _short_stages),
    "regnet_y_128gf": ("1 block a stage", regnet, "_regnet", _shallow),
}
