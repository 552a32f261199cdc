"""Every listening socket of the fleet is on loopback, or refuses a call without the credential."""

import ipaddress
import socket
import struct
from pathlib import Path
from typing import Any

import grpc
import pytest
from e2e.fleet import Fleet

from moe_debugger.v1 import collector_pb2, collector_pb2_grpc

LISTEN = "0A"


def _address(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, port = text.split(":")
    words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
    packed = b"".join(struct.pack("<I", word) for word in words)
    address = ipaddress.ip_address(packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped, int(port, 16)
    return address, int(port, 16)


def listening_sockets(pids: set[int]) -> dict[tuple[str, int], int]:
    """Return (address, port) -> pid of all listening TCP sockets of these processes."""
    inodes: dict[str, int] = {}
    for pid in pids:
        try:
            for entry in (Path("/proc") / str(pid) / "fd").iterdir():
                target = str(entry.readlink())
                if target.startswith("socket:["):
                    inodes[target[8:-1]] = pid
        except OSError:
            continue
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                address, port = _address(fields[1])
                found[str(address), port] = inodes[fields[9]]
    return found


def _refuses(address: str, port: int) -> str | None:
    """Return why the port counts as refusing, or None where it served a call without a credential."""
    target = f"127.0.0.1:{port}" if address in ("0.0.0.0", "::") else f"{address}:{port}"
    with grpc.insecure_channel(target) as channel:
        refused = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
        # Ray's own servers (GCS, raylet, workers), Serve's listing, and our ingress.
        for method in (
            "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
            "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
            "/ray.rpc.NodeManagerService/GetNodeStats",
            "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
            "/ray.serve.RayServeAPIService/ListApplications",
            "/moe_debugger.v1.WorkerService/GetWorkerInfo",
        ):
            call: Any = channel.unary_unary(method)
            try:
                call(b"", timeout=5)
            except grpc.RpcError as error:
                if error.code() not in refused | {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE}:
                    return None
                if error.code() in refused:
                    return f"{method}: {error.code()}"
                continue
            return None
    return None


def _is_silent(address: str, port: int) -> bool:
    """Return whether the port speaks nothing that we can call: it closes or says nothing to bytes of HTTP."""
    target = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    with socket.create_connection((target, port), timeout=3) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.settimeout(3)
        try:
            return connection.recv(64) == b""
        except (TimeoutError, ConnectionResetError):
            return True


def test_every_listening_socket_is_on_loopback_or_refuses(fleet: Fleet) -> None:
    sockets = listening_sockets(set(fleet.processes()))
    ports = {port for _, port in sockets}
    for name in ("grpc", "worker"):
        assert int(fleet.endpoints[name].rsplit(":", 1)[1]) in ports, f"{name} is not among {sockets}"
    commands = fleet.processes()
    open_to_all = []
    for (address, port), pid in sockets.items():
        if ipaddress.ip_address(address).is_loopback:
            continue
        if _refuses(address, port) is None:
            open_to_all.append(f"{address}:{port} of {commands.get(pid, pid)}")
    assert not open_to_all, open_to_all


def test_the_workers_ingress_refuses_a_call_without_the_token(fleet: Fleet) -> None:
    front = int(fleet.endpoints["worker"].rsplit(":", 1)[1])
    refused = 0
    for _, port in listening_sockets(set(fleet.processes())):
        if port == front:
            continue
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                collector_pb2_grpc.WorkerServiceStub(channel).GetWorkerInfo(
                    collector_pb2.GetWorkerInfoRequest(), timeout=3
                )
            except grpc.RpcError as error:
                refused += error.code() == grpc.StatusCode.UNAUTHENTICATED
            else:
                pytest.fail(f"port {port} answered without the token")
    assert refused >= 1
