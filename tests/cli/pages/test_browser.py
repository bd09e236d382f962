"""The page in a real browser: it renders without a complaint, and layers show their pictures by mouse and keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from dspfx.cli import pages
from tests.cli.pages.folder import EVIL, make_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pages.write(make_run(tmp_path_factory.mktemp("run"))).as_uri()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, which has to load without a message in the console and without a request; the width is a parameter."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": getattr(request, "param", 1000), "height": 800})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: complaints.append(asked.url) if asked.url[:5] not in ("file:", "data:") else None)
    page.goto(address)
    yield page
    assert complaints == []
    page.close()


def colours(page: Any) -> dict[str, int]:
    """How many pixels of the open picture have which colour."""
    return page.evaluate(
        """() => {
            const canvas = document.querySelector("canvas.picture");
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
            copy.drawImage(canvas, 0, 0);
            const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
            const found = {};
            for (let i = 0; i < data.length; i += 4) {
                const key = `${data[i]},${data[i + 1]},${data[i + 2]},${data[i + 3] > 0}`;
                found[key] = (found[key] || 0) + 1;
            }
            return found;
        }"""
    )


def test_a_click_on_a_layer_shows_its_picture(page: Any) -> None:
    first, second = page.locator("tr.layer").all()
    assert first.locator("button").get_attribute("aria-expanded") == "true"  # one is open from the start
    second.locator("td").nth(3).click()  # anywhere in the row
    assert first.locator("button").get_attribute("aria-expanded") == "false"
    assert second.locator("button").get_attribute("aria-expanded") == "true"
    picture = page.locator("canvas.picture")
    assert picture.get_attribute("role") == "img"
    assert picture.get_attribute("aria-label") == (
        f"{EVIL}: 2 filters of 4 input channels. group 1: 2 filters that read 4 channels. 0 dead filters, 0 channels "
        "that no filter reads. 100.0% of the pairs are kept."
    )
    second.locator("button").click()
    assert picture.count() == 0
    assert page.title() == "tiny on digits: dspfx report"  # and not "owned"


def test_the_picture_has_a_colour_a_group_and_grey_for_what_is_dead(page: Any) -> None:
    found, pair = colours(page), 13 * 13  # 14 pixels a pair, with a gap of one
    blue, orange = found["43,123,186,true"], found["224,138,30,true"]
    assert (blue, orange) == (4 * pair, 1 * pair)  # two filters of two channels, one of one
    grey = sum(count for key, count in found.items() if key.endswith("true")) - blue - orange
    assert grey == (3 + 3) * pair  # a dead filter of three channels, and a channel that three filters do not read
    table = page.locator("#structure table")
    assert table.locator("caption").inner_text() == "Its groups and their colours"
    assert [row.inner_text().split() for row in table.locator("tbody tr").all()[:2]] == [
        ["1", "2", "2"],
        ["2", "1", "1"],
    ]
    page.get_by_label("as in the network").check()
    assert colours(page) == found  # the same pairs, elsewhere


def test_the_keyboard_reaches_every_layer(page: Any) -> None:
    first, second = page.locator("button.open").all()
    first.focus()
    page.keyboard.press("ArrowDown")
    assert second.evaluate("element => element === document.activeElement")
    page.keyboard.press("Enter")
    assert second.get_attribute("aria-expanded") == "true"
    assert second.get_attribute("aria-controls") == "structure"
    page.keyboard.press("Escape")
    assert page.locator("#structure").count() == 0


@pytest.mark.parametrize("page", [400, 1000], indirect=True)
def test_nothing_overflows(page: Any) -> None:
    """Wide tables scroll by themselves, in a region that the keyboard reaches."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = """[...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, .skip")
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    assert page.locator(".scroll:not([tabindex='0'])").count() == 0


def test_dark_and_print_have_grounds_of_their_own(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    page.emulate_media(media="print")
    assert (light, dark, page.evaluate(ground)) == ("rgb(253, 253, 252)", "rgb(21, 25, 23)", "rgb(255, 255, 255)")


def test_without_scripts_the_tables_are_there(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("tr.layer").count() == 2
    assert page.get_by_text("The pictures need JavaScript").is_visible()
    context.close()
