"""The one table of everything that the gateway answers to, each with its permission; the rest is denied.

Until there is login, whoever reaches the loopback ports is the local user, who holds every permission of
`LOCAL_USER_PERMISSIONS`; the table is enforced all the same, so that a new RPC without a row does not work at all.
"""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["HTTP_ROUTES", "LOCAL_USER", "LOCAL_USER_PERMISSIONS", "RPC_PERMISSIONS", "HttpRoute", "Permission"]


class Permission(StrEnum):
    """What a caller may do."""

    PUBLIC = "public"
    SESSIONS_READ = "sessions.read"
    SESSIONS_CLOSE = "sessions.close"
    FINDINGS_MARK = "findings.mark"
    SOURCES_PUBLISH = "sources.publish"
    RECORDINGS_READ = "recordings.read"
    RECORDINGS_WRITE = "recordings.write"
    WORKER_GENERATE = "worker.generate"
    SCHEMA_READ = "schema.read"


_DEBUGGER = "/moe_debugger.v1.DebuggerService/"

RPC_PERMISSIONS: dict[str, Permission] = {
    _DEBUGGER + "GetServerInfo": Permission.SESSIONS_READ,
    _DEBUGGER + "ListSessions": Permission.SESSIONS_READ,
    _DEBUGGER + "GetSession": Permission.SESSIONS_READ,
    _DEBUGGER + "GetHistory": Permission.SESSIONS_READ,
    _DEBUGGER + "GetSeries": Permission.SESSIONS_READ,
    _DEBUGGER + "ListRequests": Permission.SESSIONS_READ,
    _DEBUGGER + "GetRequestRoutes": Permission.SESSIONS_READ,
    _DEBUGGER + "CloseSession": Permission.SESSIONS_CLOSE,
    _DEBUGGER + "AcknowledgeFinding": Permission.FINDINGS_MARK,
    _DEBUGGER + "SilenceFinding": Permission.FINDINGS_MARK,
    _DEBUGGER + "Query": Permission.SESSIONS_READ,
    _DEBUGGER + "Watch": Permission.SESSIONS_READ,
    _DEBUGGER + "Generate": Permission.WORKER_GENERATE,
    _DEBUGGER + "OpenSource": Permission.SOURCES_PUBLISH,
    _DEBUGGER + "PublishRoutes": Permission.SOURCES_PUBLISH,
    _DEBUGGER + "CloseSource": Permission.SOURCES_PUBLISH,
    _DEBUGGER + "StartRecording": Permission.RECORDINGS_WRITE,
    _DEBUGGER + "StopRecording": Permission.RECORDINGS_WRITE,
    _DEBUGGER + "ListRecordings": Permission.SESSIONS_READ,
    # The rows can reveal the text.
    _DEBUGGER + "DownloadRecording": Permission.RECORDINGS_READ,
    "/grpc.health.v1.Health/Check": Permission.PUBLIC,
    "/grpc.health.v1.Health/List": Permission.PUBLIC,
    "/grpc.health.v1.Health/Watch": Permission.PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Permission.SCHEMA_READ,
}

# Who stands behind every call until there is login.
LOCAL_USER = "local user"
LOCAL_USER_PERMISSIONS = frozenset(Permission)


@dataclass(frozen=True, slots=True)
class HttpRoute:
    """One kind of HTTP request on the web port.

    Attributes:
        pattern: a path; a last segment of "*" stands for any rest, "{rpc}" for the paths of `RPC_PERMISSIONS` that the
            web port offers, each of which needs its own permission on top.
    """

    methods: tuple[str, ...]
    pattern: str
    permission: Permission


HTTP_ROUTES = (
    HttpRoute(("POST",), "{rpc}", Permission.PUBLIC),
    HttpRoute(("GET", "HEAD"), "/healthz", Permission.PUBLIC),
    HttpRoute(("GET", "HEAD"), "/assets/*", Permission.PUBLIC),
    HttpRoute(("GET", "HEAD"), "/*", Permission.PUBLIC),
)
