"""The gateway's settings: environment variables ``MOE_GATEWAY_*``, read once, all problems reported at once."""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from moe_debugger.environment import read_settings
from moe_debugger.wire.ids import DEFAULT_TENANT, TENANT_PATTERN

__all__ = ["ENV_PREFIX", "GatewaySettings", "is_loopback"]

ENV_PREFIX = "MOE_GATEWAY_"
_SECRETS = frozenset({"nats_url", "redis_url", "fleet_token"})

Port = Annotated[int, Field(ge=0, le=65535)]


def is_loopback(host: str) -> bool:
    """Return whether a bind to `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class GatewaySettings(BaseSettings):
    """Settings of one gateway process."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address that both ports bind; loopback only until there is login.")
    web_port: Port = Field(8080, description="Web page and gRPC-Web; 0 takes a free port.")
    grpc_port: Port = Field(50051, description="Native gRPC; 0 takes a free port.")
    analyzer_target: str = Field("127.0.0.1:50052", description="host:port of the analyzers' gRPC.")
    nats_url: SecretStr = Field(SecretStr("nats://127.0.0.1:4222"), description="NATS, for live deltas.")
    redis_url: SecretStr = Field(SecretStr(""), description="Redis or Valkey; empty = not watched.")
    worker_target: str = Field("", description="host:port of the worker's gRPC; empty = a fleet without a worker.")
    fleet_token: SecretStr = Field(SecretStr(""), description="Bearer token for the worker; empty = none is sent.")
    static_dir: Path = Field(Path(__file__).parent / "static", description="Folder of the built web page.")
    tenant: str = Field(DEFAULT_TENANT, description="Tenant of every call; never taken from a client.")
    max_prompt_bytes: int = Field(65536, ge=1, le=1 << 20, description="Longest prompt, in UTF-8 bytes.")
    max_request_bytes: int = Field(1 << 18, ge=1024, le=1 << 24, description="Largest request message, uncompressed.")
    max_watch_hz: int = Field(30, ge=1, le=60, description="Most frames a second of one Watch stream.")
    max_watches: int = Field(256, ge=1, le=10_000, description="Most Watch streams at a time.")
    max_concurrent_generations: int = Field(16, ge=1, le=1024, description="Most Generate calls at a time.")
    max_sources: int = Field(32, ge=1, le=1024, description="Most sources at a time that clients opened (OpenSource).")
    source_idle_s: float = Field(300.0, gt=0, le=86_400, description="A source without a call for this long is closed.")
    source_buffer_bytes: int = Field(
        1 << 23, ge=1 << 16, le=1 << 30, description="Most bytes of one source that wait for NATS."
    )
    analyzer_timeout_s: float = Field(5.0, gt=0, le=60, description="Deadline of one call to an analyzer.")
    generate_timeout_s: float = Field(600.0, gt=0, le=3600, description="Deadline of one Generate call.")
    probe_interval_s: float = Field(1.0, ge=0.05, le=60, description="Time between two health probes.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe line logged.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read only what the caller and the environment say: a .env file in some folder must not open a port."""
        return init_settings, env_settings

    @field_validator("host")
    @classmethod
    def _host_is_loopback(cls, value: str) -> str:
        if not is_loopback(value):
            raise ValueError(
                "the gateway has no authentication yet and binds loopback addresses only; "
                "use 127.0.0.1, ::1 or localhost, and reach it from elsewhere by an SSH tunnel"
            )
        return value

    @field_validator("tenant")
    @classmethod
    def _tenant_is_a_name(cls, value: str) -> str:
        if not TENANT_PATTERN.match(value):
            raise ValueError("expected [a-z][a-z0-9-]*, at most 32 characters")
        return value

    @field_validator("analyzer_target", "worker_target")
    @classmethod
    def _target_is_host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and port.isdecimal() and 0 < int(port) <= 65535):
            raise ValueError("expected host:port")
        return value

    @field_validator("nats_url")
    @classmethod
    def _nats_url_has_a_scheme(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("nats://", "tls://")):
            raise ValueError("expected nats://[user:password@]host:port")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_url_has_a_scheme(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if url and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("expected redis://[user:password@]host:port/0, or nothing")
        return value

    @model_validator(mode="after")
    def _prompt_fits_a_request(self) -> "GatewaySettings":
        if self.max_prompt_bytes + 1024 > self.max_request_bytes:
            raise ValueError("max_request_bytes must be at least max_prompt_bytes + 1024")
        return self

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> "GatewaySettings":
        """Read the environment.

        Raises:
            ConfigError: a value is wrong or a variable is unknown; the error lists all of them.
        """
        return read_settings(cls, prefix=ENV_PREFIX, service="gateway", secrets=_SECRETS, environ=environ)
