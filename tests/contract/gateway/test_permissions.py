"""Deny by default: the running server is walked; everything that it answers to has a row in the permission table."""

from typing import Any

import grpc
import pytest
from contract.gateway.callers import CallError, NativeCaller, WebCaller, http
from contract.gateway.conftest import Bench
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moe_debugger.v1 import gateway_pb2 as pb
from moe_gateway.permissions import HTTP_ROUTES, LOCAL_USER_PERMISSIONS, RPC_PERMISSIONS, Permission


async def _served_methods(port: int) -> set[str]:
    """Ask the server by reflection for every method of every service."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.enable_http_proxy", 0),)) as channel:
        untyped_channel: Any = channel
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(untyped_channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = [service.name for service in (await call.read()).list_services_response.service]
        methods = set()
        for service in services:
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service))
            for data in (await call.read()).file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                for described in file.service:
                    if f"{file.package}.{described.name}" == service:
                        methods |= {f"/{service}/{method.name}" for method in described.method}
        await call.done_writing()
        return methods


async def test_every_served_method_has_a_row_and_every_row_is_served(bench: Bench) -> None:
    assert await _served_methods(bench.gateway.grpc_port) == set(RPC_PERMISSIONS)


async def test_every_method_of_the_proto_is_reachable_on_the_web_port(bench: Bench) -> None:
    for method in pb.DESCRIPTOR.services_by_name["DebuggerService"].methods:
        path = f"/moe_debugger.v1.DebuggerService/{method.name}"
        assert RPC_PERMISSIONS[path] in LOCAL_USER_PERMISSIONS
        async with http(
            bench.gateway.web_port, "POST", path, {"content-type": "application/grpc-web+proto"}, b"\0\0\0\0\0"
        ) as response:
            assert response.headers.get("grpc-status") != "12"


async def test_every_http_request_is_a_row_or_refused(bench: Bench) -> None:
    allowed = {(method, route.pattern) for route in HTTP_ROUTES for method in route.methods}
    samples = {"{rpc}": "/moe_debugger.v1.DebuggerService/GetServerInfo", "/assets/*": "/assets/x.js", "/*": "/view"}
    for pattern in {route.pattern for route in HTTP_ROUTES}:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
            headers = {"content-type": "application/grpc-web"}
            async with http(
                bench.gateway.web_port, method, samples.get(pattern, pattern), headers, b"\0\0\0\0\0"
            ) as response:
                if method == "POST" and pattern != "{rpc}":
                    assert response.headers["grpc-status"] == "12"
                elif (method, pattern) not in allowed and (method, "/*") not in allowed:
                    assert response.status in (400, 405), (method, pattern)


@pytest.mark.parametrize("transport", ["native", "web"])
async def test_method_without_a_row_is_denied(bench: Bench, monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    monkeypatch.delitem(RPC_PERMISSIONS, "/moe_debugger.v1.DebuggerService/GetServerInfo")
    monkeypatch.delitem(RPC_PERMISSIONS, "/moe_debugger.v1.DebuggerService/Watch")
    caller = NativeCaller(bench.gateway.grpc_port) if transport == "native" else WebCaller(bench.gateway.web_port)
    with pytest.raises(CallError) as caught:
        await caller.unary("GetServerInfo", pb.GetServerInfoRequest())
    assert (caught.value.code, caught.value.reasons) == (7, ["DENIED"])
    with pytest.raises(CallError) as caught:
        async for _ in caller.stream("Watch", pb.WatchRequest()):
            pass
    assert caught.value.code == 7
    if isinstance(caller, NativeCaller):
        await caller.close()


def test_no_row_grants_what_is_not_a_permission() -> None:
    assert all(isinstance(permission, Permission) for permission in RPC_PERMISSIONS.values())
