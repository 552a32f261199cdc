"""From columns to the broker: a bounded buffer, a NATS thread, a source's life cycle."""

from .account import PublisherStatistics
from .publisher import Health, Publisher, SourceDescription, redact_url

__all__ = ["Health", "Publisher", "PublisherStatistics", "SourceDescription", "redact_url"]
