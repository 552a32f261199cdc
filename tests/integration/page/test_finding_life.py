"""Findings from a real analyzer to two tabs of a browser: acknowledged, silenced, closed, opened again."""

import asyncio
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from analyzer_process import Analyzer
from e2e.page import open_page
from integration.page.served_page import served_fleet
from playwright.sync_api import Locator, Page, expect
from routing_ledger import LedgerSource, connect, open_session, publish
from servers import NatsServer, ValkeyServer

from moe_analyzer.findings import QUIET_SECONDS_TO_CLOSE
from moe_debugger.v1 import routing_pb2 as routing

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

PROBLEM = "hooks of layer 1 are gone"
# The gateway shows within a second what the analyzer knows; the rest is for a busy machine.
SOON_MS = 15_000
SHOTS = os.environ.get("MOE_TEST_SCREENSHOTS")


class LiveSession:
    """A session of one source, which sends from a thread of its own."""

    def __init__(self, nats: NatsServer, name: str) -> None:
        self._nats_url = nats.url
        self._thread = ThreadPoolExecutor(1)
        self.session_id = str(self._run(self._open(name)))
        self._source = LedgerSource(self.session_id)
        self._manifest = [self._source.manifest()]

    def _run(self, work: Any) -> Any:
        return self._thread.submit(asyncio.run, work).result(60)

    async def _open(self, name: str) -> str:
        client = await connect(self._nats_url)
        session_id = await open_session(client, name)
        await client.close()
        return session_id

    def send(self, problem: str = "", seconds: int = 1) -> None:
        """One batch and one status each second; the status reports a problem, or none."""
        self._run(self._send(problem, seconds))

    async def _send(self, problem: str, seconds: int) -> None:
        client = await connect(self._nats_url)
        for second in range(seconds):
            status = routing.SourceStatus(is_healthy=not problem, problems=[problem] if problem else [])
            messages = [*self._manifest, self._source.batch(), self._source.message(status=status)]
            self._manifest = []
            for message in messages:
                await publish(client.jetstream(), message)
            if second + 1 < seconds:
                await asyncio.sleep(1)
        await client.close()

    def close(self) -> None:
        self._thread.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("findings")


@pytest.fixture(scope="module")
def nats() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="module")
def analyzer(nats: NatsServer, folder: Path) -> Iterator[Analyzer]:
    with ValkeyServer() as valkey:
        analyzer = Analyzer(nats, valkey, folder).start()
        yield analyzer
        analyzer.close()


@pytest.fixture(scope="module")
def url(nats: NatsServer, analyzer: Analyzer) -> Iterator[str]:
    with served_fleet(nats.url, analyzer.port) as address:
        yield address


@pytest.fixture
def session(nats: NatsServer, analyzer: Analyzer, request: pytest.FixtureRequest) -> Iterator[LiveSession]:
    session = LiveSession(nats, request.node.name[:100])
    session.send(PROBLEM)
    yield session
    session.close()


def _row(page: Page) -> Locator:
    return page.locator('[data-testid="finding"][data-code="capture_unhealthy"]').first


def _expect_state(page: Page, state: str) -> None:
    expect(_row(page)).to_have_attribute("data-state", state, timeout=SOON_MS)


def _open_tabs(page: Page, url: str, session_id: str) -> tuple[Page, Page]:
    browser = page.context.browser
    assert browser is not None
    # A profile of its own: as of another person.
    other = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="dark")
    other.goto(f"{url}#/console?s={session_id}")
    page.locator("#panel-tab-console").click()
    for tab in (page, other):
        _expect_state(tab, "open")
    return page, other


def test_marked_in_one_tab_by_keyboard_it_is_seen_in_another_and_after_a_restart(
    url: str, session: LiveSession, analyzer: Analyzer
) -> None:
    with open_page(url, session.session_id) as page:
        here, there = _open_tabs(page, url, session.session_id)
        badge = there.locator("#panel-tab-console .tab-count.warning")
        expect(badge).to_have_text("1")
        _row(here).locator(".expander").press("Enter")
        expect(here.get_by_test_id("finding-life")).to_contain_text(re.compile(r"Opened \d\d:\d\d:\d\d"))
        acknowledge = here.get_by_role("button", name="Acknowledge: ")
        acknowledge.press("Enter")
        _expect_state(here, "acknowledged")
        _expect_state(there, "acknowledged")
        expect(badge).to_have_text("1")
        expect(here.get_by_test_id("acknowledge")).to_be_focused()
        here.get_by_role("button", name="Silence 1 h: ").press("Space")
        _expect_state(here, "silenced")
        _expect_state(there, "silenced")
        expect(badge).to_have_count(0)
        expect(here.get_by_test_id("finding-life")).to_contain_text("acknowledged by local user")
        expect(here.get_by_test_id("finding-life")).to_contain_text("silenced by local user until")
        _shoot(here, "wide-dark-console")

        analyzer.kill()
        analyzer.start()
        there.reload()
        _expect_state(there, "silenced")
        there.locator("#panel-tab-experts").click()
        there.get_by_role("button", name="Show 1 closed or silenced finding").click()
        diagnosis = there.get_by_test_id("diagnosis")
        expect(diagnosis).to_contain_text("acknowledged by local user")
        _shoot(there, "wide-dark-sidebar")
        diagnosis.get_by_role("button", name="Unsilence: ").click()
        _expect_state(here, "acknowledged")
        expect(badge).to_have_text("1", timeout=SOON_MS)
        diagnosis.get_by_role("button", name="Take back: ").click()
        _expect_state(here, "open")


def test_closed_and_open_again_it_is_news(url: str, session: LiveSession) -> None:
    with open_page(url, session.session_id) as page:
        here, there = _open_tabs(page, url, session.session_id)
        _row(here).locator(".expander").click()
        here.get_by_test_id("acknowledge").click()
        _expect_state(there, "acknowledged")
        session.send("", QUIET_SECONDS_TO_CLOSE // 2)
        expect(here.get_by_test_id("finding-life")).to_contain_text(f"of {QUIET_SECONDS_TO_CLOSE} s", timeout=SOON_MS)
        session.send("", QUIET_SECONDS_TO_CLOSE + 4)
        _expect_state(here, "closed")
        _expect_state(there, "closed")
        expect(there.locator("#panel-tab-console .tab-count")).to_have_count(0)
        there.get_by_role("button", name="1 closed").click()
        session.send(PROBLEM)
        _expect_state(here, "open")
        expect(here.get_by_test_id("finding-life")).to_contain_text("came back once")
        # Under the chip of the closed ones there is nothing left.
        expect(_row(there)).to_have_count(0)


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
def test_on_a_phone_the_buttons_are_large_and_nothing_is_wider_than_the_window(
    url: str, session: LiveSession, *, dark: bool
) -> None:
    with open_page(url, session.session_id, width=390, height=844, dark=dark) as page:
        diagnosis = page.get_by_test_id("diagnosis")
        expect(diagnosis).to_be_visible(timeout=SOON_MS)
        for name in ("acknowledge", "silence"):
            box = diagnosis.get_by_test_id(name).bounding_box()
            assert box is not None
            assert box["height"] >= 40
        assert page.evaluate(_TOO_WIDE) == []
        # What scrolls is the card: the document is no longer than the window, so it cannot be scrolled to nothing.
        assert page.evaluate("document.documentElement.scrollHeight - innerHeight") == 0
        expect(page.get_by_test_id("false-alarms")).to_contain_text("of 1,000 windows (stated)")
        _shoot(page, f"phone-{'dark' if dark else 'light'}-card")
        diagnosis.get_by_test_id("silence").click()
        page.locator("#panel-tab-console").click()
        _expect_state(page, "silenced")
        expect(page.locator("#panel-tab-console .bubble")).to_have_count(0)
        _row(page).locator(".expander").click()
        expect(page.get_by_test_id("finding-life")).to_be_visible()
        assert page.evaluate(_TOO_WIDE) == []
        _shoot(page, f"phone-{'dark' if dark else 'light'}-console")


_TOO_WIDE = """() => [...document.querySelectorAll(".app *")].filter(element => {
    const box = element.getBoundingClientRect();
    const isClipped = element.closest(".table-scroll, .visually-hidden, svg, .status, .skip");
    return !isClipped && box.width > 0 && box.right > innerWidth + 1;
}).map(element => element.className || element.tagName)"""


def _shoot(page: Page, name: str) -> None:
    """Keep a picture for people, where somebody asked for them."""
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"findings-{name}.png")
