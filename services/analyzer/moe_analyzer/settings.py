"""The analyzer's settings, from `MOE_ANALYZER_*` environment variables."""

import ipaddress

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from moe_debugger.analysis import Thresholds
from moe_debugger.errors import ConfigError

__all__ = ["ENV_PREFIX", "Settings", "load_settings"]

ENV_PREFIX = "MOE_ANALYZER_"


class Settings(BaseSettings):
    """All settings of one analyzer replica; frozen. The URLs hold passwords and have no repr."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore")

    host: str = Field(default="127.0.0.1", description="Address of the gRPC port. Loopback only, until there is login.")
    port: int = Field(default=50052, ge=0, le=65535, description="gRPC port; 0 lets the system choose.")
    nats_url: SecretStr = Field(
        default=SecretStr("nats://127.0.0.1:4222"), description="NATS server, with its password."
    )
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey, with password."
    )
    database_url: SecretStr = Field(
        default=SecretStr("sqlite+aiosqlite:///catalogue.db"),
        description="SQL catalogue, SQLAlchemy URL of an async driver.",
    )
    num_partitions: int = Field(
        default=16, ge=1, le=1024, description="Partitions of the stream; fixed when it is created."
    )
    stream_max_bytes: int = Field(
        default=1 << 30, ge=1 << 20, description="The event stream's size; the oldest goes first."
    )
    flush_interval_s: float = Field(default=0.2, ge=0.01, le=60, description="Time between two writes of a partition.")
    lease_s: float = Field(
        default=3.0, ge=0.5, le=60, description="A silent replica loses its partitions after this time."
    )
    recent_window_s: int = Field(default=30, ge=1, le=120, description="Length of the recent window, in broker time.")
    stale_after_s: float = Field(default=15.0, gt=0, description="A session without a message for this long is stale.")
    close_after_s: float = Field(
        default=600.0, gt=0, description="A session without a message for this long is closed."
    )
    rows_budget_bytes: int = Field(
        default=32 << 20, ge=0, description="Kept decisions per session and partition; the oldest requests go first."
    )
    max_requests: int = Field(
        default=2000, ge=1, description="Requests that are told apart, per session and partition."
    )
    recordings_dir: str = Field(
        default="recordings", min_length=1, description="Folder of the recordings that this replica writes; private."
    )
    recording_max_bytes: int = Field(
        default=4 << 30, ge=1 << 20, description="A recording takes no more rows once its files are so large."
    )
    recording_min_free_bytes: int = Field(
        default=512 << 20, ge=0, description="A recording takes no rows while its disk has less room than this."
    )
    dead_expert: float = Field(
        default=Thresholds().dead_expert, gt=0, lt=1, description="Threshold of that name in docs/metrics.md."
    )
    load_balance: float = Field(
        default=Thresholds().load_balance, gt=0, lt=1, description="Threshold of that name in docs/metrics.md."
    )
    routing_confidence: float = Field(
        default=Thresholds().routing_confidence, gt=0, lt=1, description="Threshold of that name in docs/metrics.md."
    )
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR.")

    @property
    def thresholds(self) -> Thresholds:
        """Return where the rules draw their lines."""
        return Thresholds(
            dead_expert=self.dead_expert,
            load_balance=self.load_balance,
            routing_confidence=self.routing_confidence,
        )

    @field_validator("host")
    @classmethod
    def _loopback(cls, host: str) -> str:
        is_loopback = host == "localhost"
        if not is_loopback:
            try:
                is_loopback = ipaddress.ip_address(host).is_loopback
            except ValueError:
                is_loopback = False
        if not is_loopback:
            raise ValueError(f"{host!r} is not a loopback address; the analyzer has no login yet, use 127.0.0.1")
        return host

    @field_validator("log_level")
    @classmethod
    def _level(cls, level: str) -> str:
        if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError(f"{level!r} is not one of DEBUG, INFO, WARNING, ERROR")
        return level.upper()


def load_settings() -> Settings:
    """Return the settings of this process's environment.

    Raises:
        ConfigError: with all problems at once. Values are not shown: one may be a password.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"{ENV_PREFIX}{'_'.join(str(part) for part in problem['loc']).upper()}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError("environment", problems) from None
