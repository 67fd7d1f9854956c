"""Whole files from the Hub: resumed where they broke off, and compared with their hash.

What has arrived lies in NAME.part and survives the process and the machine. A file gets
its name only when its bytes have the hash that the Hub lists.
"""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nope_gpt.data.digests import Digest
from nope_gpt.errors import NetworkError
from nope_gpt.files.writing import sync, writing
from nope_gpt.hub.remote import contacting

ATTEMPTS = 8
"""In a row that brought nothing, before giving up."""

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
LONGEST_WISH = 600.0
"""Seconds that a Retry-After is obeyed, at most."""

LOCKS = ".locks"
POLL_SECONDS = 0.2

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""

PASSING = (408, 409, 416, 425, 429, 500, 502, 503, 504)
"""Answers after which another attempt may succeed."""


@dataclass(frozen=True)
class Remote:
    """A file on the Hub.

    Attributes:
        repo_id: Of a data set.
        revision: A commit, so that the content cannot change.
        path: Within the repository.
        size: In bytes.
        digest: Of its bytes.
    """

    repo_id: str
    revision: str
    path: str
    size: int
    digest: Digest


class Broken(Exception):
    """An attempt that failed; says why, and how many seconds to wait if the Hub said so."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class Downloads:
    """Files fetched into a directory, several at a time.

    Args:
        directory: Where they go; made when it is needed.
        tell: Called with bytes that arrived, negative for bytes that were thrown away, and
            with something to say, if anything.
    """

    def __init__(self, directory: Path, tell: Callable[[int, str], None]) -> None:
        self.directory = directory
        self.tell = tell
        self.stopped = threading.Event()
        self.locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)

    def path_of(self, remote: Remote) -> Path:
        """Where a file lies once it is here: a name of its content, not of its address."""
        return self.directory / f"{remote.digest.short}{Path(remote.path).suffix}"

    def missing(self, remote: Remote) -> int:
        """Bytes of a file that are not here."""
        path = self.path_of(remote)
        here = max(size_of(path), size_of(path.with_name(f"{path.name}.part")))
        return max(remote.size - here, 0)

    def fetch(self, remote: Remote) -> Path:
        """Return the file's place, downloading what is missing of it.

        Raises:
            NetworkError: The Hub did not deliver it, or delivered something else.
            MissingError: It is not there, or not for us.
            CapacityError: The disk is full.
        """
        path = self.path_of(remote)
        with self.locks[path], self.alone(path, remote):
            return self.fetch_to(path, remote)

    @contextmanager
    def alone(self, path: Path, remote: Remote) -> Iterator[None]:
        """Wait until no other process fetches the same bytes to the same place."""
        lock = FileLock(self.directory / LOCKS / f"{path.name}.lock", timeout=0)
        has_waited = False
        while not lock.is_locked:
            with writing(Path(lock.lock_file)), suppress(Timeout):
                Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                break
            if not has_waited:
                self.tell(0, f"{remote.path}: another process fetches it: waiting")
            has_waited = True
            if self.stopped.wait(POLL_SECONDS):
                raise NetworkError(f"{remote.path} was not fetched", where=str(path))
        try:
            yield
        finally:
            lock.release()

    def fetch_to(self, path: Path, remote: Remote) -> Path:
        """The same, when nobody else fetches the same bytes."""
        part = path.with_name(f"{path.name}.part")
        if path.is_file():
            if remote.digest.is_of(path):
                self.tell(remote.size, "")
                return path
            path.unlink()
        with writing(part):
            part.touch()
        self.tell(size_of(part), "")
        damaged = failures = 0
        while True:
            before = size_of(part)
            try:
                self.continue_with(part, remote)
                if remote.digest.is_of(part):
                    break
                damaged += 1
                self.discard(part)
                raise Broken(f"its bytes are not those that the Hub lists ({remote.digest[:14]}…)")
            except Broken as error:
                failures = 0 if size_of(part) > before else failures + 1
                if failures >= ATTEMPTS or damaged >= 3 or self.stopped.is_set():
                    raise NetworkError(
                        f"{remote.path} could not be downloaded: {error}",
                        where=f"https://huggingface.co/datasets/{remote.repo_id}",
                        hint="try again when the network is back",
                    ) from None
                self.wait(remote, error, failures)
        with writing(path):
            sync(part)
            part.replace(path)
            sync(path.parent)
        return path

    def wait(self, remote: Remote, error: Broken, failures: int) -> None:
        """Pause before another attempt: as long as the Hub says, or ever longer."""
        backoff = min(FIRST_PAUSE * 2 ** max(failures - 1, 0), LONGEST_PAUSE)
        pause = error.pause if error.pause is not None else backoff * random.uniform(0.5, 1.0)
        self.tell(0, f"{remote.path}: {error}; trying again in {pause:.0f} s")
        self.stopped.wait(pause)

    def discard(self, part: Path) -> None:
        """Begin a file anew."""
        self.tell(-size_of(part), "")
        part.write_bytes(b"")

    def continue_with(self, part: Path, remote: Remote) -> None:
        """Ask for what is missing of a file, and keep what comes.

        Raises:
            Broken: Not all of it came.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        have = size_of(part)
        if have > remote.size:
            self.discard(part)
            have = 0
        if have == remote.size:
            return
        url = hf_hub_url(remote.repo_id, remote.path, repo_type="dataset", revision=remote.revision)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT
            ) as response:
                if response.status_code in PASSING:
                    if response.status_code == 416:
                        self.discard(part)
                    raise Broken(
                        f"the Hub answered {response.status_code}",
                        retry_after(response.headers.get("Retry-After")),
                    )
                if response.status_code >= 400:
                    response.read()
                    with contacting("data set", remote.repo_id, "try again later"):
                        hf_raise_for_status(response)
                self.receive(response, part, remote, have)
        except (HTTPError, OSError) as error:
            raise Broken(f"the connection broke ({type(error).__name__})") from None
        if size_of(part) < remote.size:
            raise Broken("the answer ended early")

    def receive(self, response: Any, part: Path, remote: Remote, have: int) -> None:
        """Append the body of an answer to what is here, or begin anew if it does."""
        resumed = response.status_code == 206 and response.headers.get(
            "Content-Range", ""
        ).startswith(f"bytes {have}-")
        if have and not resumed:
            self.discard(part)
            have = 0
        if response.headers.get("Content-Length") not in (None, str(remote.size - have)):
            raise Broken("the answer has another length than the file")
        with writing(part):
            file = part.open("ab")
        with file:
            for chunk in response.iter_bytes():
                if self.stopped.is_set():
                    raise Broken("it was stopped")
                if have + len(chunk) > remote.size:
                    raise Broken("the answer is longer than the file")
                with writing(part):
                    file.write(chunk)
                    file.flush()
                have += len(chunk)
                self.tell(len(chunk), "")


def size_of(path: Path) -> int:
    """The size of a file, 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After asks for, whichever way it is written."""
    if value is None:
        return None
    if value.isdecimal():
        return min(float(value), LONGEST_WISH)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return min(max(moment - time.time(), 0.0), LONGEST_WISH)
