"""The page in a browser over a session of two stacks, four ranks, a layer that was not seen, and training series."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from e2e.page import open_page
from integration.page.encoder_decoder_session import LAYERS, UNSEEN, EncoderDecoderDouble, expert_counts
from integration.page.served_page import served_page
from playwright.sync_api import Page, expect
from servers import eventually

from moe_debugger.v1 import routing_pb2
from moe_debugger.wire.ids import new_id

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

WIDE, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def session_id() -> str:
    return new_id()


@pytest.fixture(scope="module")
def analyzer(session_id: str) -> EncoderDecoderDouble:
    return EncoderDecoderDouble(session_id)


@pytest.fixture(scope="module")
def url(analyzer: EncoderDecoderDouble) -> Iterator[str]:
    with served_page(analyzer) as address:
        yield address


@pytest.fixture
def page(url: str, session_id: str, analyzer: EncoderDecoderDouble) -> Iterator[Page]:
    analyzer.has_series, analyzer.series_error = True, ""
    with open_page(url, session_id, width=WIDE[0], height=WIDE[1]) as opened:
        opened.get_by_test_id("unseen-layers").wait_for()
        yield opened


def test_layers_of_two_stacks_with_their_own_experts(page: Page) -> None:
    rows = page.get_by_test_id("layer-tokens").all_inner_texts()
    assert rows == ["enc L0", "enc L1", "dec L2", "dec L3", "dec L4 attn"]
    cells = page.get_by_test_id("expert-cell").evaluate_all(
        "cells => cells.map(cell => [cell.dataset.layer, cell.dataset.expert, cell.dataset.count].map(Number))"
    )
    for index, _, _, _, num_experts, *_ in LAYERS:
        shown = [count for layer, _, count in cells if layer == index]
        assert shown == ([] if index == UNSEEN else expert_counts(index).tolist())
        assert index == UNSEEN or len(shown) == num_experts
    expect(page.locator(".heatmap .panel-head")).to_contain_text("5 layers × 4–16 experts · top-1–2")


def test_a_layer_that_was_not_seen_is_unknown_and_not_zero(page: Page) -> None:
    expect(page.get_by_test_id("unseen-layers")).to_contain_text("Not seen: dec L3.")
    expect(page.get_by_test_id("unseen-row")).to_have_attribute("data-layer", str(UNSEEN))
    heatmap = page.locator(".heatmap-canvas")
    heatmap.focus()
    for _ in range(UNSEEN):
        page.keyboard.press("ArrowDown")
    page.locator("#sidebar-tab-layer").click()
    expect(page.get_by_test_id("layer-title")).to_have_text("Layer 3 · decoder layer 1, MLP")
    expect(page.get_by_test_id("layer-unseen")).to_contain_text("it is not zero")
    expect(page.get_by_test_id("layer-facts")).to_contain_text(re.compile("Tokens routed– top-2"))
    assert page.locator(".expert-bars button").count() == 0


def test_zero_and_shared_experts_are_named_and_no_load(page: Page) -> None:
    page.locator(".heatmap-canvas").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.locator("#sidebar-tab-layer").click()
    aside = page.get_by_test_id("layer-aside")
    expect(aside).to_contain_text("Zero experts Z0–Z1")
    expect(aside).to_contain_text("60 slots")
    expect(aside).to_contain_text("Shared expert S0")
    names = page.locator(".expert-bars button > :first-child").all_inner_texts()
    assert sorted(names) == [f"E{expert}" for expert in range(8)]


def test_ranks_their_replicas_and_their_load(page: Page) -> None:
    page.locator("#sidebar-tab-capture").click()
    rows = page.get_by_test_id("rank")
    expect(rows).to_have_count(4)
    shown = [row.locator("td").all_inner_texts() for row in rows.all()]
    assert [row[:4] for row in shown] == [[str(n // 2), "0", str(n % 2), "0"] for n in range(4)]
    assert [row[4] for row in shown] == ["780 decisions"] * 3 + ["replica of 2"]
    assert [row[5] for row in shown] == ["✕ 1 failed", "✓ passes", "✓ passes", "✓ passes"]
    by_rank = np.zeros((len(LAYERS), 2), np.int64)
    for row, (index, _, _, _, num_experts, *_) in enumerate(LAYERS):
        np.add.at(by_rank[row], np.arange(num_experts) * 2 // num_experts, expert_counts(index))
    worst = (by_rank.max(axis=1) / np.maximum(by_rank.mean(axis=1), 1)).max()
    expect(page.get_by_test_id("worst-rank")).to_have_text(f"dec L4 attn: ep 0 has {worst:.2f}× of the mean")
    total = by_rank.sum(axis=0)
    expect(page.get_by_test_id("ranks-sum")).to_contain_text(f"max/mean {total.max() / total.mean():.2f}×")


def test_a_failed_check_is_red_and_says_what_it_saw(page: Page) -> None:
    page.locator("#sidebar-tab-capture").click()
    failed = page.locator('[data-testid="health-check"][data-state="failed"]')
    expect(failed).to_have_count(1)
    expect(failed).to_have_attribute("data-check", "layers")
    expect(failed).to_contain_text("its hook saw 0 of the 24 tokens that the decoder saw")
    # Sources without a fault are folded where there are many.
    opened = page.locator('[data-testid="source"][open]')
    expect(opened).to_have_count(1)


def test_training_is_drawn_by_global_step_and_grows(page: Page, analyzer: EncoderDecoderDouble) -> None:
    analyzer.num_steps = 120
    page.locator("#panel-tab-training").click()
    charts = page.get_by_test_id("series-chart")
    expect(charts).to_have_count(6)
    assert [chart.get_attribute("data-series") for chart in charts.all()] == [
        "loss", "eval_loss", "lr", "balance_loss", "balance_coef", "grad_norm",
    ]  # fmt: skip
    loss = page.locator('[data-series="loss"]')
    expect(loss).to_have_attribute("data-lines", "2")
    assert all(path.startswith("M") for path in loss.locator("path.series-line").evaluate_all(_PATHS))
    expect(loss.get_by_test_id("series-step")).to_have_text("step 120")
    heat = page.locator('[data-testid="series-heat"][data-series="router_gradient_norm"]')
    expect(heat).to_have_attribute("data-rows", "5")
    assert _is_painted(page)
    before = loss.locator("path.series-line").evaluate_all(_PATHS)
    analyzer.num_steps = 260
    expect(loss.get_by_test_id("series-step")).to_have_text("step 260", timeout=15_000)
    assert loss.locator("path.series-line").evaluate_all(_PATHS) != before
    # The selection bias is that of the selected layer.
    heat.get_by_role("img").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator('[data-series="selection_bias"]')).to_have_attribute("data-lines", "2")


def test_training_by_keyboard_and_as_tables(page: Page, analyzer: EncoderDecoderDouble) -> None:
    analyzer.num_steps = 120
    page.locator("#panel-tab-training").click()
    page.locator('[data-series="loss"] .series-plot').focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_test_id("training-spoken")).to_contain_text("step 2: Loss")
    page.keyboard.press("t")
    rows = page.get_by_test_id("series-table").locator("tbody tr")
    expect(rows).to_have_count(120)
    expect(rows.first).to_contain_text("120")
    layers = page.get_by_test_id("layer-series-table").locator("tbody tr")
    expect(layers.nth(UNSEEN)).to_contain_text("nothing to read")
    page.locator(".series-experts summary").click()
    expect(page.get_by_test_id("expert-series-table").locator("tbody tr")).to_have_count(16)


def test_no_training_tab_without_series_and_words_behind_a_link(
    url: str, session_id: str, analyzer: EncoderDecoderDouble
) -> None:
    analyzer.has_series = False
    with open_page(url, session_id) as page:
        page.get_by_test_id("unseen-layers").wait_for()
        expect(page.locator("#panel-tab-training")).to_have_count(0)
        page.goto(f"{url}#/training?s={session_id}")
        expect(page.get_by_test_id("training-empty")).to_contain_text("No training series")
        analyzer.series_error = "the analyzers restart"
        expect(page.get_by_test_id("training-error")).to_contain_text("the analyzers restart", timeout=15_000)
        analyzer.has_series, analyzer.series_error = True, ""
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_test_id("series-chart").first).to_be_visible()


def test_the_counts_level_says_what_is_missing(url: str, session_id: str, analyzer: EncoderDecoderDouble) -> None:
    analyzer.level = routing_pb2.CAPTURE_LEVEL_COUNTS
    try:
        with open_page(url, session_id) as page:
            expect(page.get_by_test_id("counts-only")).to_contain_text("no routes of single tokens")
            page.locator("#sidebar-tab-layer").click()
            expect(page.get_by_test_id("layer-facts")).to_contain_text("not captured not at level “counts”")
            page.locator("#sidebar-tab-capture").click()
            expect(page.get_by_test_id("level-note").first).to_contain_text("Sums by layer and expert only")
    finally:
        analyzer.level = routing_pb2.CAPTURE_LEVEL_ROUTES


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
def test_nothing_is_wider_than_the_window(
    url: str, session_id: str, analyzer: EncoderDecoderDouble, size: tuple[int, int], *, dark: bool
) -> None:
    analyzer.has_series, analyzer.series_error = True, ""
    with open_page(url, session_id, width=size[0], height=size[1], dark=dark) as page:
        page.get_by_test_id("unseen-layers").wait_for()
        assert page.evaluate(_TOO_WIDE) == []
        page.locator("#panel-tab-training").click()
        page.locator('[data-series="router_weight_norm"]').wait_for()
        eventually(lambda: _is_painted(page), 10)
        assert page.evaluate(_TOO_WIDE) == []


_TOO_WIDE = """() => [...document.querySelectorAll(".app *")].filter(element => {
    const box = element.getBoundingClientRect();
    const isClipped = element.closest(".table-scroll, .visually-hidden, svg, .status, .skip");
    return !isClipped && box.width > 0 && box.right > innerWidth + 1;
}).map(element => element.className || element.tagName)"""
_PATHS = "paths => paths.map(path => path.getAttribute('d'))"


def _is_painted(page: Page) -> bool:
    """Whether the heatmap of the layers has more than one colour."""
    colours = page.locator(".series-cells").first.evaluate(
        """canvas => new Set(new Uint32Array(
            canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
    )
    return int(colours) > 3
