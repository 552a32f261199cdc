"""Settings: all problems at once, passwords never shown."""

import pytest

from moe_analyzer.settings import load_settings
from moe_debugger.errors import ConfigError


def test_load_settings_names_all_problems_and_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ANALYZER_HOST", "0.0.0.0")
    monkeypatch.setenv("MOE_ANALYZER_PORT", "hunter2")
    monkeypatch.setenv("MOE_ANALYZER_NUM_PARTITIONS", "0")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert all(name in text for name in ("MOE_ANALYZER_HOST", "MOE_ANALYZER_PORT", "MOE_ANALYZER_NUM_PARTITIONS"))
    assert "hunter2" not in text


def test_load_settings_hides_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ANALYZER_NATS_URL", "nats://moe:hunter2@127.0.0.1:4222")
    settings = load_settings()
    assert "hunter2" not in repr(settings)
    assert settings.nats_url.get_secret_value().endswith("hunter2@127.0.0.1:4222")
