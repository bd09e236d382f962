from __future__ import annotations

import pytest

from dspfx.cli.pages.charts import Band, Line, chart, log_ticks, nice_ticks, show_number
from dspfx.cli.pages.markup import Html, embedded, safe, table, tag
from tests.cli.pages.test_page import Elements


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.5, 1]),
        (0.31, 0.97, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (5, 5, [4, 6]),
        (0, 0, [0, 0.5]),
    ],
)
def test_ticks_are_round_and_span_the_range(low: float, high: float, ticks: list[float]) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert len(found) <= 7
    assert all(len(show_number(tick)) <= 4 for tick in found)
    if (low, high) != (5, 5):
        assert found == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.3, 4.0, [0.2, 0.5, 1, 2, 5]), (0.004, 20, [0.001, 0.01, 0.1, 1, 10, 100]), (1, 1, [1, 2]), (2.5, 2.6, [2, 5])],
)
def test_ticks_of_a_logarithmic_scale(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == ticks


def test_points_lie_where_their_values_are() -> None:
    picture = chart("Loss", [Line("it", "a", [(1, 0.0), (2, 1.0)])], [Band("dense", 0, 2)])
    circles = [a for name, a in Elements(picture).tags if name == "circle"]
    assert [(a["cx"], a["cy"]) for a in circles] == [("242.0", "196.0"), ("432.0", "26.0")]
    assert 'aria-label="Loss, by epoch: it from 0 to 1. The numbers are in the table below."' in picture
    assert chart("Loss", [Line("it", "a", [])], []) == ""


def test_text_is_escaped_and_markup_is_not() -> None:
    assert safe("<a&b>") == "&lt;a&amp;b&gt;"
    assert tag("p", "<", Html("<b>"), title='"') == '<p title="&quot;">&lt;<b></p>'
    assert "<td>&lt;x&gt;</td>" in table("c", ["a", "b"], [("r", "<x>")])
    assert embedded("d", "</script>\u2028&") == (
        '<script type="application/json" id="d">"\\u003c/script\\u003e\\u2028\\u0026"</script>'
    )
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        embedded("d", float("nan"))
