"""Bring a database to this program's schema. The migrations ship inside the package."""

import asyncio
from pathlib import Path

from alembic import command
from alembic.config import Config

__all__ = ["alembic_config", "upgrade"]


def alembic_config(url: str) -> Config:
    """Return alembic's configuration for the packaged migrations and the database `url` (an async driver)."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    # ConfigParser would interpolate a percent sign of a password.
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


async def upgrade(url: str) -> None:
    """Upgrade the database to the newest schema; it does nothing where it is there already."""
    # alembic's entry point is synchronous and env.py runs its own loop: keep it off ours.
    await asyncio.to_thread(command.upgrade, alembic_config(url), "head")
