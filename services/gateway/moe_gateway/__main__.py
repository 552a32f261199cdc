"""`python -m moe_gateway`: settings, logging, serve until SIGTERM or SIGINT, drain.

Exit codes: 0 stopped in order, 2 settings are wrong, 3 a port is taken.
"""

import asyncio
import signal
import sys

import structlog

from moe_debugger.errors import ConfigError
from moe_gateway.logs import configure_logging
from moe_gateway.server import PortTakenError, run_gateway
from moe_gateway.settings import GatewaySettings

__all__ = ["main"]

EXIT_CONFIG = 2
EXIT_PORT_TAKEN = 3


async def _serve(settings: GatewaySettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with run_gateway(settings):
        await stop.wait()


def main() -> None:
    """Run the gateway."""
    try:
        settings = GatewaySettings.from_environment()
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_CONFIG)
    configure_logging(settings.log_level)
    try:
        asyncio.run(_serve(settings))
    except PortTakenError as error:
        structlog.get_logger(__name__).error("port_taken", error=str(error))
        sys.exit(EXIT_PORT_TAKEN)


if __name__ == "__main__":
    main()
