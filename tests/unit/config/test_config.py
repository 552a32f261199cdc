"""The YAML configuration: every problem at once, each with its line; every accepted key acts."""

from pathlib import Path

import pytest

from moe_debugger.analysis import Thresholds
from moe_debugger.config import Config, load_config
from moe_debugger.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Return a function that writes a configuration file."""

    def write_text(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def test_an_empty_file_sets_nothing(write) -> None:  # type: ignore[no-untyped-def]
    assert load_config(write("# nothing\n")) == Config()
    assert load_config(write("model:\ncapture:\n")) == Config()
    assert Config().service_env() == {}


def test_every_setting_reaches_the_environment_of_its_service(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = load_config(
        write(
            "model:\n  path: ./weights\n  device: cuda:1\n  precision: bfloat16\n"
            "capture:\n  level: counts\n  sampling_rate: 0.5\n  buffer_size: 8 MiB\n  gradients: false\n"
            "performance:\n  batch_size: 4\n  profiling: true\n"
            "thresholds:\n  dead_expert: 0.02\n  load_balance: 0.5\n  routing_confidence: 0.05\n"
        )
    )
    assert config.service_env() == {
        "MOE_COLLECTOR_MODEL": str(tmp_path / "weights"),
        "MOE_COLLECTOR_DEVICE": "cuda:1",
        "MOE_COLLECTOR_PRECISION": "bfloat16",
        "MOE_COLLECTOR_LEVEL": "counts",
        "MOE_COLLECTOR_SAMPLING_RATE": "0.5",
        "MOE_COLLECTOR_BUFFER_BYTES": str(8 << 20),
        "MOE_COLLECTOR_MAX_BATCH_SIZE": "4",
        "MOE_COLLECTOR_PROFILING": "true",
        "MOE_ANALYZER_DEAD_EXPERT": "0.02",
        "MOE_ANALYZER_LOAD_BALANCE": "0.5",
        "MOE_ANALYZER_ROUTING_CONFIDENCE": "0.05",
    }


def test_what_concerns_a_training_reaches_the_debugger(write) -> None:  # type: ignore[no-untyped-def]
    text = (
        "capture:\n  level: counts\n  sampling_rate: 0.5\n  buffer_size: 8 MiB\n  gradients: true\n"
        "performance:\n  profiling: true\n"
        "thresholds:\n  load_balance: 0.5\n"
    )
    assert load_config(write(text)).debugger_options() == {
        "level": "counts",
        "sampling_rate": 0.5,
        "buffer_bytes": 8 << 20,
        "gradients": True,
        "profiling": True,
        "thresholds": Thresholds(load_balance=0.5),
    }
    assert Config().debugger_options() == {}


def test_all_problems_come_at_once_each_with_its_line(write) -> None:  # type: ignore[no-untyped-def]
    path = write(
        "model:\n"  # 1
        "  devise: cpu\n"  # 2
        "  precision: int8\n"  # 3
        "capture:\n"  # 4
        "  sampling_rate: 2\n"  # 5
        "  gradients: maybe\n"  # 6
        "  dead_expert: 0.1\n"  # 7
        "threshold:\n"  # 8
        "  load_balance: 2\n"  # 9
        "performance:\n"  # 10
        "  profiling: sometimes\n"  # 11
        "  memory_limit: 3 GB\n"  # 12
        '  batch_size: "8"\n'  # 13
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == [
        f"line {line}" for line in (2, 3, 5, 6, 7, 8, 11, 12, 13)
    ]
    text = "\n".join(problems)
    assert "did you mean model.device?" in text
    assert "did you mean thresholds.dead_expert?" in text
    assert "did you mean thresholds?" in text
    assert "capture.gradients" in text
    assert "performance.profiling" in text
    assert "memory cannot be limited yet" in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: [1\n", "line"),
        ("model:\n  path: a\n  path: b\n", "line 3: found duplicate key"),
        ("- a\n- b\n", "expected sections"),
        ("model: demo\n", "line 1: model: expected a section"),
        ("capture:\n  buffer_size: 3 bananas\n", "line 2: capture.buffer_size: expected a number of bytes"),
        ("capture:\n  buffer_size: 10\n", "line 2: capture.buffer_size"),
        ("capture:\n  gradients: 1\n", "line 2: capture.gradients"),
        ("model:\n  path: !!python/object/apply:os.system ['true']\n", "line 2"),
    ],
)
def test_a_malformed_file_names_the_line(write, text: str, problem: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=problem):
        load_config(write(text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml.*\n.*cannot be read"):
        load_config(tmp_path / "none.yaml")
