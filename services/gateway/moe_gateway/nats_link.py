"""The gateway's one NATS connection: always trying to connect, telling its subscribers when they must catch up."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

__all__ = ["NatsLink", "Topic"]

log = structlog.get_logger(__name__)

_RETRY_S = 0.5


@dataclass(eq=False, slots=True)
class Topic:
    """A subject that somebody listens to.

    Attributes:
        on_message: gets each message's bytes.
        on_ready: called whenever the server has confirmed the subscription. Nothing is missed from then on, but
            something before may have been: take a snapshot.
    """

    subject: str
    on_message: Callable[[bytes], None]
    on_ready: Callable[[], None]
    subscription: Subscription | None = field(default=None)


class NatsLink:
    """Connects in the background and stays connected.

    Args:
        url: with user and password; never logged.
        on_change: called when the connection comes or goes.
    """

    def __init__(self, url: str, on_change: Callable[[], None]) -> None:
        self._url = url
        self._on_change = on_change
        self._topics: set[Topic] = set()
        self._client: Client | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_up = False
        self.last_error = ""

    @property
    def is_up(self) -> bool:
        """Return whether messages arrive."""
        return self._is_up

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        try:
            while True:
                closed = asyncio.Event()
                try:
                    await self._connect(closed)
                    await closed.wait()
                except (OSError, NatsError, TimeoutError) as error:
                    self._note_error(error)
                self._set_up(False)
                # nats-py gives up for good on some errors, a refused password among them: begin again.
                await asyncio.sleep(_RETRY_S)
        finally:
            self._is_up = False
            if self._client is not None:
                with contextlib.suppress(OSError, NatsError, TimeoutError):
                    await asyncio.wait_for(self._client.close(), 0.5)

    async def _connect(self, closed: asyncio.Event) -> None:
        async def on_disconnected() -> None:
            self._set_up(False)

        async def on_reconnected() -> None:
            # nats-py sends the subscriptions again before this call; the flush needs its read loop, hence a task.
            self._spawn(self._confirm_all())

        async def on_error(error: Exception) -> None:
            self._note_error(error)

        async def on_closed() -> None:
            closed.set()

        client = Client()
        self._client = client
        await client.connect(
            self._url,
            name="moe-gateway",
            connect_timeout=2,
            reconnect_time_wait=_RETRY_S,  # type: ignore[arg-type]  # any number of seconds
            max_reconnect_attempts=-1,
            ping_interval=5,
            max_outstanding_pings=2,
            disconnected_cb=on_disconnected,
            reconnected_cb=on_reconnected,
            error_cb=on_error,
            closed_cb=on_closed,
        )
        for topic in self._topics:
            topic.subscription = None
        await self._confirm_all()

    async def _confirm_all(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            for topic in list(self._topics):
                await self._subscribe(client, topic)
            await client.flush(timeout=5)
        except (OSError, NatsError, TimeoutError) as error:
            self._note_error(error)
            await client.close()
            return
        self._set_up(True)
        for topic in list(self._topics):
            topic.on_ready()

    async def _subscribe(self, client: Client, topic: Topic) -> None:
        if topic.subscription is not None:
            return

        async def deliver(message: Msg) -> None:
            topic.on_message(message.data)

        topic.subscription = await client.subscribe(topic.subject, cb=deliver)

    async def add(self, topic: Topic) -> None:
        """Listen to a topic from now on, also after reconnects."""
        self._topics.add(topic)
        client = self._client
        if not self._is_up or client is None:
            return
        try:
            await self._subscribe(client, topic)
            await client.flush(timeout=5)
        except (OSError, NatsError, TimeoutError) as error:
            # The link is breaking; its reconnect confirms all topics, this one too.
            self._note_error(error)
            return
        topic.on_ready()

    async def remove(self, topic: Topic) -> None:
        """Stop listening."""
        self._topics.discard(topic)
        if topic.subscription is not None:
            with contextlib.suppress(OSError, NatsError, TimeoutError):
                await topic.subscription.unsubscribe()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _note_error(self, error: Exception) -> None:
        self.last_error = type(error).__name__ if not str(error) else str(error)
        log.debug("nats_error", error=self.last_error)

    def _set_up(self, is_up: bool) -> None:
        if is_up != self._is_up:
            self._is_up = is_up
            if is_up:
                self.last_error = ""
            log.info("nats_connected" if is_up else "nats_lost", last_error=self.last_error)
            self._on_change()
