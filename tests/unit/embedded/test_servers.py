"""Where the servers come from: the wheel, then PATH with a version check, then an error that helps."""

import stat
import sysconfig
from pathlib import Path

import pytest

from moe_debugger.embedded import servers
from moe_debugger.errors import FleetError


def _program(folder: Path, name: str, answer: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def empty_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Hide the wheels and the machine's PATH; return the folder that is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path / "scripts"))
    monkeypatch.setattr(servers, "_valkey_wheel", lambda: None)
    return folder


def test_the_wheels_come_first() -> None:
    nats, valkey = servers.find_nats_server(), servers.find_valkey_server()
    assert (nats.origin, valkey.origin) == ("wheel", "wheel")
    assert nats.version >= (2, 12)
    assert valkey.version >= (8, 0)


def test_a_server_on_path_is_taken_where_it_is_new_enough(empty_scripts: Path) -> None:
    _program(empty_scripts, "nats-server", "nats-server: v2.12.3")
    _program(empty_scripts, "redis-server", "Redis server v=7.2.1 sha=0:0 malloc=libc")
    assert servers.find_nats_server().version == (2, 12, 3)
    redis = servers.find_valkey_server()
    assert (redis.origin, redis.product) == ("PATH", "redis-server")


def test_an_old_server_is_refused_with_its_version_and_what_to_do(empty_scripts: Path) -> None:
    _program(empty_scripts, "nats-server", "nats-server: v2.9.10")
    _program(empty_scripts, "redis-server", "Redis server v=6.2.5 sha=0:0 malloc=libc")
    with pytest.raises(FleetError, match=r"is 2\.9\.10.*pip install 'moe-debugger\[embedded\]'.*--nats-url"):
        servers.find_nats_server()
    with pytest.raises(FleetError, match=r"redis 6\.2\.5.*pip install.*--redis-url"):
        servers.find_valkey_server()


def test_configurations_are_private_and_bind_loopback(tmp_path: Path) -> None:
    password = servers.new_password()
    url = servers.nats_config(tmp_path / "n.conf", port=4222, password=password, store_dir=tmp_path / "nats")
    assert url == f"nats://moe:{password}@127.0.0.1:4222"
    servers.valkey_config(tmp_path / "v.conf", port=6379, password=password, work_dir=tmp_path)
    for name in ("n.conf", "v.conf"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        assert "127.0.0.1" in (tmp_path / name).read_text()
    assert password not in servers.without_password(url)


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"redis://127\.0\.0\.1:1 cannot be used") as caught:
        servers.check_redis("redis://:hunter2@127.0.0.1:1/0")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(FleetError, match=r"nats://127\.0\.0\.1:1 cannot be used") as caught:
        servers.check_nats("nats://moe:hunter2@127.0.0.1:1")
    assert "hunter2" not in str(caught.value)
