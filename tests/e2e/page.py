"""The page in a real browser."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# Chromium as root has no sandbox; the rest keeps it from looking up hosts at start.
ARGUMENTS = [
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def open_page(
    url: str, session_id: str = "", *, width: int = 1440, height: int = 900, dark: bool = True
) -> Iterator[Page]:
    """Open the page at a session; fail on console errors, on CSP reports and on requests to other origins."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
            page.on(
                "request",
                lambda request: (
                    None
                    if request.url.startswith((url.rstrip("/"), "data:", "blob:"))
                    else problems.append(f"a request to {request.url}")
                ),
            )
            page.goto(url + (f"#/experts?s={session_id}" if session_id else ""))
            yield page
            assert not problems, problems
        finally:
            browser.close()


def table_counts(page: Page) -> npt.NDArray[np.int64]:
    """Return [layers, experts] as the page's table shows them; empty while there is no table."""
    cells = page.locator('[data-testid="expert-cell"]').evaluate_all(
        "cells => cells.map(cell => [cell.dataset.layer, cell.dataset.expert, cell.dataset.count].map(Number))"
    )
    if not cells:
        if page.locator('[data-testid="expert-table"]').count() == 0:
            page.keyboard.press("t")
        return np.empty((0, 0), np.int64)
    table = np.array(cells, np.int64)
    counts = np.full((table[:, 0].max() + 1, table[:, 1].max() + 1), -1, np.int64)
    counts[table[:, 0], table[:, 1]] = table[:, 2]
    return counts
