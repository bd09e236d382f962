"""Writes what a `python -m dspfx compress` run measured as a page: table, learning curves, command, machine.

python -m benchmarks.run_page runs/demo docs/results/demo.md --title "The demo" --command "make demo"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tabulate import tabulate

NETWORKS = {
    "dense": "dense, as loaded or trained",
    "control": "dense, trained as long as the pruned one",
    "pruned": "pruned",
    "lowered": "lowered",
}


def page(content: dict, title: str, command: str) -> str:
    """The page in Markdown, from the content of results.json."""
    networks, machine = content["networks"], content["machine"]
    dense = networks["dense"]
    images = dense["test"]["images"]
    rows = [
        (
            label,
            f"{networks[name]['test']['accuracy']:.2%}",
            f"{networks[name]['flops_needed']:.1%}",
            f"{networks[name]['flops'] / dense['flops']:.1%}",
            f"{networks[name]['params'] / dense['params']:.1%}",
            f"{networks[name]['file_bytes'] / 1e3:.0f} kB",
            f"{networks[name]['latency_ms']:.2f} ms",
            f"{networks[name]['latency_ratio']:.2f}",
        )
        for name, label in NETWORKS.items()
        if name in networks
    ]
    headers = ["network", "test accuracy", "FLOPs kept", "FLOPs run", "weights stored", "file", "batch 1", "to dense"]
    curves = []
    for stage, epochs in content["curves"].items():
        for epoch in epochs:
            curves.append([stage, *[f"{value:.4g}" for value in epoch.values()]])
    names = next((list(epochs[0]) for epochs in content["curves"].values() if epochs), [])
    limit = content["arguments"].get("limit_train")
    scale = f"Only {limit} training images were used. " if limit else ""
    return (
        "\n\n".join(
            [
                f"# {title}",
                f"{scale}Accuracy on {images} test images, read once at the end; the epoch was chosen on a validation "
                f"split. FLOPs kept counts the (filter, input channel) pairs that pruning left, FLOPs run what PyTorch "
                f"executes. Latency is the median of interleaved rounds in PyTorch eager on {machine['device']} "
                f"({machine['processor']}, {machine['threads']} threads), torch {content['versions']['torch']}.",
                tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True),
                "## Epochs",
                tabulate(curves, headers=["stage", *names], tablefmt="github", disable_numparse=True),
                f"Made by\n\n    {command}",
            ]
        )
        + "\n"
    )


def main() -> None:
    """Reads OUT/results.json and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the --out folder of the run")
    parser.add_argument("page", type=Path, help="the file to write")
    parser.add_argument("--title", required=True)
    parser.add_argument("--command", required=True, help="the command that made the run")
    options = parser.parse_args()
    content = json.loads((options.out / "results.json").read_text())
    options.page.write_text(page(content, options.title, options.command))


if __name__ == "__main__":
    main()
