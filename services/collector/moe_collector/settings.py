"""The worker's settings: environment variables ``MOE_COLLECTOR_*``, read once, all problems reported at once."""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from moe_debugger.environment import read_settings
from moe_debugger.wire.ids import DEFAULT_TENANT, TENANT_PATTERN

from .engine import Limits

__all__ = ["ENV_PREFIX", "CollectorSettings"]

ENV_PREFIX = "MOE_COLLECTOR_"
_SECRETS = frozenset({"nats_url", "fleet_token"})

Port = Annotated[int, Field(ge=0, le=65535)]


class CollectorSettings(BaseSettings):
    """Settings of one worker: its model, its Ray cluster, and where its routing goes."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address of the worker's own gRPC port; loopback only.")
    port: Port = Field(50053, description="The worker's gRPC port on loopback; 0 takes a free one.")
    ingress_port: Port = Field(0, description="Ray Serve's gRPC ingress, which needs the token; 0 takes a free one.")
    fleet_token: SecretStr = Field(
        SecretStr(""), description="Bearer token that Ray Serve's ingress asks for; empty = a new one for each start."
    )
    nats_url: SecretStr = Field(SecretStr("nats://127.0.0.1:4222"), description="NATS, where the routing is sent.")
    tenant: str = Field(DEFAULT_TENANT, description="Tenant of everything that this worker sends.")
    session_name: str = Field(
        "demo", min_length=1, max_length=200, description="Session that this worker opens or joins."
    )
    model: str = Field("demo", min_length=1, description="`demo`, or a local folder with safetensors weights.")
    device: str = Field("auto", description="Where the model runs: auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Of the weights.")
    level: Literal["counts", "routes", "routes+tokens", "full"] = Field(
        "routes+tokens", description="What is captured."
    )
    sampling_rate: float = Field(1.0, gt=0, le=1, description="Share of the requests whose routing is captured.")
    buffer_bytes: int = Field(64 << 20, ge=1 << 20, le=1 << 34, description="Most bytes that wait to be sent.")
    profiling: bool = Field(False, description="Time routers and experts, shown on the page's Performance panel.")
    max_batch_size: int = Field(8, ge=1, le=256, description="Most requests that share a forward.")
    max_new_tokens: int = Field(512, ge=1, le=1 << 20, description="Most tokens that one request may generate.")
    max_prompt_bytes: int = Field(65536, ge=1, le=1 << 20, description="Longest prompt, in UTF-8 bytes.")
    max_waiting: int = Field(64, ge=0, le=10_000, description="Most requests that wait for a place in the batch.")
    ray_address: str = Field("", description="An existing Ray cluster to join; empty = one of our own.")
    ray_temp_dir: str = Field("", description="Folder for our Ray cluster's files; empty = a new one, removed at stop.")
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
        if value == "localhost":
            return "127.0.0.1"
        try:
            if ipaddress.ip_address(value).is_loopback:
                return value
        except ValueError:
            pass
        raise ValueError("this port asks for no credential, so it binds loopback addresses only; use 127.0.0.1 or ::1")

    @field_validator("tenant")
    @classmethod
    def _tenant_is_a_name(cls, value: str) -> str:
        if not TENANT_PATTERN.match(value):
            raise ValueError("expected [a-z][a-z0-9-]*, at most 32 characters")
        return value

    @field_validator("nats_url")
    @classmethod
    def _nats_url_has_a_scheme(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("nats://", "tls://")):
            raise ValueError("expected nats://[user:password@]host:port")
        return value

    @field_validator("fleet_token")
    @classmethod
    def _token_is_printable(cls, value: SecretStr) -> SecretStr:
        # gRPC metadata values are printable ASCII; anything else would fail at the first call only.
        token = value.get_secret_value()
        if not (token.isascii() and (not token or token.isprintable()) and token == token.strip()):
            raise ValueError("expected printable ASCII without spaces around it")
        if token and len(token) < 16:
            raise ValueError(f"has {len(token)} characters, expected at least 16")
        return value

    @field_validator("ray_temp_dir")
    @classmethod
    def _temp_dir_leaves_room_for_sockets(cls, value: str) -> str:
        # Ray appends /session_<26 characters>_<pid>/sockets/plasma_store, and a Unix socket's path ends at 107 bytes.
        if len(os.fsencode(value)) > 40:
            raise ValueError(f"has {len(os.fsencode(value))} bytes, Ray's sockets leave room for 40; use a shorter one")
        if value and not Path(value).is_absolute():
            raise ValueError("expected an absolute path")
        return value

    @model_validator(mode="after")
    def _ports_differ(self) -> "CollectorSettings":
        if self.port and self.port == self.ingress_port:
            raise ValueError(f"port and ingress_port are both {self.port}; they must differ")
        if self.ray_address and not (self.ingress_port and self.fleet_token.get_secret_value()):
            raise ValueError("with ray_address, set ingress_port and fleet_token to those of that cluster's Serve")
        return self

    @property
    def limits(self) -> Limits:
        """The engine's bounds."""
        return Limits(
            max_batch_size=self.max_batch_size,
            max_new_tokens=self.max_new_tokens,
            max_prompt_bytes=self.max_prompt_bytes,
            max_waiting=self.max_waiting,
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> "CollectorSettings":
        """Read the environment.

        Raises:
            ConfigError: a value is wrong or a variable is unknown; the error lists all of them.
        """
        return read_settings(cls, prefix=ENV_PREFIX, service="worker", secrets=_SECRETS, environ=environ)
