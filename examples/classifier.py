"""Prunes, fine-tunes, lowers and exports a torchvision classifier; `# dspfx` marks what a plain training has not.

python examples/classifier.py                                              (images of its own, seconds on a CPU)
python examples/classifier.py --data IMAGES --model resnet50 --checkpoint trained.pt --size 224 --epochs 30
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

import dspfx  # dspfx


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an ImageFolder with train/CLASS/* and test/CLASS/*")
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision")
    parser.add_argument("--checkpoint", type=Path, help="its trained state_dict; without, it is trained first")
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=3, help="of each of training, learning groups, and fine-tuning")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--flops", type=float, default=0.4, help="the share of multiply-adds that remains")
    parser.add_argument("--out", type=Path, default=Path("runs/classifier"))
    return parser.parse_args(argv)


def datasets(args: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """For training, for testing, and the number of classes."""
    if args.data is None:
        patterns = F.interpolate(torch.randn(4, 3, 4, 4), args.size)
        labels = torch.arange(192) % 4
        images = patterns[labels] + 0.5 * torch.randn(192, 3, args.size, args.size)
        return TensorDataset(images[:128], labels[:128]), TensorDataset(images[128:], labels[128:]), 4
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    train = v2.Compose([v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip(), *steps])
    test = v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size), *steps])
    found = torchvision.datasets.ImageFolder(args.data / "train", train)
    return found, torchvision.datasets.ImageFolder(args.data / "test", test), len(found.classes)


def train(network: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    network.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    right = [network(images).argmax(1) == labels for images, labels in loader]
    return torch.cat(right).float().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(argv)
    torch.manual_seed(0)
    training, testing, classes = datasets(args)
    loader, test = DataLoader(training, args.batch_size, shuffle=True), DataLoader(testing, args.batch_size)
    model = torchvision.models.get_model(args.model, num_classes=classes)
    if args.checkpoint is not None:
        model.load_state_dict(torch.load(args.checkpoint, weights_only=True))
    else:
        train(model, loader, torch.optim.SGD(model.parameters(), args.lr, momentum=0.9), args.epochs)

    images = next(iter(test))[0]
    gm = dspfx.prepare(model, images[:1])  # dspfx
    print(dspfx.coverage(gm))  # dspfx
    optimizer = torch.optim.SGD(gm.parameters(), args.lr, momentum=0.9)
    with dspfx.GroupLearner(gm, optimizer, total_steps=args.epochs * len(loader)):  # dspfx
        train(gm, loader, optimizer, args.epochs)
    plan = dspfx.prune(gm, dspfx.Budget(flops=args.flops))  # dspfx
    train(gm, loader, torch.optim.SGD(gm.parameters(), args.lr, momentum=0.9), args.epochs)  # what is pruned stays zero
    small = dspfx.lower(gm)  # dspfx: for time, lower(gm, images[:1], runtime="onnxruntime"), which measures

    with torch.no_grad():
        expected, found = gm.eval()(images), small(images)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    args.out.mkdir(parents=True, exist_ok=True)
    dspfx.save(small, args.out / "small.safetensors")  # dspfx
    exported = dspfx.export_onnx(small, args.out / "small.onnx", images)  # dspfx: compared with PyTorch
    results = {"dense": accuracy(model, test), "lowered": accuracy(small, test), "flops_left": plan.flops_left}
    results |= {"lowered_error": error, "onnx_error": exported.max_error}
    results["params_left"] = dspfx.profile(small, images[:1]).params / dspfx.profile(model, images[:1]).params
    print("\n".join(f"{name:14} {value:.4g}" for name, value in results.items()))
    print(dspfx.benchmark({"dense": model, "lowered": small}, images[:1], rounds=10))  # dspfx
    return results


if __name__ == "__main__":
    main()
