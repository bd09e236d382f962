"""The page: its sections in the order of the reader's questions, its style and its script, in one file."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from dspfx.cli.pages import curves, layers, sections, words
from dspfx.cli.pages.markup import Html, embedded, join, tag
from dspfx.cli.pages.run import Run, compact


def render(run: Run) -> str:
    """The whole page; it asks no network for anything, and runs no script but its own."""
    script, style = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    title = f"{run.results['arguments']['model']} on {run.results['arguments']['data']}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", f"{title}: dspfx report"),
        tag("style", Html(style)),
    ]
    body = [
        tag("a", "Skip to the layers", href="#layers", class_="skip"),
        tag(
            "header",
            tag("p", "dspfx compress", class_="kicker"),
            tag("h1", title),
            tag("p", words.headline(run), class_="verdict"),
        ),
        tag("main", *_main(run)),
        embedded("structures", compact(run.layers)),
        Html(f"<script>{script}</script>"),
    ]
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", *head)}\n{tag("body", *body)}</html>\n'


def _main(run: Run) -> list[Html]:
    return [
        sections.tiles(run),
        _section("short", "In short", sections.questions(run)),
        _section("networks", "The networks, measured", sections.networks(run)),
        _section("layers", "What is left of each layer", layers.layers(run)),
        _section("training", "How it was trained", curves.training(run)),
        _section("lowering", "Which form runs, and how it was chosen", sections.lowering(run)),
        _section("coverage", "What was left alone, and why", sections.coverage(run)),
        _section("again", "Do it again", sections.again(run)),
        *([_section("missing", "What this page cannot show", sections.missing(run))] if run.missing else []),
    ]


def _section(name: str, title: str, content: Html) -> Html:
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", join([heading, content]), id=name, aria_labelledby=f"{name}-title")
