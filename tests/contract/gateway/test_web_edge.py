"""The web port as an attacker, a proxy or a broken client meets it: bodies, headers, hosts, origins, paths, files."""

import base64
import contextlib
import gzip
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
from contract.gateway.callers import SERVICE, CallError, NativeCaller, WebCaller, frame, http
from contract.gateway.conftest import Bench

from moe_debugger.v1 import collector_pb2
from moe_debugger.v1 import gateway_pb2 as pb

INFO = f"/{SERVICE}/GetServerInfo"
GRPC_WEB = {"content-type": "application/grpc-web+proto"}


async def _status(bench: Bench, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """Return the gRPC status of a raw gRPC-Web POST."""
    caller = WebCaller(bench.gateway.web_port)
    caller.headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        async for _ in caller.raw(path, body):
            pass
    except CallError as error:
        return error.code, error.message
    return 0, ""


class TestBodies:
    async def test_gzip_request_is_read(self, bench: Bench) -> None:
        for is_text in (False, True):
            caller = WebCaller(bench.gateway.web_port, is_text=is_text, compressed=True)
            request = pb.GetHistoryRequest(session_id=bench.session_id, resolution_s=1, max_points=5)
            assert (await caller.unary("GetHistory", request)).points[0].num_tokens == 5

    async def test_text_of_several_segments_is_read(self, bench: Bench) -> None:
        body = frame(b"")
        text = b"".join(base64.b64encode(body[start : start + 1]) for start in range(len(body)))
        headers = {"content-type": "application/grpc-web-text"}
        async with http(bench.gateway.web_port, "POST", INFO, headers, text) as response:
            assert response.status == 200
            assert "grpc-status" not in response.headers

    async def test_decompression_bomb_is_refused_in_little_memory(self, bench: Bench) -> None:
        # Small enough to pass the limit of the body (8192 bytes), so that only the decompressed size can refuse it.
        deflate = zlib.compressobj(9, wbits=31)
        small = deflate.compress(bytes(6_000_000)) + deflate.flush()
        assert len(small) < 8192
        before = psutil.Process().memory_info().rss
        body = struct.pack(">BI", 1, len(small)) + small
        code, message = await _status(bench, INFO, body, grpc_encoding="gzip")
        assert (code, "after decompression" in message) == (8, True)
        assert psutil.Process().memory_info().rss - before < 5_000_000

    @pytest.mark.parametrize("is_text", [False, True])
    async def test_oversized_request_is_refused_by_its_length_and_by_its_bytes(
        self, bench: Bench, is_text: bool
    ) -> None:
        request = pb.DebuggerServiceGenerateRequest(request=collector_pb2.GenerateRequest(prompt="x" * 20_000))
        with pytest.raises(CallError) as caught:
            await WebCaller(bench.gateway.web_port, is_text=is_text).unary("Generate", request)
        assert (caught.value.code, caught.value.reasons) == (8, ["MESSAGE_TOO_LARGE"])
        chunk = b"4e20\r\n" + b"x" * 20_000 + b"\r\n"
        headers = {**GRPC_WEB, "transfer-encoding": "chunked"}
        async with http(bench.gateway.web_port, "POST", INFO, headers, chunk) as response:
            assert response.headers["grpc-status"] == "8"

    async def test_oversized_native_request_is_refused(self, bench: Bench) -> None:
        caller = NativeCaller(bench.gateway.grpc_port)
        request = pb.DebuggerServiceGenerateRequest(request=collector_pb2.GenerateRequest(prompt="x" * 20_000))
        with pytest.raises(CallError) as caught:
            async for _ in caller.stream("Generate", request):
                pass
        assert caught.value.code == 8
        await caller.close()

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            (b"", "0 frames"),
            (b"\x00\x00", "header"),
            (b"\x00\x00\x00\x00\x09abc", "announces 9 bytes"),
            (frame(b"") * 2, "2 frames"),
            (b"\x80\x00\x00\x00\x00", "flag is 0x80"),
            (b"\x01\x00\x00\x00\x00", "no grpc-encoding"),
            (frame(b"\xff\xff\xff"), "not a valid protobuf"),
        ],
    )
    async def test_broken_body_is_an_invalid_argument(self, bench: Bench, body: bytes, text: str) -> None:
        code, message = await _status(bench, INFO, body)
        assert (code, text in message) == (3, True), message

    async def test_text_that_is_not_base64_is_an_invalid_argument(self, bench: Bench) -> None:
        headers = {"content-type": "application/grpc-web-text"}
        async with http(bench.gateway.web_port, "POST", INFO, headers, b"AAAA!") as response:
            assert response.headers["grpc-status"] == "3"

    async def test_encodings_other_than_gzip_are_unimplemented_and_named(self, bench: Bench) -> None:
        payload = b"\x01\x00\x00\x00\x01x"
        async with http(
            bench.gateway.web_port, "POST", INFO, {**GRPC_WEB, "grpc-encoding": "zstd"}, payload
        ) as response:
            assert response.headers["grpc-status"] == "12"
            assert response.headers["grpc-accept-encoding"] == "identity,gzip"

    async def test_truncated_gzip_is_an_invalid_argument(self, bench: Bench) -> None:
        data = gzip.compress(b"x" * 100)[:-4]
        code, _ = await _status(bench, INFO, struct.pack(">BI", 1, len(data)) + data, grpc_encoding="gzip")
        assert code == 3

    @pytest.mark.parametrize("timeout", ["", "1", "m", "-1S", "123456789m", "1x", "1 S"])
    async def test_broken_timeout_is_an_invalid_argument(self, bench: Bench, timeout: str) -> None:
        code, _ = await _status(bench, INFO, frame(b""), grpc_timeout=timeout)
        assert code == 3

    async def test_critical_header_given_twice_is_refused(self, bench: Bench) -> None:
        headers = [*GRPC_WEB.items(), ("grpc-timeout", "5S"), ("grpc-timeout", "9S")]
        async with http(bench.gateway.web_port, "POST", INFO, headers, frame(b"")) as response:
            assert response.headers["grpc-status"] == "3"


class TestPaths:
    @pytest.mark.parametrize(
        "path",
        [
            "/moe_debugger.v1.DebuggerService/Nothing",
            "/moe_debugger.v1.AnalyzerService/ListSessions",
            "/grpc.health.v1.Health/Check",
            f"/{INFO}",
            f"{INFO}/",
            "/",
            f"/{SERVICE}%2fGetServerInfo/x",
            "/moe_debugger.v1.debuggerservice/GetServerInfo",
        ],
    )
    async def test_unknown_method_is_unimplemented(self, bench: Bench, path: str) -> None:
        code, _ = await _status(bench, path, frame(b""))
        assert code == 12

    @pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
    async def test_other_methods_are_refused(self, bench: Bench, method: str) -> None:
        async with http(bench.gateway.web_port, method, INFO) as response:
            assert response.status == 405
            assert response.headers["allow"] == "GET, HEAD, POST"
            # No answer ever invites another origin.
            assert not any(name.startswith("access-control") for name in response.headers)


class TestHostsAndOrigins:
    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""]
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_foreign_host_is_misdirected(self, bench: Bench, host: str, method: str) -> None:
        port = bench.gateway.web_port
        headers = {**GRPC_WEB, "host": host.format(port=port)}
        path, body = (INFO, frame(b"")) if method == "POST" else ("/", b"")
        async with http(port, method, path, headers, body) as response:
            assert response.status == 421

    async def test_two_hosts_are_misdirected(self, bench: Bench) -> None:
        port = bench.gateway.web_port
        headers = [("host", f"127.0.0.1:{port}"), ("host", "evil.example")]
        async with http(port, "GET", "/healthz", headers) as response:
            assert response.status in (400, 421)

    @pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
    async def test_own_names_are_served(self, bench: Bench, name: str) -> None:
        port = bench.gateway.web_port
        headers = {**GRPC_WEB, "host": f"{name}:{port}", "origin": f"http://{name}:{port}"}
        async with http(port, "POST", INFO, headers, frame(b"")) as response:
            assert response.status == 200

    @pytest.mark.parametrize(
        "origin",
        [
            "null",
            "http://evil.example",
            "https://127.0.0.1:{port}",
            "http://127.0.0.1:{port}.evil.example",
            "http://127.0.0.1",
            "http://localhost:{port}",
            "",
        ],
    )
    async def test_foreign_origin_is_forbidden(self, bench: Bench, origin: str) -> None:
        port = bench.gateway.web_port
        headers = {**GRPC_WEB, "origin": origin.format(port=port)}
        async with http(port, "POST", INFO, headers, frame(b"")) as response:
            assert response.status == 403

    @pytest.mark.parametrize(
        "content_type",
        ["", "application/json", "text/plain", "application/grpc", "application/grpc-web+json", "application/proto"],
    )
    async def test_other_content_types_are_refused(self, bench: Bench, content_type: str) -> None:
        headers = {"content-type": content_type}
        async with http(bench.gateway.web_port, "POST", INFO, headers, frame(b"")) as response:
            assert response.status == 415

    async def test_huge_headers_are_refused(self, bench: Bench) -> None:
        async with http(bench.gateway.web_port, "GET", "/", {"x-filler": "a" * 20_000}) as response:
            assert response.status == 431


class TestPage:
    @pytest.fixture
    def overrides(self, tmp_path: Path) -> dict[str, Any]:
        root = tmp_path / "page" / "static"
        (root / "assets").mkdir(parents=True)
        (root / "index.html").write_text("<!doctype html><title>page</title>")
        (root / "assets" / "app-1a2b.js").write_text("export {}")
        (root / "favicon.svg").write_text("<svg/>")
        (root / ".env").write_text("hidden")
        (tmp_path / "page" / "secret.txt").write_text("secret")
        os.symlink(tmp_path / "page" / "secret.txt", root / "assets" / "link.txt")
        return {"static_dir": root}

    @pytest.mark.parametrize(
        ("path", "content_type", "cache"),
        [
            ("/", "text/html; charset=utf-8", "no-cache"),
            ("/sessions/01abc", "text/html; charset=utf-8", "no-cache"),
            ("/favicon.svg", "image/svg+xml", "no-cache"),
            ("/assets/app-1a2b.js", "text/javascript; charset=utf-8", "public, max-age=31536000, immutable"),
        ],
    )
    async def test_files_have_their_types_and_lifetimes(
        self, bench: Bench, path: str, content_type: str, cache: str
    ) -> None:
        async with http(bench.gateway.web_port, "GET", path) as response:
            assert response.status == 200
            assert (response.headers["content-type"], response.headers["cache-control"]) == (content_type, cache)
            assert await response.body()
            csp = response.headers["content-security-policy"]
        assert "default-src 'self'" in csp
        assert "script-src" not in csp
        assert "frame-ancestors 'none'" in csp
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        async with http(bench.gateway.web_port, "HEAD", path) as response:
            assert response.status == 200

    @pytest.mark.parametrize(
        "path",
        [
            "/../secret.txt",
            "/assets/../../secret.txt",
            "/%2e%2e/secret.txt",
            "/assets/%2e%2e%2f%2e%2e%2fsecret.txt",
            "/..%5csecret.txt",
            "/assets/link.txt",
            "/assets/missing.js",
            "/.env",
            "/assets/%00.js",
            "/assets/" + "a" * 5000 + ".js",
            "//etc/passwd.txt",
        ],
    )
    async def test_nothing_outside_the_folder_is_served(self, bench: Bench, path: str) -> None:
        async with http(bench.gateway.web_port, "GET", path) as response:
            assert response.status == 404
            assert b"secret" not in await response.body()

    async def test_health_says_what_is_ready(self, bench: Bench) -> None:
        async with http(bench.gateway.web_port, "GET", "/healthz") as response:
            assert response.status == 200
            health = json.loads(await response.body())
        assert health["status"] == "ok"
        assert set(health["components"]) == {"nats", "analyzer", "worker"}


async def test_page_that_is_not_built_says_so_while_the_api_works(bench: Bench) -> None:
    async with http(bench.gateway.web_port, "GET", "/") as response:
        assert response.status == 503
        assert b"make web" in await response.body()
    code, _ = await _status(bench, INFO, frame(b""))
    assert code == 0


async def test_connections_are_kept_alive_and_errors_do_not_poison_them(bench: Bench) -> None:
    port = bench.gateway.web_port
    async with contextlib.AsyncExitStack() as stack:
        responses = [await stack.enter_async_context(http(port, "GET", "/healthz")) for _ in range(20)]
        assert [response.status for response in responses] == [200] * 20
