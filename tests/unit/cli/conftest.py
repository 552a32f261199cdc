"""The command line, run in this process."""

import sys
from typing import Protocol

import pytest

from moe_debugger.cli import main


class RunCli(Protocol):
    """Runs `moe-debugger` with arguments, checks its exit code, and returns standard output and error."""

    def __call__(self, *arguments: object, code: int = 0) -> tuple[str, str]: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    def run_main(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["moe-debugger", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, printed
        return printed.out, printed.err

    return run_main
