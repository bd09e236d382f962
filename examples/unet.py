"""Prunes, fine-tunes, lowers and exports a U-Net for segmentation; `# dspfx` marks what a plain training has not.

python examples/unet.py                                                     (discs of its own, seconds on a CPU)
python examples/unet.py --images IMAGES --masks MASKS --classes 3 --width 32 --size 256 --epochs 30
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize

import dspfx  # dspfx


def block(inputs: int, outputs: int) -> nn.Sequential:
    convs = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
    ]
    return nn.Sequential(convs[0], nn.BatchNorm2d(outputs), nn.ReLU(), convs[1], nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Three scales with skip connections, which concatenate: pruning follows every channel through them."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, width), block(width, 2 * width)])
        self.bottom = block(2 * width, 4 * width)
        self.up = nn.ModuleList([nn.ConvTranspose2d(s * width, s * width // 2, 2, 2) for s in (4, 2)])
        self.merge = nn.ModuleList([block(s * width, s * width // 2) for s in (4, 2)])
        self.classes = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.classes(x)


class Folder(Dataset):
    """Images, and masks of the same names whose pixels are classes."""

    def __init__(self, images: Path, masks: Path, size: int) -> None:
        self.pairs = [(image, masks / f"{image.stem}.png") for image in sorted(images.iterdir())]
        self.size = [size, size]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = zip(self.pairs[index], ("RGB", "L"), strict=True)
        image, mask = (pil_to_tensor(Image.open(file).convert(mode)) for file, mode in pair)
        return resize(image, self.size) / 128 - 1.0, resize(mask, self.size, InterpolationMode.NEAREST)[0].long()


def discs(number: int, size: int) -> TensorDataset:
    """Discs on noise: class 1 on class 0."""
    places, radius = size * (0.3 + 0.4 * torch.rand(number, 2, 1, 1)), size * (0.15 + 0.15 * torch.rand(number, 1, 1))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (x - places[:, 0]) ** 2 + (y - places[:, 1]) ** 2 < radius**2
    return TensorDataset(torch.randn(number, 3, size, size) + 1.5 * inside[:, None], inside.long())


def train(network: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    network.train()
    for _ in range(epochs):
        for images, masks in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(images), masks).backward()
            optimizer.step()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images")
    parser.add_argument("--masks", type=Path, help="a folder of PNG masks of the same names, one class a value")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--width", type=int, default=8, help="channels of the finest scale")
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels; a multiple of 4")
    parser.add_argument("--epochs", type=int, default=3, help="of each of training, learning groups, and fine-tuning")
    parser.add_argument("--flops", type=float, default=0.4, help="the share of multiply-adds that remains")
    parser.add_argument("--out", type=Path, default=Path("runs/unet"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data = discs(96, args.size) if args.images is None else Folder(args.images, args.masks, args.size)
    loader, model = DataLoader(data, 16, shuffle=True), UNet(args.classes, args.width)
    train(model, loader, torch.optim.AdamW(model.parameters(), 3e-3), args.epochs)

    images, masks = next(iter(loader))
    gm = dspfx.prepare(model, images[:1])  # dspfx
    optimizer = torch.optim.AdamW(gm.parameters(), 3e-3)
    with dspfx.GroupLearner(gm, optimizer, total_steps=args.epochs * len(loader)):  # dspfx
        train(gm, loader, optimizer, args.epochs)
    plan = dspfx.prune(gm, dspfx.Budget(flops=args.flops))  # dspfx
    print(plan)
    train(gm, loader, torch.optim.AdamW(gm.parameters(), 3e-3), args.epochs)  # what is pruned stays zero
    small = dspfx.lower(gm)  # dspfx: for time, lower(gm, images[:1], runtime="onnxruntime"), which measures

    model.eval()
    with torch.no_grad():
        dense, expected, found = model(images), gm.eval()(images), small(images)
    args.out.mkdir(parents=True, exist_ok=True)
    dspfx.save(small, args.out / "small.safetensors")  # dspfx
    exported = dspfx.export_onnx(small, args.out / "small.onnx", images)  # dspfx: compared with PyTorch
    results = {
        name: (out.argmax(1) == masks).float().mean().item() for name, out in [("dense", dense), ("lowered", found)]
    }
    results |= {
        "flops_left": plan.flops_left,
        "params_left": dspfx.profile(small).params / dspfx.profile(model, images).params,
    }
    results |= {"lowered_error": ((found - expected).abs().max() / expected.abs().max()).item()}
    results |= {"onnx_error": exported.max_error}
    print("\n".join(f"{name:14} {value:.4g}" for name, value in results.items()))
    print(dspfx.benchmark({"dense": model, "lowered": small}, images[:1], rounds=10))  # dspfx
    return results


if __name__ == "__main__":
    main()
