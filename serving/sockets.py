"""Who listens where: free addresses, and whether an address is served by the processes we started."""

from __future__ import annotations

import socket
from pathlib import Path

from serving.reaper import descendants

LISTENING = "0A"  # the state as /proc/net/tcp writes it


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
            probe.bind((host, port))
            probe.listen(1)
        except (OSError, UnicodeError) as error:
            if isinstance(error, socket.gaierror | UnicodeError) or "assign" in str(error):
                raise ValueError(f"host {host} is not an address of this machine: pass --host 127.0.0.1") from error
            raise ValueError(f"port {port} is in use; stop what listens there or pass --port") from error


def free_port(host: str) -> int:
    """A port that nothing listens on at this moment."""
    with _socket_for(host) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


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
