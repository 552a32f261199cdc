"""The worker's settings are read at once, and every problem is told with its variable."""

import pytest

from moe_collector.settings import CollectorSettings
from moe_debugger.errors import ConfigError


def test_defaults_bind_loopback_and_name_the_demo() -> None:
    settings = CollectorSettings.from_environment({})
    assert (settings.host, settings.model, settings.session_name) == ("127.0.0.1", "demo", "demo")
    assert settings.level == "routes+tokens"
    assert settings.limits.max_batch_size == 8


def test_all_problems_are_told_at_once_without_secrets() -> None:
    environment = {
        "MOE_COLLECTOR_PORT": "abc",
        "MOE_COLLECTOR_HOST": "0.0.0.0",
        "MOE_COLLECTOR_FLEET_TOKEN": "too-short",
        "MOE_COLLECTOR_NATS_URL": "http://secret@host",
        "MOE_COLLECTOR_TENANT": "Not A Tenant",
        "MOE_COLLECTOR_LEVEL": "everything",
        "MOE_COLLECTOR_PROT": "1",
        "UNRELATED": "1",
    }
    with pytest.raises(ConfigError) as caught:
        CollectorSettings.from_environment(environment)
    text = str(caught.value)
    assert len(caught.value.problems) == 7
    assert all(name in text for name in environment if name != "UNRELATED")
    assert "too-short" not in text
    assert "secret" not in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_a_host_off_loopback_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="binds loopback addresses only"):
        CollectorSettings.from_environment({"MOE_COLLECTOR_HOST": host})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_loopback_host_is_taken(host: str) -> None:
    CollectorSettings.from_environment({"MOE_COLLECTOR_HOST": host})


def test_a_temp_dir_that_leaves_no_room_for_sockets_is_refused() -> None:
    with pytest.raises(ConfigError, match="use a shorter one"):
        CollectorSettings.from_environment({"MOE_COLLECTOR_RAY_TEMP_DIR": "/tmp/" + "x" * 60})


def test_the_token_is_not_shown() -> None:
    settings = CollectorSettings.from_environment({"MOE_COLLECTOR_FLEET_TOKEN": "t" * 20})
    assert "t" * 20 not in repr(settings)
