"""What the loopback hub sends back, and what can go wrong with it on the way."""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

PIECE = 2**16
PIECES_A_SECOND = 50
LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
PATIENCE = 2.0
HTML_PAGE = b"<!DOCTYPE html>\n<html><body><h1>Log in to this network</h1></body></html>\n"


@dataclass
class Reply:
    """What the hub sends back; of a file, also the byte that its body begins with."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    first_byte: int | None = None


@dataclass
class Transfer:
    """Bytes of a file that were sent: its path in the URL, the first of them, and how many."""

    path: str
    first: int
    sent: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Fault:
    """What goes wrong with the requests that match; what is left out goes right.

    A fault of a body concerns no HEAD, and an ignored range only requests for one.

    Attributes:
        path: A regular expression, found anywhere in the URL's path.
        method: Such as "GET"; any if empty.
        times: How many requests it befalls, the first ones; None for all of them.
        latency: Seconds until the answer begins.
        offline: The connection is reset and there is no answer.
        status: Answered instead; for example 503 or 416.
        retry_after: Seconds to wait, or a date, told along with the status.
        error_code: What the client goes by, told along with the status.
        html: A web page is the answer, as behind the login page of a network.
        redirect_loop: The answer is to ask the same again.
        ignore_range: The whole file is the answer to a request for a part.
        content: The file has become this, with the ETag and the size that follow.
        length_error: Added to the Content-Length.
        corrupt: The byte in the middle of the body is flipped.
        cut_after: Bytes of the body after which the connection ends. A shorter body is whole,
            but counts.
        reset: It ends with an error instead of in good order.
        stall_after: Bytes of the body after which nothing comes for `stall_for` seconds.
        bytes_per_second: How fast the body comes.
    """

    path: str = ""
    method: str = ""
    times: int | None = None
    latency: float = 0
    offline: bool = False
    status: int | None = None
    retry_after: int | str | None = None
    error_code: str = ""
    html: bool = False
    redirect_loop: bool = False
    ignore_range: bool = False
    content: bytes | None = None
    length_error: int = 0
    corrupt: bool = False
    cut_after: int | None = None
    reset: bool = False
    stall_after: int = 0
    stall_for: float = 0
    bytes_per_second: int | None = None

    def concerns(self, method: str, path: str, has_range: bool) -> bool:
        """Whether this can befall a request."""
        cut, slow = self.cut_after is not None, self.bytes_per_second is not None
        if method == "HEAD" and (cut or slow or self.corrupt or self.stall_for):
            return False
        if self.ignore_range and not has_range:
            return False
        return self.method in ("", method) and re.search(self.path, path) is not None

    def answer(self) -> Reply | None:
        """What is answered instead, if anything."""
        if self.redirect_loop:
            return Reply(status=302, headers={"Location": "?again"})
        if self.html:
            return Reply(HTML_PAGE, self.status or 200, {"Content-Type": "text/html"})
        if self.status is None:
            return None
        message = f"The loopback hub was told to answer {self.status}"
        headers = {"X-Error-Message": message}
        if self.error_code:
            headers["X-Error-Code"] = self.error_code
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return Reply(json.dumps({"error": message}).encode(), self.status, headers)

    def pieces(self, body: bytes) -> Iterator[tuple[float, bytes]]:
        """The parts of a body that are sent, each after so many seconds of silence."""
        if self.corrupt:
            body = with_a_byte_flipped(body)
        body = body[: self.cut_after]
        rate = self.bytes_per_second
        size = max(rate // PIECES_A_SECOND, 1) if rate else PIECE
        early, late = body[: self.stall_after], body[self.stall_after :]
        for part, silence in ((early, 0.0), (late, self.stall_for)):
            for start in range(0, max(len(part), 1), size):
                piece = part[start : start + size]
                yield (silence if start == 0 else 0) + (len(piece) / rate if rate else 0), piece

    def resets(self, body: bytes) -> bool:
        """Whether the connection ends with an error after what was sent of a body."""
        return self.reset and self.cut_after is not None and self.cut_after < len(body)


SOUND = Fault()
"""Nothing goes wrong."""


def gated(repo_id: str, status: int = 403) -> Fault:
    """Terms to accept: 401 is for a stranger, 403 for a user; listings are open to everyone."""
    path = rf"/{re.escape(repo_id)}/resolve/"
    return Fault(path=path, status=status, error_code="GatedRepo")


def with_a_byte_flipped(body: bytes) -> bytes:
    """Other bytes, in the middle."""
    middle = len(body) // 2
    return (
        body[:middle]
        + bytes(byte ^ 0xFF for byte in body[middle : middle + 1])
        + body[middle + 1 :]
    )


def break_off(connection: socket.socket, stream: BinaryIO) -> None:
    """Reset a connection, by which the other side knows an error from an end."""
    wait_for_arrival(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    stream.close()  # The socket stays open for as long as a stream of it is.
    connection.close()


def wait_for_arrival(connection: socket.socket) -> None:
    """Wait until what was sent is with the other side: a reset would take the rest back."""
    if sys.platform != "linux":
        time.sleep(0.05)
        return
    import fcntl
    import termios

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(
        fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(struct.calcsize("i")))
    ):
        time.sleep(0.002)
