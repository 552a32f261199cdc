"""The gateway in a thread of its own (Playwright takes the test's), over an analyzer double or a real analyzer."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

from contract.gateway.doubles import AnalyzerDouble, serving
from pydantic import SecretStr
from servers import NatsServer, free_port

from moe_gateway.server import run_gateway
from moe_gateway.settings import GatewaySettings


@contextmanager
def served_page(analyzer: AnalyzerDouble) -> Iterator[str]:
    """Serve the built page over the double; yield its address."""
    port = free_port()
    with NatsServer() as nats, served_fleet(nats.url, port, analyzer) as url:
        yield url


@contextmanager
def served_fleet(nats_url: str, analyzer_port: int, double: AnalyzerDouble | None = None) -> Iterator[str]:
    """Serve the built page over the analyzer on a port, which `double` opens where one is given; yield its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gateway")
    stack = AsyncExitStack()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def start() -> int:
        if double is not None:
            await stack.enter_async_context(serving(double, analyzer_port))
        values: dict[str, Any] = {
            "web_port": 0,
            "grpc_port": 0,
            "analyzer_target": f"127.0.0.1:{analyzer_port}",
            "nats_url": SecretStr(nats_url),
            "probe_interval_s": 0.2,
        }
        settings = GatewaySettings(**values)
        assert (settings.static_dir / "index.html").is_file(), "the page is not built: make web"
        gateway = await stack.enter_async_context(run_gateway(settings))
        return int(gateway.web_port)

    thread.start()
    try:
        yield f"http://127.0.0.1:{run(start())}/"
    finally:
        run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
