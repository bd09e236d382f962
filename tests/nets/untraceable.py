"""Networks whose own forward cannot be a graph: control flow on values, lists of images, losses from targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn_relu


class Refiner(nn.Module):
    """stem -> body, again and again while its mean is large -> a head that several scales share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 8))
        self.body = nn.Sequential(conv_bn_relu(8, 12), conv_bn_relu(12, 8))
        self.head = nn.Sequential(conv_bn_relu(8, 8), nn.Conv2d(8, 5, 1))
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            if float(x.detach().mean()) < 1e-6:
                break
            x = 0.5 * self.body(x)
        levels = [self.head(level).mean((2, 3)) for level in (x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4))]
        return self.last(torch.stack(levels).sum(0))


class Backbone(nn.Module):
    """Two scales, and an attribute that the detector reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 8))
        self.deeper = nn.Sequential(conv_bn_relu(8, 12), conv_bn_relu(12, 8))
        self.out_channels = 8

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x)
        return {"fine": fine, "coarse": self.deeper(F.max_pool2d(fine, 2))}


class DenseHead(nn.Module):
    """A score at each position of every scale; owns its loss."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(conv_bn_relu(channels, 8), conv_bn_relu(8, 8))
        self.score = nn.Conv2d(8, 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.cat([self.score(self.tower(f)).flatten(1) for f in features], 1)

    def compute_loss(self, scores: Tensor, targets: list[Tensor]) -> Tensor:
        wanted = torch.stack([t.float().mean().expand(scores.shape[1]) for t in targets])
        return F.mse_loss(scores, wanted)


class BoxHead(nn.Module):
    """Crops [n, C, 4, 4], n perhaps zero, to class scores."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv_bn_relu(channels, 8), conv_bn_relu(8, 8))
        self.classes = nn.Linear(8, 3)

    def forward(self, crops: Tensor) -> Tensor:
        return self.classes(self.convs(crops).mean((2, 3)))


class Detector(nn.Module):
    """Two stages in miniature: a list of images, losses from targets in train mode, found boxes in eval mode."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = DenseHead(self.backbone.out_channels)
        self.box_head = BoxHead(self.backbone.out_channels)
        self.threshold = threshold

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> Any:
        if self.training and targets is None:
            raise ValueError("targets are needed in train mode")
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])
        features = self.backbone(batch)
        scores = self.head(list(features.values()))
        if targets is not None:
            crops = features["fine"][:, : self.backbone.out_channels, :4, :4]
            classes = F.cross_entropy(self.box_head(crops), torch.stack(targets))
            return {"dense": self.head.compute_loss(scores, targets), "classes": classes}
        found = []
        for i in range(len(images)):
            places = (scores[i, : height * width] > self.threshold).nonzero()[:10, 0].tolist()
            crops = [features["fine"][i : i + 1, :, : 4 + 0 * place, :4] for place in places]
            boxes = torch.cat(crops) if crops else features["fine"][:0, :, :4, :4]
            found.append({"places": torch.tensor(places), "classes": self.box_head(boxes)})
        return found
