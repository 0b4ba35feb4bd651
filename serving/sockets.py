"""Who listens where: free addresses, and whether an address is served by the processes we started."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from serving.reaper import descendants

LISTENING = "0A"  # the state as /proc/net/tcp writes it
LOWEST_PORT = 10_000
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_EPHEMERAL_PORT = 32_768  # Linux's own default


def check_port_free(host: str, port: int) -> None:
    """Refuse an address that a server could not listen on.

    Raises:
        ValueError: the port is in use or out of range, or the host is not one of this machine's.
    """
    if not 1024 <= port <= 65535:
        raise ValueError(f"port {port} is out of range: pass --port between 1024 and 65535")
    with _socket_for(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            _bind(probe, host, port)
            probe.listen(1)
        except OSError as error:
            raise ValueError(f"port {port} is in use; stop what listens there or pass --port") from error


def free_port(host: str) -> int:
    """A port that nothing listens on at this moment.

    Ephemeral ports, which ``bind`` gives for port 0, are the last resort: until the server listens, minutes later,
    any connection that anyone opens may be given the same one.

    Raises:
        ValueError: the host is not one of this machine's.
    """
    table = EPHEMERAL_RANGE.read_text().split() if EPHEMERAL_RANGE.is_file() else [LOWEST_EPHEMERAL_PORT]
    below_ephemeral = range(LOWEST_PORT, int(table[0]))
    with _socket_for(host) as probe:
        for port in (*random.sample(below_ephemeral, min(100, len(below_ephemeral))), 0):
            try:
                _bind(probe, host, port)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == 0:
                    raise
        return probe.getsockname()[1]


def _bind(probe: socket.socket, host: str, port: int) -> None:
    try:
        probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        if isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"host {host} is not an address of this machine: pass --host 127.0.0.1") from error
        raise


def _socket_for(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def listens_below(pid: int, port: int) -> bool:
    """Whether a process below ``pid`` listens on ``port``. Between the check of a port and its use, or on a
    shared port, a stranger's server may answer in ours' place."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if table.is_file():
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    return any(_holds(child, inodes) for child in descendants(pid)) if inodes else False


def _holds(pid: int, inodes: set[str]) -> bool:
    try:
        for descriptor in (Path("/proc") / str(pid) / "fd").iterdir():
            try:
                if str(descriptor.readlink()) in inodes:
                    return True
            except OSError:  # closed meanwhile
                continue
    except OSError:  # ended meanwhile
        pass
    return False
