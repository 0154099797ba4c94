"""The network interface that gloo uses, where it would choose one that other machines cannot reach.

Gloo listens at the address that this machine's host name resolves to, or at the loopback address if there is none. Many
systems give their own name a loopback address (127.0.1.1 in /etc/hosts): ranks of other machines then cannot connect.
"""

import fcntl
import socket
import struct
from ipaddress import ip_address

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def gloo_interface(host: str, master: str) -> str | None:
    """Return the interface towards node 0 if gloo would use the loopback address, though node 0 is elsewhere.

    Args:
        host: the host name of this machine.
        master: the host name or address of node 0.

    Returns:
        A name for GLOO_SOCKET_IFNAME; None if gloo's own choice can be reached, or no better one is known.
    """
    chosen = _first_own_address(host)
    if chosen is not None and not ip_address(chosen).is_loopback:
        return None
    towards = _address_towards(master)
    if towards is None or ip_address(towards).is_loopback:
        return None
    return _interface_with(towards)


def _first_own_address(host: str) -> str | None:
    """Return the first address of a host name at which this machine can listen, as gloo takes it."""
    for family, kind, protocol, _, address in _resolved(host, socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return str(address[0])
    return None


def _address_towards(host: str) -> str | None:
    """Return the IPv4 address from which this machine connects to another one; nothing is sent."""
    for family, kind, protocol, _, address in _resolved(host, socket.SOCK_DGRAM, socket.AF_INET):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect((address[0], 9))
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return None


def _resolved(host: str, kind: socket.SocketKind, family: int = 0) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        return socket.getaddrinfo(host, 0, family, kind)  # type: ignore[return-value]
    except (OSError, UnicodeError):
        return []


def _interface_with(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
