"""The installed fleet needs nothing but loopback: it runs in a network namespace that has only `lo`."""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys

import pytest
from e2e.fleet import COMMAND

IN_NAMESPACE = "MOE_TEST_IN_NAMESPACE"
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sH14s", b"lo", 0, b"")
        (flags,) = struct.unpack_from("H", fcntl.ioctl(probe, SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", flags | IFF_UP, b""))


def can_make_namespaces() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    return subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.netns
def test_the_fleet_runs_where_there_is_only_loopback() -> None:
    if not can_make_namespaces():
        if os.environ.get("CI"):
            pytest.fail("network namespaces are needed here (CAP_NET_ADMIN and `unshare`)")
        pytest.skip("needs CAP_NET_ADMIN and `unshare`: run as root")
    assert COMMAND.exists()
    done = subprocess.run(
        ["unshare", "-n", sys.executable, __file__],
        env={**os.environ, IN_NAMESPACE: "1", "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "generated 16 tokens" in done.stdout


def _inside() -> None:
    from e2e.fleet import Fleet

    _bring_loopback_up()
    interfaces = [name for _, name in socket.if_nameindex()]
    assert interfaces == ["lo"], interfaces
    fleet = Fleet(recount=False)
    try:
        fleet.wait_until_ready()
        done = fleet.generate("def f(x):\n", 16)
        assert done.is_finished
        print(f"generated {done.num_generated_tokens} tokens")
    finally:
        fleet.close()


if __name__ == "__main__" and os.environ.get(IN_NAMESPACE):
    _inside()
