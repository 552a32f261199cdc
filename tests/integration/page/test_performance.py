"""The Performance panel in a browser, over a session whose times are known."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.page import open_page
from integration.page.profiled_session import NUM_EXPERTS, NUM_LAYERS, PARTS, ProfiledDouble
from integration.page.served_page import served_page
from playwright.sync_api import Page, expect

from moe_debugger.wire.ids import new_id

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

WIDE, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def session_id() -> str:
    return new_id()


@pytest.fixture(scope="module")
def analyzer(session_id: str) -> ProfiledDouble:
    return ProfiledDouble(session_id)


@pytest.fixture(scope="module")
def url(analyzer: ProfiledDouble) -> Iterator[str]:
    with served_page(analyzer) as address:
        yield address


@pytest.fixture(autouse=True)
def _as_at_first(analyzer: ProfiledDouble) -> None:
    analyzer.is_profiled, analyzer.is_measured, analyzer.has_slow_layer, analyzer.series_error = True, False, True, ""


def _look(page: Page, name: str) -> None:
    """Keep a picture where someone wants to look at it."""
    folder = os.environ.get("MOE_PAGE_PICTURES")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_times_by_layer_their_bottleneck_and_what_was_estimated(url: str, session_id: str) -> None:
    with open_page(url, session_id, width=WIDE[0], height=WIDE[1]) as page:
        expect(page.locator("#panel-tab-training")).to_have_count(0)
        page.locator("#panel-tab-performance").click()
        expect(page.get_by_test_id("perf-summary")).to_contain_text(
            "6.4 ms (median of the newest 256); profiling takes 2.3 %"
        )
        bars = page.get_by_test_id("perf-layers").locator(".perf-bar")
        expect(bars).to_have_count(NUM_LAYERS)
        widths = [float(box["width"]) for bar in bars.all() if (box := bar.bounding_box())]
        longest = max(sum(parts.values()) for parts in PARTS)
        assert widths == pytest.approx([widths[2] * sum(parts.values()) / longest for parts in PARTS], abs=1.5)
        routers = bars.first.locator(".perf-router").bounding_box()
        assert routers is not None
        assert routers["width"] == pytest.approx(widths[0] * 0.1, abs=1.5)
        expect(bars.first).to_have_attribute("aria-label", re.compile("Router 0.06 ms, Experts 0.41 ms"))
        expect(page.get_by_test_id("performance")).to_contain_text("not separable")
        expect(page.get_by_test_id("perf-bottlenecks")).to_contain_text(
            "L2 takes 5.00× the median of the other layers. At least 4.00×, from 256 calls."
        )
        expect(page.get_by_test_id("perf-bottlenecks").locator("li")).to_have_count(2)
        expect(page.locator("[data-kind=below_roof]")).to_contain_text(
            "reach 5.0 % of the machine's roof: neither reading weights nor computing is the limit. At most 7.0 %"
        )
        expect(page.locator("[data-kind=below_roof]")).to_contain_text("Give each call more tokens")
        expect(page.get_by_test_id("performance")).to_contain_text("median of 256 calls of the block")
        expect(page.get_by_test_id("perf-mark")).to_have_text("estimated")
        for words in (
            "Off by 12 % on the 49 of 254 calls",
            "up to 1,200 rows: 130 %",
            "up to 64 rows",
            "changed together",
        ):
            expect(page.get_by_test_id("perf-estimate")).to_contain_text(words)
        # An expert without rows has no time.
        expect(page.get_by_test_id("perf-experts").locator("dt")).to_have_count(NUM_EXPERTS - 1)
        expect(page.get_by_test_id("perf-roofline")).to_have_attribute("data-points", str(NUM_LAYERS))
        expect(page.get_by_test_id("perf-roofline").locator(".roof")).to_have_count(1)
        expect(page.get_by_test_id("perf-numbers")).to_contain_text("5.1 MiB")
        _look(page, "performance-dark")
        page.emulate_media(color_scheme="light")
        _look(page, "performance-light")
        page.keyboard.press("t")
        expect(page.get_by_test_id("perf-table").locator("tbody tr")).to_have_count(NUM_LAYERS)
        _look(page, "performance-table")
        page.keyboard.press("t")


def test_on_a_phone_nothing_is_wider_than_the_screen(url: str, session_id: str) -> None:
    with open_page(url, session_id, width=PHONE[0], height=PHONE[1]) as page:
        page.locator("#panel-tab-performance").click()
        expect(page.get_by_test_id("perf-layers").locator(".perf-bar")).to_have_count(NUM_LAYERS)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        overflow = page.get_by_test_id("performance").evaluate("element => element.scrollWidth - element.clientWidth")
        assert overflow <= 0
        _look(page, "performance-phone")


def test_measured_experts_carry_another_mark_and_a_bottleneck_goes(
    url: str, session_id: str, analyzer: ProfiledDouble
) -> None:
    analyzer.is_measured, analyzer.has_slow_layer = True, False
    with open_page(url, session_id, width=WIDE[0], height=WIDE[1]) as page:
        page.locator("#panel-tab-performance").click()
        expect(page.get_by_test_id("perf-mark")).to_have_text("measured")
        expect(page.get_by_test_id("perf-bottlenecks").locator("[data-kind=slow_layer]")).to_have_count(0)
        # All slow experts of the layer, the slowest first, and marked among its bars.
        slow = page.locator("[data-kind=slow_expert]")
        expect(slow).to_contain_text(["Expert 6 of L0 takes 8.00×", "Expert 1 of L0 takes 2.50×"])
        expect(slow.first).to_contain_text("At least 7.00×, from 120 calls.")
        remedies = page.get_by_test_id("perf-bottlenecks").get_by_text("Look at where its weights lie")
        expect(remedies).to_have_count(1)
        _look(page, "performance-experts")
        expect(page.get_by_test_id("perf-experts").locator("dt.perf-slow")).to_have_text(["E6", "E1"])
        expect(page.get_by_test_id("performance")).not_to_contain_text("Off by")


def test_no_tab_without_a_profile_and_words_behind_a_link(url: str, session_id: str, analyzer: ProfiledDouble) -> None:
    analyzer.is_profiled = False
    with open_page(url, session_id, width=WIDE[0], height=WIDE[1]) as page:
        expect(page.locator("#panel-tab-experts")).to_be_visible()
        expect(page.locator("#panel-tab-performance")).to_have_count(0)
        page.goto(f"{url}#/performance?s={session_id}")
        expect(page.get_by_test_id("perf-empty")).to_contain_text("MOE_COLLECTOR_PROFILING=true")
        analyzer.series_error = "the analyzers restart"
        page.reload()
        expect(page.get_by_test_id("perf-error")).to_contain_text("the analyzers restart", timeout=15_000)
