"""Errors of the analyzer that its RPC edge tells apart."""

from moe_debugger.errors import MoEDebuggerError

__all__ = ["NotFoundError"]


class NotFoundError(MoEDebuggerError):
    """There is no such session, request or finding in this tenant."""
