"""HTML from text that is not trusted: whatever is not `Html` already is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Markup that was made here; everything else is text."""


def safe(value: Any) -> Html:
    """Markup as it is, anything else as text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """All parts, one after the other."""
    return Html(between.join(safe(part) for part in parts))


def tag(element: str, *children: Any, **attributes: Any) -> Html:
    """<element attributes>children</element>; `class_` is class, `aria_hidden` is aria-hidden, None leaves one out."""
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    own = "".join(f' {key}="{safe(value)}"' for key, value in pairs)
    return Html(f"<{element}{own}>{join(children)}</{element}>")


def breakable(text: str) -> Html:
    """A qualified name or a path, which may break after its dots."""
    return Html(html.escape(text).replace(".", ".<wbr>").replace("/", "/<wbr>"))


def table(
    caption: str,
    heads: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    numbers: Iterable[int] = (),
    wide: Iterable[int] = (),
    attributes: Iterable[dict[str, Any]] | None = None,
) -> Html:
    """A table with a caption, header cells, and in each row the first cell as its header; it scrolls by itself.

    `numbers` are columns aligned to the right, `wide` those that a narrow screen leaves out; `attributes` are of rows.
    """
    right, hidden, kept = set(numbers), set(wide), [list(row) for row in rows]

    def kind(column: int) -> str | None:
        return " ".join(["number"] * (column in right) + ["wide"] * (column in hidden)) or None

    head = tag("tr", *(tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(heads)))
    body = []
    for row, own in zip(kept, attributes or [{}] * len(kept), strict=True):
        cells = [tag("td", cell, class_=kind(i)) for i, cell in enumerate(row) if i > 0]
        body.append(tag("tr", tag("th", row[0], scope="row"), *cells, **own))
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def embedded(identity: str, content: Any) -> Html:
    """JSON for the page's script, in which nothing can end the element that holds it."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{safe(identity)}">{text}</script>')
