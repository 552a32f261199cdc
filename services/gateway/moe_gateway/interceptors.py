"""The server interceptors, shared by the native port and the gRPC-Web adapter: errors, then permissions."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status

from moe_debugger.errors import MoEDebuggerError
from moe_debugger.wire.ids import new_id
from moe_gateway.errors import DeniedError, make_status, status_of
from moe_gateway.permissions import LOCAL_USER_PERMISSIONS, RPC_PERMISSIONS

__all__ = ["ErrorInterceptor", "MethodHandler", "PermissionInterceptor"]

log = structlog.get_logger(__name__)

# A string: at run time grpc's class takes no type arguments.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


@dataclasses.dataclass(slots=True)
class MethodHandler(grpc.RpcMethodHandler):  # type: ignore[type-arg]  # takes none at run time
    """A method handler whose behaviour is one of ours; what grpc's own factory functions return cannot be copied."""

    request_streaming: bool
    response_streaming: bool
    request_deserializer: Any
    response_serializer: Any
    unary_unary: Any = None
    unary_stream: Any = None
    stream_unary: Any = None
    stream_stream: Any = None


def _wrapped(handler: Handler, **behaviour: Any) -> MethodHandler:
    return MethodHandler(
        handler.request_streaming,
        handler.response_streaming,
        handler.request_deserializer,
        handler.response_serializer,
        **behaviour,
    )


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps every error of a handler to a status with details, logs it once, and leaks no traceback."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        if handler.unary_unary is not None:
            return _wrapped(handler, unary_unary=_guard_unary(handler.unary_unary, method))
        if handler.unary_stream is not None:
            return _wrapped(handler, unary_stream=_guard_stream(handler.unary_stream, method))
        # Client streams exist in grpc's own reflection service alone.
        return handler


def _guard_unary(behaviour: Any, method: str) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the RPC edge
            await _abort(context, method, error)

    return guarded


def _guard_stream(behaviour: Any, method: str) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            responses = behaviour(request, context)
            if not hasattr(responses, "__aiter__"):
                # The other shape of a streaming handler: a coroutine that calls context.write.
                await responses
                return
            # aclosing: a client that leaves must end the handler now, not when the garbage collector comes by.
            async with contextlib.aclosing(responses) as stream:
                async for response in stream:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the RPC edge
            await _abort(context, method, error)

    return guarded


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> NoReturn:
    status = _status_and_log(method, error)
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status always raises")


def _status_and_log(method: str, error: Exception) -> status_pb2.Status:
    if isinstance(error, MoEDebuggerError):
        status = status_of(error)
        log.info("rpc_refused", method=method, code=status.code, error=str(error), error_class=type(error).__name__)
        return status
    error_id = new_id()
    log.error("rpc_failed", method=method, error_id=error_id, exc_info=error)
    return make_status(
        grpc.StatusCode.INTERNAL,
        f"the gateway has an internal error; its log holds the cause under error_id {error_id}",
        "INTERNAL",
        {"error_id": error_id},
    )


class PermissionInterceptor(grpc.aio.ServerInterceptor):
    """Deny by default: a method without a row in the table is refused, and so is a caller without its permission."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        permission = RPC_PERMISSIONS.get(handler_call_details.method)
        if permission in LOCAL_USER_PERMISSIONS:
            return handler
        return _refusing(handler, handler_call_details.method)


def _refusing(handler: Handler, method: str) -> MethodHandler:
    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        status = status_of(DeniedError(f"{method} has no permission assigned, so nobody may call it"))
        await context.abort_with_status(rpc_status.to_status(status))

    async def refuse_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        await refuse(request, context)
        yield None

    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    return _wrapped(handler, **{kind: refuse_stream if handler.response_streaming else refuse})
