"""Recording and replaying on a whole fleet: by the page, by the command line, and back from the files."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from e2e.fleet import eventually, snapshot_counts
from e2e.page import open_page, table_counts
from fleet_process import FleetProcess
from playwright.sync_api import Page, expect
from routing_ledger import LedgerSource, connect, open_session, publish

from moe_debugger import JoinedRecording, Recording, open_recording
from moe_debugger.recording import replay_to_fleet
from moe_debugger.v1 import gateway_pb2, gateway_pb2_grpc, session_pb2

pytestmark = pytest.mark.timeout(240)

T = TypeVar("T")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    running = FleetProcess(tmp_path_factory.mktemp("fleet"), "--no-worker")
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine beside the loop that Playwright has in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result(60)


class Session:
    """A session of ledger sources; each call has a connection of its own."""

    def __init__(self, fleet: FleetProcess, name: str, num_sources: int = 2) -> None:
        self.nats = fleet.endpoints["nats"]
        self.name = name

        async def begin() -> str:
            client = await connect(self.nats)
            session_id = await open_session(client, name)
            await client.close()
            return session_id

        self.session_id = _run(begin())
        self.sources = [LedgerSource(self.session_id, seed=seed) for seed in range(num_sources)]
        self._send([source.manifest() for source in self.sources])

    def publish(self, num_batches: int = 5) -> None:
        """Send batches of every source, and a status."""
        messages = [source.batch() for _ in range(num_batches) for source in self.sources]
        self._send([*messages, *(source.status() for source in self.sources)])

    def close(self) -> None:
        self._send([source.goodbye(closes_session=True) for source in self.sources])

    def _send(self, messages: list[tuple[str, bytes, str]]) -> None:
        async def send() -> None:
            client = await connect(self.nats)
            for message in messages:
                await publish(client.jetstream(), message)
            await client.close()

        _run(send())

    def counts(self) -> npt.NDArray[np.int64]:
        """Return [layers, experts] of all that was sent."""
        by_source = [list(source.expected_counts().values()) for source in self.sources]
        counts: npt.NDArray[np.int64] = np.array(by_source, np.int64).sum(axis=0)
        return counts


def recorded_counts(recording: Recording, experts: int = 8) -> npt.NDArray[np.int64]:
    rows = recording.decisions()
    counts = np.zeros((len(recording.layers()), experts), np.int64)
    valid = ~rows.is_padding
    for layer in range(len(counts)):
        ids = rows.expert_ids[valid & (rows.layer_index == layer)]
        counts[layer] = np.bincount(ids[ids >= 0], minlength=experts)
    return counts


def snapshot(fleet: FleetProcess, session_id: str) -> session_pb2.SessionSnapshot:
    with grpc.insecure_channel(fleet.endpoints["grpc"]) as channel:
        stub = gateway_pb2_grpc.DebuggerServiceStub(channel)
        return stub.GetSession(gateway_pb2.GetSessionRequest(session_id=session_id), timeout=10).snapshot


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "moe_debugger.cli", *arguments], capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.browser
def test_what_the_page_records_equals_what_it_shows(fleet: FleetProcess) -> None:
    session = Session(fleet, "on the page")
    with open_page(fleet.endpoints["page"], session.session_id) as page:
        button = page.locator('.toolbar [data-testid="record"]')
        expect(button).to_have_attribute("data-state", "idle")
        button.click()
        expect(button).to_have_attribute("data-state", "recording")
        session.publish(20)
        eventually(lambda: bool(table_counts(page).sum() == session.counts().sum()), 20, "the page shows all")
        shown = table_counts(page)
        np.testing.assert_array_equal(shown, session.counts())
        expect(page.locator(".record-clock")).to_have_text(re.compile(r"^0:0[1-9]$"), timeout=10_000)
        expect(page.locator(".toolbar .record-size")).not_to_have_text("0 B", timeout=15_000)
        button.click()
        expect(button).to_have_attribute("data-state", "idle", timeout=20_000)
        page.get_by_test_id("recordings").click()
        row = page.get_by_test_id("recording").first
        expect(row).to_have_attribute("data-state", "finished")
        expect(row).to_have_attribute("data-rows", str(sum(source.num_decisions for source in session.sources)))
        expect(row).to_contain_text("on the page")
        expect(row).to_contain_text("2 sources")
        path = row.get_attribute("data-path")
        assert path is not None
        row.locator("summary").click()
        for name in ("report", "diff", "query", "replay"):
            expect(row.locator(f'[data-command="{name}"] code')).to_contain_text(f"moe-debugger {name}")
        expect(row.locator('[data-command="report"] code')).to_have_text(f"moe-debugger report {path}")
        recording = open_recording(path)
        # Not one more, not one less, at any layer or expert.
        np.testing.assert_array_equal(recorded_counts(recording), shown)
        assert recording.is_whole
        assert Path(path).parent == fleet.data / "recordings"
        page.keyboard.press("Escape")
        expect(page.get_by_test_id("recording-list")).to_have_count(0)


def _no_overflow(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@pytest.mark.browser
@pytest.mark.parametrize(("size", "dark"), [((1440, 900), False), ((390, 844), True)], ids=["light", "phone"])
def test_the_list_fits_its_page(fleet: FleetProcess, size: tuple[int, int], dark: bool) -> None:
    session = Session(fleet, f"a session with quite a long name, {size[0]} pixels")
    with open_page(fleet.endpoints["page"], session.session_id, width=size[0], height=size[1], dark=dark) as page:
        button = page.get_by_test_id("record").first
        expect(button).to_be_enabled()
        assert _no_overflow(page)
        button.click()
        expect(button).to_have_attribute("data-state", "recording")
        session.publish(2)
        assert _no_overflow(page)
        button.click()
        expect(button).to_have_attribute("data-state", "idle", timeout=20_000)
        page.get_by_test_id("recordings").click()
        page.get_by_test_id("recording").first.locator("summary").click()
        assert _no_overflow(page)
        dialog = page.get_by_test_id("recording-list")
        assert dialog.evaluate("one => one.scrollWidth <= one.clientWidth")
        if folder := os.environ.get("MOE_TEST_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/recordings-{size[0]}.png")
        dialog.get_by_role("button", name="Close").click()


@pytest.mark.browser
def test_a_closed_session_cannot_be_recorded_on_the_page(fleet: FleetProcess) -> None:
    session = Session(fleet, "closed")
    session.publish(1)
    session.close()
    with open_page(fleet.endpoints["page"], session.session_id) as page:
        expect(page.locator('.toolbar [data-testid="record"]')).to_be_disabled(timeout=15_000)


def test_the_command_line_records_until_ctrl_c_and_fetches(fleet: FleetProcess, tmp_path: Path) -> None:
    session = Session(fleet, "by command")
    session.publish(3)
    before = session.counts()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "moe_debugger.cli", "record", session.name),
            *("--fleet", fleet.endpoints["grpc"], "--out", str(tmp_path / "rec"), "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert "is recorded to" in process.stderr.readline()
        assert "Ctrl-C stops it" in process.stderr.readline()
        session.publish(7)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["state"] == "finished"
    assert answer["num_rows"] == 7 * 2 * 36
    recording = open_recording(tmp_path / "rec")
    assert isinstance(recording, JoinedRecording)
    assert recording.verify().is_whole
    np.testing.assert_array_equal(recorded_counts(recording), session.counts() - before)
    assert f"moe-debugger report {tmp_path / 'rec'}" in err
    assert (tmp_path / "rec").stat().st_mode & 0o077 == 0


def test_the_command_line_starts_lists_stops_and_fetches(fleet: FleetProcess, tmp_path: Path) -> None:
    session = Session(fleet, "detached", num_sources=1)
    here = ("--fleet", fleet.endpoints["grpc"])
    begun = json.loads(run("record", "detached", *here, "--detach", "--name", "night run", "--json").stdout)
    assert begun["state"] == "recording"
    session.publish(4)
    again = json.loads(run("record", session.session_id, *here, "--detach", "--json").stdout)
    assert again["recording_id"] == begun["recording_id"]
    stopped = json.loads(run("record", "detached", *here, "--stop", "--json").stdout)
    assert (stopped["state"], stopped["num_rows"]) == ("finished", 4 * 36)
    listed = json.loads(run("record", *here, "--list", "--json").stdout)
    assert {one["recording_id"]: one["name"] for one in listed}[begun["recording_id"]] == "night run"
    assert "night run" in run("record", *here, "--list").stdout
    run("record", *here, "--fetch", begun["recording_id"], "--out", str(tmp_path / "rec"))
    np.testing.assert_array_equal(recorded_counts(open_recording(tmp_path / "rec")), session.counts())
    for arguments, text in (
        (("record", "nobody", *here), "session 'nobody' is not open"),
        (("record", "nobody", "--stop", *here), "no such recording runs"),
        (("record", "detached", *here, "--out", str(tmp_path / "rec")), "nothing in it is overwritten"),
        (("record", "--list", "--stop", *here), "give one of them"),
        (("record", "--fetch", begun["recording_id"], *here), "needs --out"),
        (("record", "--fleet", "127.0.0.1:1"), "the fleet at 127.0.0.1:1"),
    ):
        assert text in run(*arguments, code=1).stderr.replace("\n", " ")


def test_a_duration_ends_it(fleet: FleetProcess) -> None:
    session = Session(fleet, "for a second", num_sources=1)
    started = time.monotonic()
    answer = json.loads(
        run("record", session.name, "--fleet", fleet.endpoints["grpc"], "--duration", "1", "--json").stdout
    )
    assert answer["state"] == "finished"
    assert time.monotonic() - started >= 1


def test_what_is_replayed_is_counted_as_it_was(fleet: FleetProcess, tmp_path: Path) -> None:
    session = Session(fleet, "to be played")
    stub_arguments = ("--fleet", fleet.endpoints["grpc"])
    run("record", session.name, *stub_arguments, "--detach")
    session.publish(12)
    run("record", session.name, *stub_arguments, "--stop", "--out", str(tmp_path / "rec"))
    recording = open_recording(tmp_path / "rec")
    printed = run("replay", str(tmp_path / "rec"), "--data", str(fleet.data), "--speed", "inf", "--session", "played")
    assert f"played {recording.manifest.num_rows:,} rows" in printed.stdout
    assert re.search(r"[\d,]+ rows/s, session [0-9a-z]{26}", printed.stdout)
    session_id = printed.stdout.split("session ")[-1].split()[0]

    def is_counted() -> session_pb2.SessionSnapshot | None:
        view = snapshot(fleet, session_id)
        return view if view.account.num_counted == recording.manifest.num_rows else None

    view = eventually(is_counted, 30, "all rows counted")
    np.testing.assert_array_equal(snapshot_counts(view), session.counts())
    original = snapshot(fleet, session.session_id)
    assert [x.num_padding_tokens for x in view.layers] == [x.num_padding_tokens for x in original.layers]
    assert [x.mean_router_entropy for x in view.layers] == pytest.approx(
        [x.mean_router_entropy for x in original.layers]
    )
    assert {source.kind for source in view.sources} == {"replay"}
    assert len(view.sources) == 2
    assert view.account.num_missing_messages == 0
    eventually(
        lambda: snapshot(fleet, session_id).session.state == session_pb2.SESSION_STATE_CLOSED, 15, "the session is over"
    )
    with grpc.insecure_channel(fleet.endpoints["grpc"]) as channel:
        stub = gateway_pb2_grpc.DebuggerServiceStub(channel)
        series = stub.GetSeries(gateway_pb2.GetSeriesRequest(session_id=session_id), timeout=10).series
        listed: Any = stub.ListRequests(gateway_pb2.ListRequestsRequest(session_id=session_id), timeout=10).requests
    assert {one.name for one in series} == {"loss"}
    tokens = {one.request_id: one.num_tokens for one in listed}
    sent: dict[str, int] = {}
    for source in session.sources:
        for name, number in source.request_tokens.items():
            sent[name] = sent.get(name, 0) + number
    assert tokens == sent


def test_a_replay_keeps_the_pace(fleet: FleetProcess, tmp_path: Path) -> None:
    session = Session(fleet, "paced", num_sources=1)
    run("record", session.name, "--fleet", fleet.endpoints["grpc"], "--detach")
    # The ledger's batches have no time of capture: give them some.
    for source in session.sources:
        messages = []
        for index in range(5):
            subject, payload, message_id = source.batch()
            message = _with_time(payload, 1_000_000_000_000 + index * 500_000_000)
            messages.append((subject, message, message_id))
        session._send(messages)
    run("record", session.name, "--fleet", fleet.endpoints["grpc"], "--stop", "--out", str(tmp_path / "rec"))
    recording = open_recording(tmp_path / "rec")
    done = replay_to_fleet(recording, fleet.endpoints["nats"], speed=2.0, session_name="paced again")
    assert done.recorded_s == 2.0
    assert 1.0 <= done.elapsed_s < 6.0
    assert (done.num_rows, done.num_dropped) == (5 * 36, {})


def _with_time(payload: bytes, captured_at_unix_ns: int) -> bytes:
    from moe_debugger.v1 import routing_pb2

    message = routing_pb2.SourceMessage.FromString(payload)
    message.batch.captured_at_unix_ns = captured_at_unix_ns
    return message.SerializeToString()
