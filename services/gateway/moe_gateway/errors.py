"""The gateway's own errors, and how each class becomes a gRPC status with details.

The details hold one `google.rpc.ErrorInfo` whose reason is a constant, for clients that translate messages.
"""

import re
from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from moe_debugger.errors import FleetError, InvalidInputError, MoEDebuggerError, SessionClosedError
from moe_gateway.framing import FrameTooLargeError, UnsupportedEncodingError

__all__ = [
    "BusyError",
    "DeniedError",
    "NotFoundError",
    "UpstreamError",
    "status_of",
    "upstream_error",
]

ERROR_DOMAIN = "moe-debugger"


class NotFoundError(MoEDebuggerError):
    """There is no such session or request."""


class BusyError(MoEDebuggerError):
    """A limit on concurrent work is reached; the same call may pass a little later."""


class DeniedError(MoEDebuggerError):
    """The caller may not do this."""


class UpstreamError(MoEDebuggerError):
    """Another service refused; its status is passed on.

    Attributes:
        code: that status.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        super().__init__(message)


# The first class that matches decides.
_STATUSES: tuple[tuple[type[MoEDebuggerError], grpc.StatusCode, str], ...] = (
    (FrameTooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"),
    (UnsupportedEncodingError, grpc.StatusCode.UNIMPLEMENTED, "ENCODING_NOT_SUPPORTED"),
    (NotFoundError, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED, "BUSY"),
    (DeniedError, grpc.StatusCode.PERMISSION_DENIED, "DENIED"),
    (InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
    (SessionClosedError, grpc.StatusCode.FAILED_PRECONDITION, "SESSION_CLOSED"),
    (FleetError, grpc.StatusCode.UNAVAILABLE, "FLEET_PART_DOWN"),
)
_RETRY_AFTER_S = 1
# How grpc's own texts for a broken connection read; a service that answers UNAVAILABLE writes for people.
_TRANSPORT_FAULT = re.compile(
    r"failed to connect|socket closed|connection (refused|reset)|goaway|recvmsg|broken pipe|resolution|ipv[46]:|"
    r"shutdown|stream removed|rst_stream|keepalive|cancelling all calls",
    re.IGNORECASE,
)


def status_of(error: MoEDebuggerError) -> status_pb2.Status:
    """Return the status of an error that was raised on purpose."""
    code, reason = grpc.StatusCode.INTERNAL, "INTERNAL"
    if isinstance(error, UpstreamError):
        code, reason = error.code, "UPSTREAM"
    else:
        for error_class, class_code, class_reason in _STATUSES:
            if isinstance(error, error_class):
                code, reason = class_code, class_reason
                break
    return make_status(code, str(error), reason)


def make_status(
    code: grpc.StatusCode, message: str, reason: str, metadata: Mapping[str, str] | None = None
) -> status_pb2.Status:
    """Return a status with an `ErrorInfo`, and a `RetryInfo` where the same call may pass later."""
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=message)
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=dict(metadata or {})))
    status.details.append(info)
    if code is grpc.StatusCode.UNAVAILABLE or reason == "BUSY":
        retry = any_pb2.Any()
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=_RETRY_AFTER_S)))
        status.details.append(retry)
    return status


def upstream_error(error: grpc.aio.AioRpcError, what: str, advice: str) -> MoEDebuggerError:
    """Return our error for a failed call to another service.

    Args:
        what: the service and its address.
        advice: what happens next while it is down.
    """
    code, details = error.code(), error.details() or ""
    match code:
        case grpc.StatusCode.UNAVAILABLE if details and not _TRANSPORT_FAULT.search(details):
            # It answered, and says itself what it lacks.
            return FleetError(f"{what} cannot answer now ({details}); {advice}")
        case grpc.StatusCode.UNAVAILABLE:
            return FleetError(f"{what} cannot be reached; {advice}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return FleetError(f"{what} did not answer in time; {advice}")
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return FleetError(f"{what} refused the gateway's credential ({details}); check the fleet token of both")
        case grpc.StatusCode.CANCELLED:
            return FleetError(f"{what} ended the call; {advice}")
        case grpc.StatusCode.NOT_FOUND:
            return NotFoundError(details)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidInputError(details)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return SessionClosedError(details)
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            return UpstreamError(code, f"{what} failed: {details or code.name}")
        case _:
            return UpstreamError(code, details or f"{what} answered {code.name}")
