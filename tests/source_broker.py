"""A stand-in for the analyzer on a real NATS: makes the stream, opens sessions, reads back what is stored."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import nats
from nats.js.api import StorageType, StreamConfig, SubjectTransform
from servers import NatsServer

from moe_debugger.v1 import control_pb2
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import format_version
from moe_debugger.wire.ids import new_id
from moe_debugger.wire.subjects import (
    EVENT_STREAM,
    EVENT_SUBJECTS,
    OPEN_SESSION_SUBJECTS,
    parse_stored_subject,
    partition_transform,
)

__all__ = ["Broker"]


class Broker:
    """Answers open_session with `session_id`, or with `refuse` as the error."""

    def __init__(self, server: NatsServer) -> None:
        self.server = server
        self.session_id = new_id()
        self.refuse = ""
        self.opened: list[control_pb2.OpenSessionRequest] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client: Any = None

    def call(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(30)

    def start(self, *, with_responder: bool = True) -> None:
        self.call(self._start(with_responder))

    async def _start(self, with_responder: bool) -> None:
        async def quiet(_: Exception) -> None:
            return

        self._client = await nats.connect(
            self.server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=quiet
        )
        source, destination = partition_transform(16)
        await self._client.jetstream().add_stream(
            StreamConfig(
                name=EVENT_STREAM,
                subjects=[EVENT_SUBJECTS],
                storage=StorageType.FILE,
                subject_transform=SubjectTransform(src=source, dest=destination),
            )
        )
        if with_responder:
            await self.respond()

    async def respond(self) -> None:
        async def answer(message: Any) -> None:
            self.opened.append(control_pb2.OpenSessionRequest.FromString(message.data))
            response = control_pb2.OpenSessionResponse(
                session_id="" if self.refuse else self.session_id, error=self.refuse, format_version=format_version()
            )
            await message.respond(response.SerializeToString())

        await self._client.subscribe(OPEN_SESSION_SUBJECTS, cb=answer)
        await self._client.flush()

    def messages(self) -> list[tuple[dict[str, str], pb.SourceMessage]]:
        """All stored messages, with their headers, in the order of the stream."""
        result: list[tuple[dict[str, str], pb.SourceMessage]] = self.call(self._messages())
        return result

    async def _messages(self) -> list[tuple[dict[str, str], pb.SourceMessage]]:
        stream = self._client.jetstream()
        info = await stream.stream_info(EVENT_STREAM)
        found = []
        for sequence in range(info.state.first_seq, info.state.last_seq + 1):
            raw = await stream.get_msg(EVENT_STREAM, sequence)
            message = pb.SourceMessage.FromString(raw.data)
            assert parse_stored_subject(raw.subject).source_id == message.source_id
            found.append((dict(raw.headers or {}), message))
        return found

    def stop(self) -> None:
        if self._client is not None:
            self.call(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
