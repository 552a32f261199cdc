"""The Console's query line in a browser: answers in place, carets, history, completions, selection by a row."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.page import open_page
from integration.page.encoder_decoder_session import EncoderDecoderDouble
from integration.page.served_page import served_page
from playwright.sync_api import Page, expect

from moe_debugger.wire.ids import new_id

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

WIDE, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def session_id() -> str:
    return new_id()


@pytest.fixture(scope="module")
def url(session_id: str) -> Iterator[str]:
    analyzer = EncoderDecoderDouble(session_id)
    # What queries read: layer 2 is skewed to expert 3.
    analyzer.counts[session_id] = np.array([[5, 5, 5, 5], [6, 4, 5, 5], [1, 1, 1, 17], [0] * 4, [9, 1, 5, 5]], "<u8")
    with served_page(analyzer) as address:
        yield address


@pytest.fixture
def page(url: str, session_id: str) -> Iterator[Page]:
    with open_page(url, session_id, width=WIDE[0], height=WIDE[1]) as opened:
        opened.locator("#panel-tab-console").click()
        opened.locator("#query-line").wait_for()
        yield opened


def _ask(page: Page, text: str) -> None:
    line = page.locator("#query-line")
    line.fill(text)
    line.press("Escape")
    line.press("Enter")


def test_rows_come_in_place_and_a_row_selects_its_expert(page: Page) -> None:
    _ask(page, "experts where load > 1.5x order by load desc show layer, expert, load, share")
    answer = page.get_by_test_id("query-answer")
    expect(answer).to_have_attribute("data-state", "answered")
    rows = page.get_by_test_id("query-row")
    expect(rows).to_have_count(2)
    assert rows.first.locator("td").all_inner_texts()[:4] == ["2", "3", "3.40×", "85.0 %"]
    expect(page.get_by_test_id("query-footer")).to_contain_text("2 rows · 20 rows read in")
    expect(answer).to_contain_text("a double's")
    rows.first.get_by_role("button", name="Show").click()
    expect(rows.first).to_have_class("selected")
    page.locator("#panel-tab-experts").click()
    expect(page.get_by_test_id("layer-title")).to_contain_text("Layer 2")
    assert "l=2&e=3" in page.url


def test_an_error_has_its_caret_under_the_place(page: Page) -> None:
    _ask(page, "experts where lod > 8x")
    error = page.get_by_test_id("query-error")
    expect(error.locator("p")).to_contain_text("did you mean `load`?")
    assert error.locator("pre").inner_text() == "  experts where lod > 8x\n                ^^^"


def test_the_arrows_bring_back_what_was_asked(page: Page) -> None:
    for text in ("layers limit 1", "experts limit 2"):
        _ask(page, text)
        expect(page.get_by_test_id("query-answer").first).to_contain_text(text)
    line = page.locator("#query-line")
    line.fill("experts by")
    line.press("Escape")
    for key, shown in (
        ("ArrowUp", "experts limit 2"),
        ("ArrowUp", "layers limit 1"),
        ("ArrowUp", "layers limit 1"),
        ("ArrowDown", "experts limit 2"),
        ("ArrowDown", "experts by"),
    ):
        line.press(key)
        expect(line).to_have_value(shown)


def test_columns_are_completed(page: Page) -> None:
    line = page.locator("#query-line")
    line.press_sequentially("exp")
    expect(page.locator(".query-words").get_by_role("option")).to_have_text(["experts"])
    line.press("Tab")
    expect(line).to_have_value("experts ")
    line.press_sequentially("where ass")
    expect(page.locator(".query-words").get_by_role("option")).to_have_text(["assignments"])
    line.press("ArrowDown")
    line.press("Enter")
    expect(line).to_have_value("experts where assignments ")
    line.press_sequentially("= 17")
    line.press("Enter")
    expect(page.get_by_test_id("query-row")).to_have_count(1)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
def test_nothing_is_wider_than_the_window(
    url: str, session_id: str, tmp_path: Path, size: tuple[int, int], *, dark: bool
) -> None:
    with open_page(url, session_id, width=size[0], height=size[1], dark=dark) as page:
        page.locator("#panel-tab-console").click()
        page.locator("#query-line").wait_for()
        _ask(page, "experts order by load desc limit 12")
        expect(page.get_by_test_id("query-row")).to_have_count(12)
        _ask(page, "experts where lod > 8x")
        expect(page.get_by_test_id("query-error")).to_be_visible()
        page.screenshot(path=tmp_path / "console.png")
        too_wide = page.evaluate(
            """() => [...document.querySelectorAll(".app *")].filter(element => {
                const box = element.getBoundingClientRect();
                const isClipped = element.closest(".table-scroll, .visually-hidden, svg, .status, .skip, pre");
                return !isClipped && box.width > 0 && box.right > innerWidth + 1;
            }).map(element => element.className || element.tagName)"""
        )
        assert too_wide == []
