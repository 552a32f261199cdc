"""A long run is taken up where it ended."""

from pathlib import Path

from oracle.compare import Comparison
from oracle.outcome import Impossible, NotAccepted, Outcome, Results


def _raises(error: Exception) -> Comparison:
    raise error


def _never() -> Comparison:
    raise AssertionError("must not run again")


def test_a_cell_that_is_exact_or_impossible_runs_once_and_a_wrong_one_again(tmp_path: Path) -> None:
    results = Results(lambda _: "a", tmp_path / "results.jsonl")
    assert results.once("mixtral", "eager fp32", lambda: Comparison(num_rows=3)).status == "exact"
    assert results.once("mixtral", "eager fp16", lambda: _raises(Impossible("no kernel"))).detail == "no kernel"
    assert results.once("mixtral", "batched_mm fp32", lambda: _raises(NotAccepted("never"))).status == "not accepted"
    assert results.once("mixtral", "eager bf16", lambda: _raises(ValueError("broken"))).status == "wrong"
    again = Results(lambda _: "a", tmp_path / "results.jsonl")
    assert again.once("mixtral", "eager fp32", _never) == Outcome("mixtral", "eager fp32", "exact", num_rows=3)
    assert again.once("mixtral", "eager fp16", _never).status == "impossible"
    assert again.once("mixtral", "batched_mm fp32", _never).status == "not accepted"
    assert again.once("mixtral", "eager bf16", lambda: Comparison(num_rows=5)).status == "exact"
    assert again.read()["mixtral", "eager bf16"].num_rows == 5


def test_results_of_other_sources_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(lambda _: "old", path).once("olmoe", "eager fp32", lambda: Comparison(num_rows=3))
    assert Results(lambda _: "new", path).read() == {}
    assert Results(lambda _: "new", path).once("olmoe", "eager fp32", lambda: Comparison(num_rows=4)).num_rows == 4
    assert Results(lambda _: "old", path).read()["olmoe", "eager fp32"].num_rows == 3


def test_half_a_line_of_a_killed_run_is_passed_over(tmp_path: Path) -> None:
    results = Results(lambda _: "a", tmp_path / "results.jsonl")
    results.add([Outcome("olmoe", "eager fp32", "exact")])
    with results.path.open("a") as file:
        file.write('{"key": "a", "arch": "mixt')
    assert list(results.read()) == [("olmoe", "eager fp32")]
    # The next line starts anew, so it is not lost with the half one.
    results.add([Outcome("dbrx", "eager fp32", "exact")])
    assert set(results.read()) == {("olmoe", "eager fp32"), ("dbrx", "eager fp32")}


def test_a_comparison_without_rows_is_not_exact(tmp_path: Path) -> None:
    assert Results(lambda _: "a", tmp_path / "results.jsonl").once("olmoe", "eager fp32", Comparison).status == "wrong"
