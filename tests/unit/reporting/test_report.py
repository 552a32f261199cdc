"""What a report says of recordings, sessions and analyses, that it goes to JSON and back, and that all is escaped."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import forwards, infos, material, name, record, sampled

import moe_debugger
from moe_debugger import Report, diff, open_recording, report
from moe_debugger.analysis import Analysis, EvidenceRow, Finding, FindingKind, Severity, Thresholds
from moe_debugger.analysis.step_loads import LoadSeries
from moe_debugger.errors import DependencyMissingError, InvalidInputError, UnsupportedFormatError
from moe_debugger.recording.manifest import ModelIdentity, Topology
from moe_debugger.reporting import html
from moe_debugger.reporting.content import ExplanationEntry
from moe_debugger.reporting.findings_text import lead_times
from moe_debugger.reporting.material import layer_range
from moe_debugger.reporting.texts import catalogue, sentence

SHAPE = (8, 2)
EVIL = "<script>alert('x')</script>\"&"
CONTROLS = "x\u202e\u200f\u2066\x1b[31m\x9b1mred"


def _forwards(num: int = 24, tokens: int = 64, preference: Any = 0.0, **options: Any) -> list[Any]:
    choices = [[sampled(3 * r + i, tokens, SHAPE, preference=preference) for i in range(2)] for r in range(num)]
    return forwards(choices, [8, 8], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recordings") / "whole", _forwards(), infos(SHAPE, SHAPE))


def test_the_header_says_what_was_recorded(whole: Path) -> None:
    made = report(open_recording(whole))
    assert made.title == "whole · tiny"
    facts = {fact.key: fact.value for fact in made.facts}
    assert facts["model"] == "models/tiny"
    assert facts["config"] == "a" * 64
    assert facts["rows"] == f"{24 * 64 * 2:,}"
    assert facts["requests"] == "24"
    assert facts["steps"] == "0 to 23"
    assert facts["level"] == "routes+tokens"
    assert facts["sampling"] == "100 % of requests"
    assert facts["started"] == "2023-11-14 22:13:20 UTC"
    assert facts["layers"] == "2 MoE layers (0–1) of 8 experts, top-2"
    assert [notice.tone for notice in made.notices] == ["good"]
    assert "ranks" not in facts


def test_gaps_drops_and_damage_are_said_first(tmp_path: Path) -> None:
    folder = record(
        tmp_path / "lost", _forwards(4), infos(SHAPE, SHAPE), ends=False,
        num_decisions_dropped={"buffer_full": 12}, sampling_rate=0.5,
    )  # fmt: skip
    made = report(open_recording(folder))
    tones = [notice.tone for notice in made.notices]
    assert tones == sorted(tones, key=["critical", "warning", "good", "info"].index)
    said = [notice.text.code for notice in made.notices]
    assert said[:2] == ["notice.unfinished", "notice.dropped"]
    assert "notice.sampled" in said
    capture = next(each for each in made.categories if each.key == "capture_quality")
    assert capture.score == 74
    text = made.to_html()
    assert text.index("12 decisions were dropped") < text.index("Audit")


def test_damage_is_reported_on_what_is_whole(tmp_path: Path) -> None:
    folder = record(tmp_path / "damaged", _forwards(6), infos(SHAPE, SHAPE))
    part = next((folder / "rows").glob("part-*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    made = report(open_recording(folder, damaged="skip"))
    assert made.notices[0].tone == "critical"
    assert f"rows lost: {6 * 64 * 2:,}." in made.notices[0].text.text
    assert all(category.score is None for category in made.categories if category.key == "load_balance")
    capture = next(each for each in made.categories if each.key == "capture_quality")
    assert capture.score == 0


def test_it_goes_to_json_and_back(whole: Path) -> None:
    made = report(open_recording(whole), num_ranks=2)
    values = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    again = Report.from_dict(values)
    assert again == made
    assert again.to_html() == made.to_html()
    assert values["format"] == "moe-debugger-report"
    assert values["categories"][0]["why"]["text"] == made.categories[0].why.text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": "something"}, InvalidInputError),
        ({"format_version": "x"}, InvalidInputError),
        ({"format_version": "2.0"}, UnsupportedFormatError),
        ({"score": "many"}, InvalidInputError),
        ({"categories": [{"key": "k"}]}, InvalidInputError),
    ],
)
def test_what_is_no_report_is_refused(whole: Path, change: dict[str, Any], error: type[Exception]) -> None:
    values = report(open_recording(whole)).to_dict()
    with pytest.raises(error):
        Report.from_dict({**values, **change})
    assert Report.from_dict({**values, "format_version": "1.9", "of_the_future": 1}).title


class _Page(HTMLParser):
    """Collects what a browser would run, load or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _assert_self_contained(text: str) -> _Page:
    page = _Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "foreignobject", "use"}
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            assert key != "style"
            if key in ("href", "src", "xlink:href", "action", "srcset"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1].replace("url(#hatch)", "")
    assert "@import" not in style[1]
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?://", text)
    return page


def test_everything_of_a_recording_is_escaped(tmp_path: Path) -> None:
    layers = [moe_debugger.LayerInfo(i, i, f"{EVIL}.{i}", "decoder", 8, 2, unavailable_reason=EVIL) for i in range(2)]
    folder = record(
        tmp_path / "evil", _forwards(3), layers, session_name=EVIL, problems=[EVIL], num_rows_not_written={EVIL: 1},
        model=ModelIdentity(name=EVIL, class_name=EVIL, model_type=EVIL, versions={EVIL: EVIL}), recording_id=EVIL,
    )  # fmt: skip
    made = report(open_recording(folder), token_texts=dict.fromkeys(range(97), EVIL))
    evil = Finding(
        FindingKind.HOT_EXPERT, Severity.WARNING, EVIL, 0, 1, args={"layer": EVIL},
        evidence=(EvidenceRow(EVIL, 1.0, EVIL, unit=EVIL),),
    )  # fmt: skip
    analysis = open_recording(folder).analyze()
    object.__setattr__(analysis, "findings", (evil,))
    for each in (made, report(analysis)):
        text = each.to_html()
        assert "<script" not in text
        page = _assert_self_contained(text)
        assert EVIL in page.text


def test_names_neither_turn_the_page_round_nor_reach_the_terminal(tmp_path: Path) -> None:
    model = ModelIdentity(name=CONTROLS)
    opened = open_recording(
        record(tmp_path / "rec", _forwards(3), infos(SHAPE, SHAPE), session_name=CONTROLS, model=model)
    )
    made, compared = report(opened), diff(opened, opened)
    for text in (made.to_html(), str(made), compared.to_html(), str(compared)):
        assert {c for c in text if not c.isprintable()} <= {"\n"}
    assert "<h1>x    [31m 1mred" in made.to_html()
    # Values are data: they stay as they are.
    assert CONTROLS in json.loads(json.dumps(made.to_dict()))["title"]


def test_a_session_is_reported_without_a_recording() -> None:
    import torch
    from zoo.build import ALL

    model = ALL["mixtral"].make()
    with moe_debugger.MoEDebugger(model, level="routes+tokens", session_name=EVIL) as debugger:
        ids = torch.randint(3, 80, (3, 9), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(ids)
        session = debugger.session
        assert session is not None
        made = moe_debugger.report(session)
        assert made.source == "session"
        facts = {fact.key: fact.value for fact in made.facts}
        assert facts["session"] == EVIL
        assert facts["level"] == "routes+tokens"
        assert int(facts["rows"].replace(",", "")) == len(session.decisions())
        _assert_self_contained(made.to_html())


def test_sums_are_reported_without_rows_and_cannot_be_tested(tmp_path: Path) -> None:
    import torch
    from zoo.build import ALL

    model = ALL["mixtral"].make()
    folders = [tmp_path / "counts", tmp_path / "rows"]
    levels: list[Any] = ["counts", "routes"]
    for folder, level in zip(folders, levels, strict=True):
        with moe_debugger.MoEDebugger(model, level=level) as debugger, torch.no_grad():
            session = debugger.session
            assert session is not None
            with session.record(folder):
                for seed in range(3):
                    model(torch.randint(3, 80, (3, 9), generator=torch.Generator().manual_seed(seed)))
    counts, rows = (open_recording(folder) for folder in folders)
    made = report(counts)
    assert {p.key for p in made.pictures if p.data is not None} <= {"load", "lorenz", "over_steps"}
    assert made.pictures[0].data == report(rows).pictures[0].data
    assert next(each for each in made.categories if each.key == "load_balance").score is None
    assert any(notice.text.code == "notice.counts" for notice in made.notices)
    _assert_self_contained(made.to_html())
    found = moe_debugger.diff(counts, rows)
    assert (found.verdict, found.tests) == ("insufficient_evidence", [])
    assert [layer.js_bits for layer in found.layers] == pytest.approx([0] * len(found.layers))
    assert "level routes or above" in next(p.remedy.text for p in found.points if p.key == "level" and p.remedy)


def test_a_recording_in_which_nothing_ran_says_so(tmp_path: Path) -> None:
    made = report(open_recording(record(tmp_path / "empty", [], infos((8, 2)))), num_ranks=2)
    assert "notice.empty" in {notice.text.code for notice in made.notices}
    for key in ("load_balance", "router_confidence", "capacity"):
        category = next(each for each in made.categories if each.key == key)
        assert category.score is None
        assert "no token was routed" in category.why.text
    _assert_self_contained(made.to_html())


def test_the_ranks_of_one_session_are_read_as_one(tmp_path: Path) -> None:
    folders = [
        record(
            tmp_path / f"rank{rank}", _forwards(20, first_request=20 * rank), infos(SHAPE, SHAPE),
            topology=Topology(global_rank=rank, world_size=2, data_parallel_rank=rank, recording_rank=rank),
            session_name="both",
        )
        for rank in range(2)
    ]  # fmt: skip
    made = report(open_recording(folders))
    facts = {fact.key: fact.value for fact in made.facts}
    assert facts["sources"] == "2 processes"
    assert facts["rows"] == f"{2 * 20 * 64 * 2:,}"
    line = made.categories[0].evidence[0]
    assert line.sample_size == 2 * 20 * 64


def test_without_jinja2_a_page_says_what_to_install(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(open_recording(whole))
    html._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DependencyMissingError, match=r"moe-debugger\[report\]"):
        made.to_html()


def test_an_analysis_alone_says_that_the_rest_is_not_known() -> None:
    found = material(_forwards(), infos(SHAPE, SHAPE))
    made = report(found.analysis)
    assert made.notices[0].text.code == "notice.analysis"
    assert {p.key for p in made.pictures if p.why_not} == {
        "over_steps",
        "coactivation",
        "transitions",
        "drops",
        "tokens",
    }
    assert next(c for c in made.categories if c.key == "load_balance").score is not None
    with pytest.raises(InvalidInputError, match="own baseline"):
        report(found.analysis, baseline=found.state)


def test_a_baseline_stands_beside_what_is_now(whole: Path, tmp_path: Path) -> None:
    skewed = record(
        tmp_path / "skewed", _forwards(preference=np.array([9.0, 9, 0, 0, 0, 0, 0, 0])), infos(SHAPE, SHAPE)
    )
    before = open_recording(whole)
    made = report(open_recording(skewed), baseline=before)
    expected = before.analyze().metrics[1]
    line = next(
        line for line in made.categories[0].evidence if line.metric == "effective_experts" and line.layer_index == 1
    )
    assert line.baseline == pytest.approx(expected.effective_experts)
    assert line.now is not None
    assert line.now < 3 < expected.effective_experts
    assert {f.kind for f in made.findings if f.severity == "critical"} == {"router_collapse"}
    assert made.score is not None
    assert made.score <= 49
    assert made.baseline_name == "whole"
    other = record(tmp_path / "other", forwards([[sampled(1, 9, (4, 1))]], [4]), infos((4, 1)))
    sizes = r"layer 0 of the baseline \(other\) has 4 experts, top-1, and here it has 8 experts, top-2; .*same model"
    with pytest.raises(InvalidInputError, match=sizes):
        report(open_recording(skewed), baseline=open_recording(other))


def test_fixes_are_ordered_by_gain_and_say_where_none_was_predicted(tmp_path: Path) -> None:
    # Experts 0 to 3 are hot and stand on one rank: a placement helps, whatever steps it is judged on.
    preference = np.array([2.0, 2, 2, 2, 0, 0, 0, 0])
    folder = record(tmp_path / "hot", _forwards(80, 64, preference), infos(SHAPE, SHAPE))
    made = report(open_recording(folder), num_ranks=2)
    first = made.fixes[0]
    assert first.gain is not None
    assert first.verdict == "helps"
    assert first.gain_lower is not None
    assert 0.1 < first.gain_lower < first.gain < 1
    assert isinstance(first.change, dict)
    assert first.change["num_ranks"] == 2
    # Loads (l, h): the bound falls from max to mean; contiguous ranks hold 4 hot or 4 cold ones.
    rows = open_recording(folder).decisions()
    hot = np.count_nonzero(rows.expert_ids < 4, axis=1)
    by_step = {
        (int(s), int(i)): hot[(rows.step == s) & (rows.layer_index == i)].sum() for s in range(40, 80) for i in (0, 1)
    }
    most = sum(max(count, 128 - count) for count in by_step.values())
    assert first.gain == pytest.approx(1 - 64 * len(by_step) / most, abs=0.05)
    gains = [fix.gain for fix in made.fixes]
    assert gains == sorted(gains, key=lambda gain: -1 if gain is None else gain, reverse=True)
    rank = next(each for each in made.categories if each.key == "rank_balance")
    assert rank.score is not None
    assert rank.score < 90
    for fix in made.fixes[1:]:
        assert fix.gain is not None or fix.gain_note.code.startswith("gain.not") or fix.gain_note.code in (
            "gain.other_effect", "gain.placement_not",
        )  # fmt: skip


def test_recorded_ranks_are_planned_for(tmp_path: Path) -> None:
    place = Topology(expert_parallel_size=4, world_size=4)
    folder = record(tmp_path / "ranks", _forwards(40), infos(SHAPE, SHAPE), topology=place)
    made = report(open_recording(folder))
    facts = {fact.key: fact.value for fact in made.facts}
    assert facts["ranks"] == "4 expert-parallel ranks"
    assert next(each for each in made.categories if each.key == "rank_balance").score is not None


def _fall(num_experts: list[int]) -> LoadSeries:
    """Return a series whose steps use so many experts evenly."""
    counts = np.array([[60 // num if e < num else 0 for e in range(6)] for num in num_experts], np.uint64)
    return LoadSeries(0, np.arange(len(counts), dtype=np.uint64), counts, counts.sum(axis=1))


def test_lead_times_are_from_the_warning_to_half_of_the_experts() -> None:
    def warning(layer: int, since: int, warned: str, baseline: float | None) -> Finding:
        row = EvidenceRow("effective_experts", 4.0, baseline=baseline)
        args = {"layer": str(layer), "warned": warned}
        kind = FindingKind.COLLAPSE_WARNING
        return Finding(kind, Severity.WARNING, "collapse_warning", layer, since_step=since, args=args, evidence=(row,))

    # A dip of one step is no fall: step 4, of 6 experts, then 9 on.
    fall = _fall([6, 6, 6, 6, 2, 6, 5, 4, 4, 2, 2, 2])
    found = [warning(3, 3, "6", 6.0), warning(1, 2, "5", 6.0), warning(7, 1, "", None)]
    leads = lead_times(found, {3: fall, 1: _fall([6] * 12)})
    assert [(each.layer_index, each.warning_step, each.collapse_step, each.lead_steps) for each in leads] == [
        (1, 5, None, None),
        (3, 6, 9, 3),
        (7, 1, None, None),
    ]


def test_thresholds_move_the_lines(tmp_path: Path) -> None:
    folder = record(tmp_path / "mild", _forwards(preference=np.linspace(0, 1.5, 8)), infos(SHAPE, SHAPE))
    strict = report(open_recording(folder), thresholds=Thresholds(load_balance=0.97))
    normal = report(open_recording(folder))
    assert strict.categories[0].score is not None
    assert normal.categories[0].score is not None
    assert strict.categories[0].score < 75 < normal.categories[0].score


def test_few_rows_are_said(whole: Path) -> None:
    made = report(open_recording(whole), max_rows=256)
    assert any("first 256 of 3,072 rows" in notice.text.text for notice in made.notices)
    assert made.categories[0].score == report(open_recording(whole)).categories[0].score
    without = report(open_recording(whole), max_rows=0)
    assert next(p for p in without.pictures if p.key == "coactivation").why_not is not None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"num_ranks": 0}, "num_ranks"), ({"num_redundant": -1}, "num_redundant"), ({"max_rows": -1}, "max_rows")],
)
def test_arguments_out_of_range_are_refused(whole: Path, arguments: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        report(open_recording(whole), **arguments)  # type: ignore[arg-type]


def test_something_else_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="got dict"):
        report({})  # type: ignore[arg-type]


def test_every_text_of_the_code_is_in_the_catalogue() -> None:
    folder = Path(moe_debugger.__file__).parent / "reporting"
    sources = "\n".join(path.read_text() for path in [*folder.glob("*.py"), *folder.glob("templates/*.j2")])
    used = set(re.findall(r"""(?:say|t)\(\s*f?["']([a-z_]+\.[a-z_0-9]+)["']""", sources))
    texts = catalogue()
    assert len(used) > 60
    assert used <= set(texts), used - set(texts)
    prefixes = tuple(re.findall(r"""(?:say|t)\(f?["']([a-z_]+\.)(?:\{|["'] ~)""", sources))
    known = {code for code in texts if code in sources or code.startswith(prefixes)}
    assert known == set(texts), set(texts) - known
    assert sentence("no.code", {"b": "2", "a": "1"}) == "no.code (a=1, b=2)"


@pytest.mark.parametrize(("indices", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 5], "0–2, 5"), ([7, 3, 4], "3–4, 7")])
def test_layers_are_written_as_ranges(indices: list[int], text: str) -> None:
    assert layer_range(indices) == text


def test_nan_never_gets_in(whole: Path) -> None:
    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [number for each in value.values() for number in numbers(each)]
        if isinstance(value, list):
            return [number for each in value for number in numbers(each)]
        return [value] if isinstance(value, float) else []

    assert all(math.isfinite(value) for value in numbers(report(open_recording(whole)).to_dict()))
    assert name(1) == "0" * 25 + "1"


def test_a_report_shows_all_problems_of_plugins_and_their_findings_in_their_own_words() -> None:
    args = {"title": "Half idles", "summary": "of layer 3", "remedy": "look there"}
    finding = Finding(FindingKind.LOAD_IMBALANCE, Severity.INFO, "quiet-half.half_is_idle", args=args)
    made = report(Analysis({}, (finding,), 1, problems=("'a' failed", "'b' failed")))
    assert [each.text.text for each in made.notices if each.tone == "warning"] == ["'a' failed", "'b' failed"]
    assert made.findings[0].plugin == "quiet-half"
    explained = ExplanationEntry(
        started="of its kind", spread=[], status="", causes=[], unexplained=1.0, missing=[], remedies=[], rows_query="",
        rows_python="",
    )  # fmt: skip
    page = made.model_copy(
        update={"findings": [made.findings[0].model_copy(update={"explanation": explained})]}
    ).to_html()
    for text in ("Half idles", "of layer 3", "look there", "of its kind"):
        assert text in page
