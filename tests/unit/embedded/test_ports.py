"""Ports are the user's choice or an error, else a preferred one, else a free one."""

import socket

import pytest

from moe_debugger.embedded.ports import is_port_free, reserve_port
from moe_debugger.errors import FleetError


@pytest.fixture
def taken_port():  # type: ignore[no-untyped-def]
    """Return a port on which a server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_requested_port_that_is_taken_is_an_error_that_names_it(taken_port: int) -> None:
    with pytest.raises(FleetError, match=rf"port {taken_port} \(--port\)"):
        reserve_port("the page", option="--port", requested=taken_port)


def test_another_port_is_chosen_and_said_where_the_preferred_one_is_taken(taken_port: int) -> None:
    port = reserve_port("the page", option="--port", preferred=taken_port)
    assert port.port != taken_port
    assert str(taken_port) in port.note
    assert str(port.port) in port.note
    port.close()


def test_a_reserved_port_is_nobody_elses_until_it_is_closed() -> None:
    first = reserve_port("the page")
    assert not is_port_free(first.port)
    with pytest.raises(FleetError):
        reserve_port("the page", requested=first.port)
    # Its own server may bind it now, but no other fleet may choose it.
    first.release()
    first.release()
    assert is_port_free(first.port)
    with pytest.raises(FleetError):
        reserve_port("the page", requested=first.port)
    first.close()
    first.close()
    second = reserve_port("the page", requested=first.port)
    assert second.port == first.port
    second.close()
