"""A small Hugging Face hub on 127.0.0.1, for the real client to download from and upload to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from hub_faults import SOUND, Fault, Reply, Transfer, break_off

Json = dict[str, Any]

CLIENT = tuple(int(number) for number in version("huggingface_hub").split(".")[:2])
"""Version of the real client."""

USER = "hub-user"
LARGEST_REGULAR_FILE = 5 * 2**20
SAMPLE_SIZE = 512
LFS_SUFFIXES = {".bin", ".gguf", ".npz", ".onnx", ".parquet", ".pt", ".safetensors", ".zip"}

NAME = r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)"
REVISION = r"(?P<revision>[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{NAME}"
SITE = rf"/(?:(?P<kind>datasets)/)?{NAME}"
OBJECT = r"/lfs/(?P<oid>[0-9a-f]{64})"


class HubError(Exception):
    """A refusal, with the code and the message that the client looks for in the headers."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.reply = Reply(json.dumps({"error": message}).encode(), status, headers)
        self.reply.headers |= {"X-Error-Code": code, "X-Error-Message": message}


@dataclass(frozen=True)
class StoredFile:
    """A file of a repository: its ETag, and the sizes and hashes that listings give of it."""

    source: Path
    etag: str
    listing: Json


Files = dict[str, StoredFile]


def belongs_in_lfs(path: str, size: int, content: bytes) -> bool:
    """Whether a file goes to large file storage; the client never sends an empty one there."""
    unfit_for_git = size > LARGEST_REGULAR_FILE or b"\0" in content[:SAMPLE_SIZE]
    return size > 0 and (unfit_for_git or PurePosixPath(path).suffix in LFS_SUFFIXES)


def blob_id(content: bytes) -> str:
    """The id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_id(files: Files) -> str:
    """An id in the form of a git commit's that follows from the paths and the contents alone."""
    lines = (f"{path}\0{file.etag}\n" for path, file in sorted(files.items()))
    return hashlib.sha1("".join(lines).encode()).hexdigest()


@cache
def examine(source: Path, _size: int, _modified_ns: int) -> StoredFile:
    """Hash a file, once for as long as its size and its modification time stay the same."""
    return describe(source, source.read_bytes())


def describe(source: Path, content: bytes) -> StoredFile:
    """A file as it is with this content."""
    size = len(content)
    if not belongs_in_lfs(source.name, size, content):
        oid = blob_id(content)
        return StoredFile(source, oid, {"size": size, "oid": oid, "blobId": oid})
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    # The tree says "oid" and repository information "sha256" or "blobId"; a listing has them all.
    lfs = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}
    oid = blob_id(pointer.encode())
    return StoredFile(source, sha256, {"size": size, "oid": oid, "blobId": oid, "lfs": lfs})


def inside(folder: Path, relative: str) -> Path:
    """The place of a path in a folder, refused if it leads out of it."""
    place = (folder / relative).resolve()
    if ".." in relative.split("/") or folder not in place.parents:
        raise HubError(400, "BadRequest", "Invalid path")
    return place


def stored_files(repository: Path) -> Files:
    """Every file of a repository, by path."""
    found = ((file, file.stat()) for file in sorted(repository.rglob("*")) if file.is_file())
    return {
        file.relative_to(repository).as_posix(): examine(file, stat.st_size, stat.st_mtime_ns)
        for file, stat in found
    }


def tree_entries(files: Files) -> dict[str, Json]:
    """Every file and every folder, by path, as listings describe them."""
    entries = {path: file.listing | {"type": "file", "path": path} for path, file in files.items()}
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    for folder in sorted(folders):
        oid = tree_id({path: files[path] for path in files if path.startswith(f"{folder}/")})
        entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
    return entries


def carry_out(operations: list[Json], repository: Path, objects: dict[str, bytes]) -> None:
    """Change a repository as a commit says, or refuse before any of it has happened."""
    changes: dict[Path, bytes | None] = {}
    for action, value in ((operation["key"], operation["value"]) for operation in operations):
        place = inside(repository, value["path"])
        if action == "file":
            changes[place] = base64.b64decode(value["content"])
        elif action == "lfsFile" and value["oid"] in objects:
            changes[place] = objects[value["oid"]]
        elif action == "deletedFile" and place.is_file():
            changes[place] = None
        else:
            raise HubError(400, "BadRequest", "This operation cannot be carried out")
    for place, content in changes.items():
        if content is None:
            place.unlink()
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)


ENDPOINTS: dict[str, Callable[..., object]] = {}


def endpoint(pattern: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Let a method answer the requests that match, with the pattern's groups as its arguments."""
    return lambda method: ENDPOINTS.setdefault(pattern, method)


class Conversation(BaseHTTPRequestHandler):
    """A request and its reply; HTTP/1.0 closes the connection, so none outlives the hub."""

    def __init__(self, hub: LoopbackHub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        location = urlsplit(self.path)
        self.query = parse_qs(location.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.one_at_a_time:
            self.hub.requests.append(f"{self.command} {location.path}")
            self.fault = self.hub.next_fault(self.command, location.path, "Range" in self.headers)
        if self.hub.stopped.wait(self.fault.latency):
            return
        if self.fault.offline:
            break_off(self.connection, self.rfile)
            return
        with self.hub.one_at_a_time:
            reply = self.fault.answer() or self.reply_to(f"{self.command} {location.path}")
        with suppress(ConnectionError):  # The client may leave when it likes.
            self.send(reply, Transfer(location.path, reply.first_byte or 0))

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def send(self, reply: Reply, transfer: Transfer) -> None:
        """Send a reply, or what its fault leaves of it; a slow one keeps no other waiting."""
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body) + self.fault.length_error))
        self.end_headers()
        if self.command == "HEAD":
            return
        if reply.first_byte is not None:
            self.hub.transfers.append(transfer)
        for silence, piece in self.fault.pieces(reply.body):
            if self.hub.stopped.wait(silence):
                return
            # Counted first: whoever has received it can rely on finding it here.
            transfer.sent += len(piece)
            self.wfile.write(piece)
        if self.fault.resets(reply.body):
            break_off(self.connection, self.rfile)

    def log_message(self, *_: object) -> None:
        """Say nothing: the hub's list of requests is the log."""

    def reply_to(self, request: str) -> Reply:
        for pattern, method in ENDPOINTS.items():
            if match := re.fullmatch(pattern, request):
                groups = {name: text and unquote(text) for name, text in match.groupdict().items()}
                try:
                    answer = method(self, **groups)
                except HubError as error:
                    return error.reply
                return answer if isinstance(answer, Reply) else Reply(json.dumps(answer).encode())
        return HubError(404, "NotFound", "The loopback hub has no such endpoint").reply

    def require_token(self) -> None:
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def repository(self, kind: str | None, name: str, revision: str = "main") -> Path:
        repository = self.hub.root / (kind or "models") / name
        if not repository.is_dir():
            raise HubError(404, "RepoNotFound", "Repository not found")
        if revision not in {"main", tree_id(stored_files(repository))}:
            raise HubError(404, "RevisionNotFound", "Invalid rev id")
        return repository

    def site_url(self, repository: Path) -> str:
        address = repository.relative_to(self.hub.root).as_posix()
        return f"{self.hub.url}/{address.removeprefix('models/')}"

    @endpoint("GET /api/whoami-v2")
    def whoami(self) -> Json:
        self.require_token()
        return {"type": "user", "name": USER, "orgs": []}

    @endpoint("POST /api/validate-yaml")
    def validate_yaml(self) -> Json:
        return {"errors": [], "warnings": []}

    @endpoint("POST /api/repos/create")
    def create_repository(self) -> Json | Reply:
        self.require_token()
        wish = json.loads(self.body)
        address = f"{wish.get('type', 'model')}s/{wish['organization'] or USER}/{wish['name']}"
        if not re.fullmatch(API, f"/api/{address}"):
            raise HubError(400, "BadRequest", "Invalid repository type or name")
        repository = inside(self.hub.root, address)
        created = {"url": self.site_url(repository)}
        if repository.is_dir():
            # The client reads the URL even here when it was told that existing is fine.
            return Reply(json.dumps(created | {"error": "It exists already"}).encode(), 409)
        repository.mkdir(parents=True)
        if wish.get("private") or wish.get("visibility") == "private":
            self.hub.private.add(repository)
        return created

    @endpoint(rf"GET {API}(?:/revision/{REVISION})?")
    def repository_info(self, kind: str, name: str, revision: str | None) -> Json:
        repository = self.repository(kind, name, revision or "main")
        files, private = stored_files(repository), repository in self.hub.private
        siblings = [{"rfilename": path} for path in files]
        if "blobs" in self.query:
            siblings = [{"rfilename": path} | files[path].listing for path in files]
        return {"id": name, "sha": tree_id(files), "private": private, "siblings": siblings}

    @endpoint(rf"GET {API}/tree/{REVISION}(?:/(?P<folder>.+))?")
    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> list[Json]:
        entries = tree_entries(stored_files(self.repository(kind, name, revision)))
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, "EntryNotFound", "Entry not found")
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        below = {path.removeprefix(prefix): path for path in entries if path.startswith(prefix)}
        return [entries[path] for rest, path in below.items() if recursive or "/" not in rest]

    @endpoint(rf"POST {API}/paths-info/{REVISION}")
    def paths_info(self, kind: str, name: str, revision: str) -> list[Json]:
        entries = tree_entries(stored_files(self.repository(kind, name, revision)))
        paths = parse_qs(self.body.decode()).get("paths", [])
        return [entries[path] for path in paths if path in entries]

    @endpoint(rf"(?:GET|HEAD) {SITE}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> Reply:
        files = stored_files(self.repository(kind, name, revision))
        headers = {"X-Repo-Commit": tree_id(files)}
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found", **headers)
        file, content = files[path], files[path].source.read_bytes()
        if self.fault.content is not None:
            content = self.fault.content
            file = describe(file.source, content)
        etag, size = f'"{file.etag}"', len(content)
        headers |= {"Accept-Ranges": "bytes", "ETag": etag}
        if "lfs" in file.listing:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", etag) == etag
        if not span or not unchanged or self.fault.ignore_range:
            return Reply(content, headers=headers, first_byte=0)
        part = content[int(span[1]) : int(span[2]) + 1 if span[2] else size]
        if not part:
            return Reply(status=416, headers=headers | {"Content-Range": f"bytes */{size}"})
        last = int(span[1]) + len(part) - 1
        headers |= {"Content-Range": f"bytes {span[1]}-{last}/{size}"}
        return Reply(part, 206, headers, int(span[1]))

    @endpoint(rf"POST {API}/preupload/{REVISION}")
    def choose_upload_modes(self, kind: str, name: str, revision: str) -> Json:
        self.require_token()
        files = stored_files(self.repository(kind, name, revision))
        answers = []
        for offer in json.loads(self.body)["files"]:
            path, sample = offer["path"], base64.b64decode(offer["sample"])
            mode = "lfs" if belongs_in_lfs(path, offer["size"], sample) else "regular"
            present = {"oid": files[path].etag} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | present)
        return {"files": answers}

    @endpoint(rf"POST {SITE}\.git/info/lfs/objects/batch")
    def place_objects(self, kind: str | None, name: str) -> Json:
        self.require_token()
        self.repository(kind, name)
        wanted = json.loads(self.body)["objects"]
        for item in wanted:
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": wanted}

    @endpoint(f"PUT {OBJECT}")
    def receive_object(self, oid: str) -> Json:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadRequest", "The content has another SHA-256")
        self.hub.objects[oid] = self.body
        return {}

    @endpoint(f"POST {OBJECT}/verify")
    def verify_object(self, oid: str) -> Json:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(400, "BadRequest", "The object is missing or has another size")
        return {}

    @endpoint(rf"POST {API}/commit/{REVISION}")
    def commit(self, kind: str, name: str, revision: str) -> Json:
        self.require_token()
        repository = self.repository(kind, name, revision)
        _header, *operations = (json.loads(line) for line in self.body.splitlines())
        carry_out(operations, repository, self.hub.objects)
        oid = tree_id(stored_files(repository))
        url = f"{self.site_url(repository)}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url}


class LoopbackHub:
    """A hub that serves (and accepts into) a folder: ROOT/{models,datasets}/ORG/NAME.

    Attributes:
        requests: What was asked for, as "GET /path", in order.
        transfers: The bodies of files that were sent, in order.
        faults: What goes wrong. Of those that concern a request and are not used up, the
            first one befalls it; they may change at any time.
        happened: How many requests each fault befell.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.requests: list[str] = []
        self.transfers: list[Transfer] = []
        self.faults: list[Fault] = []
        self.happened: Counter[Fault] = Counter()
        self.objects: dict[str, bytes] = {}
        self.private: set[Path] = set()
        self.one_at_a_time = threading.Lock()
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Conversation, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs in its environment for its huggingface_hub to talk to this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_loopback",
        }

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[Fault]:
        """Let this go wrong for a while."""
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def next_fault(self, method: str, path: str, has_range: bool) -> Fault:
        """What befalls a request, which is counted."""
        for fault in tuple(self.faults):
            used_up = fault.times is not None and self.happened[fault] >= fault.times
            if not used_up and fault.concerns(method, path, has_range):
                self.happened[fault] += 1
                return fault
        return SOUND

    def __enter__(self) -> Self:
        serve = partial(self._server.serve_forever, poll_interval=0.05)
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
