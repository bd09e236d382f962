"""The layers of the page: what is left of each, its picture, and the form that it was lowered to."""

from __future__ import annotations

from dspfx.cli.pages.markup import Html, breakable, join, table, tag
from dspfx.cli.pages.run import Layer, Run
from dspfx.plans import LoweredLayer

FORMS = {
    "dense": "one plain layer of what is left",
    "branches": "a convolution a group",
    "grouped": "one convolution with groups, padded to equal ones",
    "kernel": "one kernel that walks the groups' lists",
    "native": "in a chain of native kernels",
}


def layers(run: Run) -> Html:
    """The layers, with a button each that shows the structure."""
    if not run.layers:
        return tag("p", "plan.json is not in this folder, so there is nothing to show.")
    total = sum(layer.plan.macs for layer in run.layers) or 1
    is_timed = any(layer.lowered and layer.lowered.ms is not None for layer in run.layers)
    rows, own = [], []
    for index, layer in enumerate(run.layers):
        shapes = ", ".join(f"{filters}×{channels}" for filters, channels in layer.structure.groups)
        form, ms = (layer.lowered.form, layer.lowered.ms) if layer.lowered else ("", None)
        rows.append((
            tag("button", breakable(layer.plan.name), type="button", class_="open", aria_expanded="false"),
            tag("canvas", class_="thumb", width=1, height=1, aria_hidden="true"),
            f"{layer.plan.out_channels}×{layer.plan.in_channels}",
            tag("span", shapes or "nothing", class_="shapes"),
            bar(layer),
            f"{layer.plan.macs / 1e6:,.2f} M ({layer.plan.macs / total:.0%})",
            form,
            *(["" if ms is None else f"{ms:.3f}"] if is_timed else []),
        ))  # fmt: skip
        own.append({"class_": "layer", "data_layer": str(index)})
    heads = ["layer", "picture", "filters × inputs", "groups: filters × inputs read", "FLOPs left", "FLOPs before",
             "lowered to", *(["expected ms"] if is_timed else [])]  # fmt: skip
    note = (
        "Press a layer to see which filter reads which input channel. A convolution of 64×32 has 64 filters that each "
        "read 32 input channels; a group of 5×12 has five filters that read the same twelve."
    )
    caption = "Layers with groups: what is left, and the form that each was lowered to"
    return join([
        tag("p", note, class_="note"),
        tag("p", "The pictures need JavaScript; the groups are in the table too.", id="no-script", class_="note"),
        table(caption, heads, rows, numbers=(2, 5, 7), wide=(2, 3, 5, 6, 7), attributes=own),
    ])  # fmt: skip


def bar(layer: Layer) -> Html:
    """The share that is left, as a number and as a bar."""
    fill = tag("span", style=f"width:{100 * min(max(layer.left, 0), 1):.1f}%")
    number = tag("span", f"{layer.left:.1%}", class_="share")
    return tag("span", tag("span", fill, class_="bar", aria_hidden="true"), number, class_="left")


def forms(run: Run) -> Html:
    """How every layer was rewritten, those without groups too; empty where that is not known."""
    if not run.lowered:
        return Html("")
    used = list(dict.fromkeys(layer.form for layer in run.lowered))
    counts = [f"{sum(layer.form == form for layer in run.lowered)} {form} ({FORMS[form]})" for form in used]
    rows = [(
        breakable(layer.name),
        layer.form,
        f"{len(layer.filters)}×{len(layer.channels)}",
        ", ".join(f"{len(group.filters)}×{len(group.channels)}" for group in layer.groups),
        _share(layer, layer.macs_left),
        _share(layer, layer.macs_run),
        "" if layer.ms is None else f"{layer.ms:.3f}",
    ) for layer in run.lowered]  # fmt: skip
    heads = ["layer", "form", "filters × inputs", "branches", "FLOPs left", "FLOPs run", "ms expected"]
    return join([
        tag("p", f"Forms of single layers: {', '.join(counts)}."),
        tag("details", tag("summary", "The form of every layer"),
            table("The lowering, layer by layer", heads, rows, numbers=(2, 4, 5, 6))),
    ])  # fmt: skip


def _share(layer: LoweredLayer, macs: int) -> str:
    return f"{macs / layer.macs:.1%}" if layer.macs else ""
