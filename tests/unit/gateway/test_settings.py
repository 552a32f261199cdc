"""GatewaySettings: defaults that are safe, every problem at once, no secret in any text."""

import pytest

from moe_debugger.errors import ConfigError
from moe_gateway.settings import GatewaySettings, is_loopback


def test_defaults_bind_loopback() -> None:
    settings = GatewaySettings.from_environment({"UNRELATED": "1"})
    assert (settings.host, settings.web_port, settings.grpc_port, settings.tenant) == (
        "127.0.0.1",
        8080,
        50051,
        "default",
    )


def test_values_come_from_the_environment() -> None:
    settings = GatewaySettings.from_environment(
        {"MOE_GATEWAY_WEB_PORT": "9", "MOE_GATEWAY_WORKER_TARGET": "", "MOE_GATEWAY_FLEET_TOKEN": "tok"}
    )
    assert (settings.web_port, settings.worker_target) == (9, "")
    assert settings.fleet_token.get_secret_value() == "tok"


def test_every_problem_is_named_and_no_secret_is_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        GatewaySettings.from_environment(
            {
                "MOE_GATEWAY_HOST": "0.0.0.0",
                "MOE_GATEWAY_WEB_PORT": "70000",
                "MOE_GATEWAY_NATS_URL": "http://moe:canary@x",
                "MOE_GATEWAY_REDIS_URL": "canary",
                "MOE_GATEWAY_TENANT": "a.>",
                "MOE_GATEWAY_ANALYZER_TARGET": "nowhere",
                "MOE_GATEWAY_NO_SUCH": "1",
            }
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 7
    for name in ("HOST='0.0.0.0'", "WEB_PORT='70000'", "NATS_URL=", "REDIS_URL=", "TENANT='a.>'", "NO_SUCH"):
        assert f"MOE_GATEWAY_{name}" in text
    assert "canary" not in text


def test_secrets_have_no_repr() -> None:
    settings = GatewaySettings.from_environment(
        {"MOE_GATEWAY_FLEET_TOKEN": "canary", "MOE_GATEWAY_NATS_URL": "nats://moe:canary@127.0.0.1:1"}
    )
    assert "canary" not in repr(settings)


def test_prompt_limit_must_fit_the_request_limit() -> None:
    with pytest.raises(ConfigError, match="max_request_bytes must be at least"):
        GatewaySettings.from_environment(
            {"MOE_GATEWAY_MAX_PROMPT_BYTES": "5000", "MOE_GATEWAY_MAX_REQUEST_BYTES": "5000"}
        )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_addresses_are_accepted(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.evil.example"])
def test_other_addresses_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)
