"""Nodes whose own host name has a loopback address, or none: gloo uses the interface towards node 0."""

import socket
from pathlib import Path

import pytest

from mlet_dist.cluster.gloo_interface import gloo_interface


@pytest.fixture(scope="module")
def outside() -> tuple[str, str]:
    """The interface of this machine's default route, and its address; nothing is sent."""
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    names = [fields[0] for fields in routes if fields[1] == "00000000"]
    if not names:
        pytest.skip("this machine has no default route")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.200", 9))  # an address for examples
        return names[0], str(probe.getsockname()[0])


@pytest.mark.parametrize("host", ["localhost", "127.0.1.1", "no-such-host.invalid"])
def test_a_name_that_others_cannot_reach_makes_gloo_use_the_interface_towards_node_0(
    host: str, outside: tuple[str, str]
) -> None:
    interface, address = outside
    assert gloo_interface(host, "192.0.2.200") == interface
    assert gloo_interface(host, address) == interface  # on node 0 itself


def test_a_name_that_others_can_reach_is_left_to_gloo(outside: tuple[str, str]) -> None:
    assert gloo_interface(outside[1], "192.0.2.200") is None


@pytest.mark.parametrize("master", ["localhost", "127.0.0.1", "no-such-host.invalid"])
def test_nodes_on_one_machine_and_unknown_ones_are_left_to_gloo(master: str) -> None:
    assert gloo_interface("localhost", master) is None
