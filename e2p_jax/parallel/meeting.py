"""Lets the processes of a run meet before jax connects them, and makes the end of one the end of all.

They meet at the coordinator's port. jax ends a process that waits for another in vain by an abort without names; here
process 0 knows who is missing. The connections stay open: a process that dies, or whose machine is no longer reached
for `LOST_SECONDS`, is named by all others, and they end with `RESTART`.

Anybody who reaches the port can say something there. What is no hello in form is ignored, by name, and holds up
nobody. A hello in form is believed; with E2P_TOKEN in the environment of all processes, only that of one who knows it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import hmac
import ipaddress
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NoReturn

from e2p_jax.errors import RESTART, UserError
from e2p_jax.terminal import say

LOST_SECONDS = 30
LONGEST_LINE = 1_000_000  # bytes; the answer names all hosts
LONGEST_HELLO, HELLO_SECONDS = 4096, 5
STRANGERS = 64  # connections beside those of the run that may stay silent at once
NAMED = 10  # strangers that are named
_RETRY_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among several."""

    coordinator: str
    count: int
    process: int
    device_ids: Sequence[int] | None  # of this host's GPUs; None is all


def name_of(process: int, hosts: dict[int, str]) -> str:
    """`process 1 (host b)`, by what it said itself, or else by what the launcher knows."""
    listed = (os.environ.get("E2P_HOSTS") or os.environ.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    host = hosts.get(process) or (listed[process] if process < len(listed) else "")
    return f"process {process} (host {host})" if host else f"process {process}"


@dataclasses.dataclass
class Link:
    """One open connection; lines of JSON go over it."""

    connection: socket.socket
    unread: bytes = b""

    @classmethod
    def over(cls, connection: socket.socket) -> "Link":
        for option, value in (
            ("TCP_KEEPIDLE", LOST_SECONDS // 3),
            ("TCP_KEEPINTVL", LOST_SECONDS // 6),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 1000 * LOST_SECONDS),
        ):
            if hasattr(socket, option):  # Linux has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return cls(connection)

    @property
    def address(self) -> str:
        """Of who is at the other end."""
        try:
            return ":".join(map(str, self.connection.getpeername()[:2]))
        except OSError:
            return "somebody who has gone"

    def say(self, **values: Any) -> None:
        with contextlib.suppress(OSError):  # who is gone needs no news
            self.connection.settimeout(LOST_SECONDS)
            self.connection.sendall(json.dumps(values).encode() + b"\n")

    def hear(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next line; None at the end of the connection, after `timeout` seconds, or for what is no line of ours."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while b"\n" not in self.unread:
                left = None if deadline is None else deadline - time.monotonic()
                if len(self.unread) > LONGEST_LINE or (left is not None and left <= 0):
                    return None
                self.connection.settimeout(left)
                if not (more := self.connection.recv(4096)):
                    return None
                self.unread += more
            line, _, self.unread = self.unread.partition(b"\n")
            heard = json.loads(line)
        except (OSError, ValueError, RecursionError):
            return None
        return heard if isinstance(heard, dict) else None

    def close(self) -> None:
        self.connection.close()


@dataclasses.dataclass
class Peers:
    """The processes of a run and the connections between process 0 and the others."""

    process: int
    hosts: dict[int, str]
    links: dict[int, Link]

    def watch(self) -> None:
        """From now on, what ends another process out of order ends this one."""
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, link in self.links.items():
                selector.register(link.connection, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select():
                    heard = self.links[key.data].hear()
                    if heard is None:
                        lost = name_of(key.data, self.hosts)
                        self.end(RESTART, f"lost {lost}: it was killed, or its machine is not reached any more")
                    if "code" in heard:
                        self.end(*_end_of(heard))
                    selector.unregister(key.fileobj)  # it has left in order

    def leave(self) -> None:
        """Says that this process ends in order."""
        for link in self.links.values():
            link.say(left=True)

    def end(self, code: int, message: str) -> NoReturn:
        """Ends this process and, through process 0, all others; whatever a thread may wait for."""
        say(f"e2p: {message}")
        for link in self.links.values():
            link.say(code=code, message=message)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _end_of(heard: dict[str, Any]) -> tuple[int, str]:
    """Exit code and message that another process ends with."""
    code, message = heard["code"], heard.get("message")
    return (code, message) if code in range(1, 256) and isinstance(message, str) else (1, "another process failed")


def meet(place: Place, timeout: float) -> Peers:
    """Waits until every process has come to the coordinator's port.

    Raises:
      UserError: naming the processes, and where they are known the hosts, that did not come within `timeout` seconds;
        or two processes with one id, or with different counts.
    """
    return _host(place, timeout) if place.process == 0 else _join(place, timeout)


@dataclasses.dataclass(frozen=True)
class Hello:
    """The words of a process when it comes."""

    process: int
    count: int
    host: str

    def proof(self) -> str | None:
        """That who says it knows E2P_TOKEN; None where that is not set."""
        token = os.environ.get("E2P_TOKEN")
        said = f"{self.process} {self.count} {self.host}".encode()
        return hmac.new(token.encode(), said, hashlib.sha256).hexdigest() if token else None

    @classmethod
    def read(cls, heard: dict[str, Any] | None) -> "Hello":
        """Raises ValueError for what no process of ours says."""
        if heard is None:
            raise ValueError("no hello of e2p")
        process, count, host = (heard.get(name) for name in ("process", "count", "host"))
        if type(process) is not int or type(count) is not int or not 0 <= process < count < 2**31:
            raise ValueError("a hello without a process of a count")
        if not isinstance(host, str) or not 0 < len(host) < 256 or not host.isprintable():
            raise ValueError("a hello without a host's name")
        return cls(process, count, host)


def loopback(coordinator: str) -> bool:
    """Tells whether this address is reached from this machine alone."""
    literal = _literal(coordinator)
    return literal is not None and literal.is_loopback


def _literal(coordinator: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:  # a name; it may be resolved otherwise here than elsewhere
        return None


def _listen(coordinator: str, backlog: int) -> socket.socket:
    """At the coordinator's address, where it is a number and this machine's own; else at all of this machine's."""
    port, literal = int(coordinator.rpartition(":")[2]), _literal(coordinator)
    if literal is not None:
        family = socket.AF_INET if literal.version == 4 else socket.AF_INET6
        try:
            return socket.create_server((str(literal), port), family=family, backlog=backlog)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # an address that something in between translates
                raise
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=backlog)


def _callers(server: socket.socket, deadline: float, most: int) -> Generator[Link, None, None]:
    """Yields whoever has said a line, or has said none for too long or too long a one; until `deadline`.

    Nobody who is slow or silent holds up the others; of more than `most` such the eldest has to go.
    """
    silent: dict[socket.socket, tuple[Link, float]] = {}
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: _close(link for link, _ in silent.values()))
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            first = min((until for _, until in silent.values()), default=deadline)
            ready = {key.fileobj for key, _ in selector.select(max(min(first, deadline) - now, 0))}
            if server in ready:
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    silent[connection] = Link.over(connection), time.monotonic() + HELLO_SECONDS
                    selector.register(connection, selectors.EVENT_READ)
            for connection, (link, until) in list(silent.items()):
                ended = False
                if connection in ready:
                    try:
                        more = connection.recv(LONGEST_HELLO)
                    except OSError:
                        more = b""
                    link.unread += more
                    ended = not more or b"\n" in link.unread or len(link.unread) > LONGEST_HELLO
                if ended or time.monotonic() > until or (len(silent) > most and connection is next(iter(silent))):
                    selector.unregister(connection)
                    del silent[connection]
                    yield link


def _close(links: Iterable[Link]) -> None:
    for link in links:
        link.close()


def _host(place: Place, timeout: float) -> Peers:
    try:
        server = _listen(place.coordinator, place.count + STRANGERS)
    except OSError as error:
        port = place.coordinator.rpartition(":")[2]
        raise UserError(
            f"--coordinator {place.coordinator}: port {port} is taken here ({error}); choose another"
        ) from error
    peers = Peers(0, {0: socket.gethostname()}, {})
    ignored = 0

    def refuse(message: str, *more: Link) -> NoReturn:
        for link in (*peers.links.values(), *more):
            link.say(error=message)
            link.close()
        raise UserError(message)

    with server, contextlib.closing(_callers(server, time.monotonic() + timeout, place.count + STRANGERS)) as callers:
        for link in callers:
            try:
                hello = _heard(link)
            except ValueError as error:
                ignored += 1
                if ignored <= NAMED:
                    say(f"e2p: ignored {link.address} at {place.coordinator}: {error}")
                link.close()
                continue
            process, host = hello.process, hello.host
            if hello.count != place.count:
                refuse(
                    f"process {process} (host {host}) counts {hello.count} processes, process 0 (host "
                    f"{peers.hosts[0]}) counts {place.count}; start all with one --num-processes",
                    link,
                )
            if process in peers.hosts:
                refuse(
                    f"hosts {peers.hosts[process]} and {host} both say --process-id {process}; give each its own", link
                )
            peers.hosts[process], peers.links[process] = host, link
            if len(peers.hosts) == place.count:
                break
    missing = [name_of(p, {}) for p in range(place.count) if p not in peers.hosts]
    if missing:
        refuse(
            f"{len(missing)} of {place.count} processes did not come within {timeout:g} s: "
            f"{', '.join(missing)}; see their logs, check that they reach "
            f"{place.coordinator}, or raise --start-timeout"
        )
    for link in peers.links.values():
        link.say(hosts=peers.hosts)
    return peers


def _heard(link: Link) -> Hello:
    """Raises ValueError for whoever is not one of ours; who has another token is told."""
    heard = link.hear(0)
    hello = Hello.read(heard)
    proof = (heard or {}).get("proof")
    if not hmac.compare_digest(repr(proof).encode(), repr(hello.proof()).encode()):
        link.say(error="process 0 has another E2P_TOKEN than this one; give all processes the same, or none")
        raise ValueError(f"process {hello.process} (host {hello.host}) has another E2P_TOKEN than process 0")
    return hello


def _join(place: Place, timeout: float) -> Peers:
    host, _, port = place.coordinator.rpartition(":")
    hello = Hello(place.process, place.count, socket.gethostname())
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
        except OSError:
            time.sleep(_RETRY_SECONDS)
            continue
        link = Link.over(connection)
        link.say(**dataclasses.asdict(hello), proof=hello.proof())
        answer = link.hear(timeout + 10)
        hosts = answer and answer.get("hosts")
        if answer and "error" in answer:
            link.close()
            raise UserError(str(answer["error"]))
        if not isinstance(hosts, dict) or set(hosts) != {str(number) for number in range(place.count)}:
            link.close()  # an earlier run that has not yet ended, or a process 0 that has
            time.sleep(_RETRY_SECONDS)
            continue
        return Peers(place.process, {int(number): str(name) for number, name in hosts.items()}, {0: link})
    raise UserError(
        f"{name_of(0, {0: host})} did not answer at {place.coordinator} within {timeout:g} s; see its log, check that "
        "its port is reached from here, or raise --start-timeout"
    )
