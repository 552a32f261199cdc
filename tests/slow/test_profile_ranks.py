"""Two real processes: what a rank waits for the other one is seen at the rank that waits."""

import socket
import subprocess
import sys
from pathlib import Path

import profiled_ranks
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_rank_waits_for_the_slower_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, profiled_ranks.__file__]
    ranks = [subprocess.Popen([*command, str(rank), str(port), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(150) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    quick, slow = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert float(quick[0]) == float(slow[0]) == 0.0, "the first layer has no collective"
    assert float(quick[1]) > 0.6 * profiled_ranks.SLEEP_S * 1e3
    assert float(slow[1]) < float(quick[1])
    assert len(quick) == 2, "nothing hinders the view"
