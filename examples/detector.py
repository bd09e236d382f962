"""Prunes, fine-tunes and lowers a torchvision detector, which does not trace whole; `# dspfx` marks what is not plain.

`prepare` finds the parts that are graphs (backbone, heads); the detector keeps its class, its losses and its forward.

python examples/detector.py                                               (squares of its own, seconds on a CPU)
python examples/detector.py --images IMAGES --annotations coco.json --classes 91 --size 512 --epochs 12
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.v2.functional import pil_to_tensor

import dspfx  # dspfx

Sample = tuple[Tensor, dict[str, Tensor]]


class Squares(Dataset):
    """A bright square on noise, and its box."""

    def __init__(self, number: int, size: int) -> None:
        places = torch.randint(size // 2, (number, 2)).tolist()
        self.samples = [self.draw(x, y, size // 3, torch.rand(3, size, size) / 2) for x, y in places]

    def draw(self, x: int, y: int, side: int, image: Tensor) -> Sample:
        image[:, y : y + side, x : x + side] += 0.5
        return image, {"boxes": torch.tensor([[x, y, x + side, y + side]]).float(), "labels": torch.tensor([1])}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class Coco(Dataset):
    """Images and boxes of an annotation file in COCO's form."""

    def __init__(self, images: Path, annotations: Path) -> None:
        found = json.loads(annotations.read_text())
        self.boxes: dict[int, list[Any]] = {}
        for note in found["annotations"]:
            self.boxes.setdefault(note["image_id"], []).append(note)
        self.files = [(i["id"], images / i["file_name"]) for i in found["images"] if i["id"] in self.boxes]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        number, file = self.files[index]
        boxes = torch.tensor([note["bbox"] for note in self.boxes[number]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([note["category_id"] for note in self.boxes[number]])
        return pil_to_tensor(Image.open(file).convert("RGB")) / 255, {"boxes": boxes, "labels": labels}


def train(network: Any, loader: DataLoader, optimizer: torch.optim.Optimizer, epochs: int) -> float:
    network.train()
    for _ in range(epochs):
        for images, targets in loader:
            optimizer.zero_grad()
            loss = sum(network(list(images), list(targets)).values())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    return loss.item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images")
    parser.add_argument("--annotations", type=Path, help="their boxes, a file in COCO's form")
    parser.add_argument("--classes", type=int, default=2, help="with the background")
    parser.add_argument("--backbone", default="resnet18", help="any ResNet of torchvision")
    parser.add_argument(
        "--checkpoint", type=Path, help="the trained detector's state_dict; without, it is trained first"
    )
    parser.add_argument("--size", type=int, default=64, help="that images are resized to, in pixels")
    parser.add_argument("--epochs", type=int, default=1, help="of each of training, learning groups, and fine-tuning")
    parser.add_argument("--flops", type=float, default=0.5, help="the share of multiply-adds that remains")
    parser.add_argument("--out", type=Path, default=Path("runs/detector"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data = Squares(16, args.size) if args.images is None else Coco(args.images, args.annotations)
    loader = DataLoader(data, 4, shuffle=True, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    backbone = resnet_fpn_backbone(backbone_name=args.backbone, weights=None, trainable_layers=5)
    model = RetinaNet(backbone, args.classes, min_size=args.size, max_size=2 * args.size)
    if args.checkpoint is not None:
        model.load_state_dict(torch.load(args.checkpoint, weights_only=True))
    else:
        train(model, loader, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), args.epochs)

    images = list(next(iter(loader))[0])
    gm = dspfx.prepare(model, images[:2])  # dspfx: a RetinaNet whose backbone and heads are graphs
    print(dspfx.coverage(gm))  # dspfx
    optimizer = torch.optim.SGD(gm.parameters(), 0.01, momentum=0.9)
    with dspfx.GroupLearner(gm, optimizer, total_steps=args.epochs * len(loader)):  # dspfx
        train(gm, loader, optimizer, args.epochs)
    plan = dspfx.prune(gm, dspfx.Budget(flops=args.flops))  # dspfx
    loss = train(gm, loader, torch.optim.SGD(gm.parameters(), 0.01, momentum=0.9), args.epochs)
    small = dspfx.lower(gm)  # dspfx

    x = torch.rand(2, 3, args.size, args.size)
    with torch.no_grad():
        expected, found = gm.eval().backbone(x), small.backbone(x)
    errors = [((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in expected]
    args.out.mkdir(parents=True, exist_ok=True)
    dspfx.save(small, args.out / "small.safetensors")  # dspfx: dspfx.load(path, model) reads it
    exported = dspfx.export_onnx(small.backbone, args.out / "backbone.onnx", x)  # dspfx: the part that has a graph
    params = [dspfx.profile(network, images[:1]).params for network in (small, model)]
    results = {"loss": loss, "flops_left": plan.flops_left, "params_left": params[0] / params[1]}
    results |= {"lowered_error": max(errors), "onnx_error": exported.max_error}
    print("\n".join(f"{name:14} {value:.4g}" for name, value in results.items()))
    print(dspfx.benchmark({"dense": model.backbone.eval(), "lowered": small.backbone}, x[:1], rounds=10))  # dspfx
    return results


if __name__ == "__main__":
    main()
