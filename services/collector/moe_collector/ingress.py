"""What runs in Ray Serve's proxy: it binds the gRPC ingress to loopback and asks for the fleet token on every call.

Serve 2.60 binds its gRPC ingress to ``[::]`` and answers ``ListApplications`` and ``Healthz`` to anyone. It has no
option for either, but calls a function of ours (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`) before it starts its
servers. There the one function that binds is replaced, and every handler that is registered later is wrapped. Where
Serve has changed so that this is not possible, the proxy does not start: it fails closed. The replica checks the token
as well.
"""

import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from ._token import is_authorized

__all__ = ["INGRESS_HOST_VARIABLE", "INGRESS_TOKEN_VARIABLE", "REFUSAL", "guard_proxy", "guard_replica"]

INGRESS_HOST_VARIABLE = "MOE_INGRESS_HOST"
INGRESS_TOKEN_VARIABLE = "MOE_INGRESS_TOKEN"  # noqa: S105 - the name of a variable
REFUSAL = "the metadata `authorization: Bearer <fleet token>` is missing or wrong"


def guard_proxy() -> list[Any]:
    """Guard the gRPC server that this proxy is about to start; return the middleware that refuses all HTTP.

    Raises:
        RuntimeError: no token is in the environment, or this version of Ray Serve cannot be guarded.
    """
    from ray.serve._private import default_impl

    host, token = os.environ.get(INGRESS_HOST_VARIABLE), os.environ.get(INGRESS_TOKEN_VARIABLE)
    if not (host and token):
        raise RuntimeError(f"{INGRESS_HOST_VARIABLE} and {INGRESS_TOKEN_VARIABLE} must be set for the proxy")
    if not hasattr(default_impl, "add_grpc_address"):
        raise RuntimeError("this version of Ray Serve does not let its gRPC ingress be bound to one address")
    loopback = f"[{host}]" if ":" in host else host

    def add_grpc_address(server: Any, address: str) -> None:
        factory = server.service_handler_factory  # an AttributeError here stops the proxy, as it should
        server.service_handler_factory = _guarded_factory(factory, token)
        server.add_insecure_port(f"{loopback}:{address.rpartition(':')[2]}")

    default_impl.add_grpc_address = add_grpc_address
    from starlette.middleware import Middleware

    return [Middleware(_NoHttp)]


class _NoHttp:
    """ASGI middleware that answers 403: the worker speaks gRPC only, and Serve always starts an HTTP proxy too."""

    def __init__(self, app: Any) -> None:
        del app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this worker speaks gRPC only\n"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})


def guard_replica() -> None:
    """Bind this replica's own gRPC server, which Serve starts after the constructor, to loopback.

    It asks for Ray's token either way, so a Serve that does it differently is no error.
    """
    from ray.serve._private import replica

    host = os.environ.get(INGRESS_HOST_VARIABLE)
    original = getattr(replica, "add_port_to_grpc_server", None)
    if host and original is not None:
        loopback = f"[{host}]" if ":" in host else host
        module: Any = replica
        module.add_port_to_grpc_server = lambda server, address: original(
            server, f"{loopback}:{address.rpartition(':')[2]}"
        )


def _guarded_factory(factory: Callable[..., Any], token: str) -> Callable[..., Any]:
    def guarded_factory(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        handler = factory(service_method=service_method, streaming_type=streaming_type)

        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            await _check(context, token)
            return await handler(request, context)

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            await _check(context, token)
            async for message in handler(request, context):
                yield message

        return stream if str(streaming_type.value).endswith("stream") else answer

    return guarded_factory


async def _check(context: grpc.aio.ServicerContext[Any, Any], token: str) -> None:
    if not is_authorized(context.invocation_metadata() or (), token):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
