"""A recording made on the page while the model generates equals the model's own count."""

import re

import numpy as np
import numpy.typing as npt
import pytest
from e2e.fleet import Fleet, eventually
from e2e.page import open_page, table_counts
from playwright.sync_api import expect

from moe_debugger import JoinedRecording, open_recording


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_what_is_recorded_while_the_model_generates_is_what_the_model_counted(fleet: Fleet) -> None:
    # One call before the recording, which must not be in it.
    early = fleet.generate("before: ", 8)
    with open_page(fleet.endpoints["page"], early.session_id) as page:
        button = page.locator('.toolbar [data-testid="record"]')
        expect(button).to_have_attribute("data-state", "idle")

        def shows_all() -> bool:
            return bool(table_counts(page).sum() == sum(part.counts.sum() for part in fleet.recount().values()))

        eventually(shows_all, 30, "the page shows what was counted before")
        before = table_counts(page)
        button.click()
        expect(button).to_have_attribute("data-state", "recording")
        prompts = ["def add(a, b):\n", "once upon a time", "1 + 1 ="]
        done = [fleet.generate(prompt, 40) for prompt in prompts]
        eventually(shows_all, 30, "the page shows what was counted meanwhile")
        shown = table_counts(page) - before
        button.click()
        expect(button).to_have_attribute("data-state", "idle", timeout=30_000)
        page.get_by_test_id("recordings").click()
        row = page.get_by_test_id("recording").first
        expect(row).to_have_attribute("data-state", "finished")
        expect(row).to_have_attribute("data-rows", re.compile(r"^\d+$"))
        path, num_rows = row.get_attribute("data-path"), row.get_attribute("data-rows")
        assert path is not None
    recording = open_recording(path)
    assert isinstance(recording, JoinedRecording)
    assert recording.is_whole
    rows = recording.decisions()
    assert str(len(rows)) == num_rows
    recount = fleet.recount()
    expected: npt.NDArray[np.int64] = np.sum([recount[one.request_id].counts for one in done], axis=0)
    counts = np.zeros_like(expected)
    for layer in range(len(counts)):
        ids = rows.expert_ids[~rows.is_padding & (rows.layer_index == layer)].reshape(-1)
        counts[layer] = np.bincount(ids[ids >= 0], minlength=counts.shape[1])
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(counts, shown)
    # And request by request, whose tokens are their prompt and what was generated but for the last.
    for one in done:
        own = (rows.request_id == one.request_id) & (rows.layer_index == 0)
        assert np.sort(rows.position[own]).tolist() == list(range(one.num_prompt_tokens + one.num_generated_tokens - 1))
    assert early.request_id not in rows.request_ids
