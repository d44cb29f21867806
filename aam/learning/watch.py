"""Ranks that watch each other: one that ends without a word ends the others, with a message.

Every rank holds a connection to rank 0. A killed process closes it at once; a machine that is
lost stops sending. A thread sends and listens, so that a rank may compute, compile or wait in a
collective for as long as it likes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from aam.learning.launch import complain

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 45.0  # without a beat: that rank or its machine is gone
TICK_SECONDS = 0.5
GRACE_SECONDS = 2.0  # an error on every rank is told by rank 0, without naming a rank
FAREWELL_SECONDS = 20.0  # rank 0 ends after the others, whose connections it holds
HEARD_SECONDS = 2.0  # that rank 0 waits for the others to hear its last word
CONNECT_SECONDS = 60.0
GONE = 1  # the exit code when another rank is gone
LONGEST = 2000  # characters of an error that is sent


@dataclass
class Link:
    """A connection to another rank."""

    rank: int  # -1: has not said yet who it is
    connection: socket.socket
    heard: float
    unread: bytes = b""
    finished: bool = False


@dataclass
class Watch:
    """The connections of this rank: of rank 0 to all, of the others to rank 0."""

    rank: int
    size: int
    explain: Callable[[int], str]  # why a rank may be gone
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    listener: socket.socket | None = None
    links: list[Link] = field(default_factory=list)
    failure: tuple[float, str, int] | None = None  # when to tell it, what, exit code
    own_failure: bool = False

    def listen(self, address: str) -> tuple[str, int, str]:
        """Rank 0: wait for the others in the background.

        Args:
            address: where they will look for this machine.

        Returns:
            Address, port and password for the others.
        """
        local = address in ("127.0.0.1", "localhost")
        both = not local and socket.has_dualstack_ipv6()
        self.listener = socket.create_server(
            (address if local else "", 0),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
        )
        return address, self.listener.getsockname()[1], self.token

    def connect(self, address: str, port: int, token: str) -> None:
        """Another rank: connect to rank 0."""
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        self.links.append(Link(0, connection, time.monotonic()))
        self._send(self.links[0], f"hello {token} {self.rank}")

    def start(self) -> None:
        """Begin to beat and to listen."""
        self._lock = threading.Lock()
        self._started = self._beaten = time.monotonic()
        self._selector = selectors.DefaultSelector()
        for link in self.links:
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        if self.listener is not None:
            self._selector.register(self.listener, selectors.EVENT_READ)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    def wait_for_all(self) -> None:
        """Wait until the others are connected; the watch itself gives up."""
        while not self.rank and len(self.links) < self.size - 1:
            time.sleep(0.01)

    def fail(self, text: str, code: int) -> None:
        """Tell the others why this rank ends; rank 0 has said it already."""
        with self._lock:
            self.own_failure = True
            if self.rank:
                self._send(self.links[0], f"error {code} {text[:LONGEST]}")
            else:
                self._end_others(code)
        if self.rank:  # rank 0 may still say the same itself
            self._closed.wait(GRACE_SECONDS + 5)

    def finish(self) -> None:
        """This rank has done its part: its end is no surprise."""
        with self._lock:
            for link in self.links:
                self._send(link, "done")
        if not self.rank:
            deadline = time.monotonic() + FAREWELL_SECONDS
            while time.monotonic() < deadline and not all(one.finished for one in self.links):
                time.sleep(0.02)
        self._closed.set()
        self._thread.join(2 * TICK_SECONDS)
        for link in self.links:
            link.connection.close()
        if self.listener is not None:
            self.listener.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(TICK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            with self._lock:
                if now - self._beaten > BEAT_SECONDS:
                    self._beaten = now
                    for link in self.links:
                        self._send(link, "beat")
            for link in self.links:
                if not link.finished and now - link.heard > SILENCE_SECONDS:
                    self._lost(link)
            missing = self.size - 1 - len(self.links)
            if not self.rank and missing and now - self._started > CONNECT_SECONDS:
                self._quit(f"{missing} of {self.size} ranks did not connect", GONE)
            if self.failure is not None and now > self.failure[0] and not self.own_failure:
                self._quit(*self.failure[1:])

    def _accept(self) -> None:
        assert self.listener is not None
        connection, _ = self.listener.accept()
        connection.settimeout(CONNECT_SECONDS)
        stranger = Link(-1, connection, time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ, stranger)

    def _read(self, link: Link) -> None:
        try:
            received = link.connection.recv(4096)
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(link.connection)
            if not link.finished and link.rank >= 0:
                self._lost(link)
            return
        link.heard = time.monotonic()
        *lines, link.unread = (link.unread + received).split(b"\n")
        for line in lines:
            if link.rank < 0 and not self._welcome(link, line.decode("utf-8", "replace")):
                return
            self._hear(link, line.decode("utf-8", "replace"))

    def _welcome(self, link: Link, line: str) -> bool:
        """Whether a new connection is a rank's; others look for open ports and are sent away."""
        word, _, rest = line.partition(" ")
        token, _, rank = rest.partition(" ")
        if word != "hello" or not secrets.compare_digest(token.encode(), self.token.encode()):
            self._selector.unregister(link.connection)
            link.connection.close()
            return False
        link.rank = int(rank)
        with self._lock:
            self.links.append(link)
        return True

    def _hear(self, link: Link, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "done":
            link.finished = True
        elif word == "end":
            self._quit("", int(rest))
        elif word == "error" and self.failure is None:
            code, _, text = rest.partition(" ")
            told = f"rank {link.rank}: {text}"
            self.failure = (time.monotonic() + GRACE_SECONDS, told, int(code))
            link.finished = True

    def _lost(self, link: Link) -> None:
        link.finished = True
        if self.failure is None and not self.own_failure:
            prefix = f"rank {self.rank}: " if self.rank else ""
            self._quit(f"{prefix}{self.explain(link.rank)}", GONE)

    def _quit(self, text: str, code: int) -> None:
        """End this process from the thread: the main one may wait in a collective for ever."""
        with self._lock:
            if not self.own_failure:
                if text:
                    complain(text)
                self._end_others(code)
                os._exit(code)
        self._closed.set()

    def _end_others(self, code: int) -> None:
        """Rank 0: tell the others to end, and wait a moment until they have heard it.

        A connection that is closed before all was read is reset, and takes its last word with it.
        """
        if self.rank:
            return
        for link in self.links:
            self._send(link, f"end {code}")
        deadline = time.monotonic() + HEARD_SECONDS
        for link in self.links:
            with contextlib.suppress(OSError):
                link.connection.settimeout(max(0.01, deadline - time.monotonic()))
                while link.connection.recv(4096):
                    pass

    def _send(self, link: Link, line: str) -> None:
        with contextlib.suppress(OSError):
            link.connection.sendall(line.replace("\n", " ").encode() + b"\n")
