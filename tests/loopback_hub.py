"""A small Hugging Face hub on 127.0.0.1, for the real client to download from and upload to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]

USER = "hub-user"
LARGEST_REGULAR_FILE = 5 * 2**20
SAMPLE_SIZE = 512
LFS_SUFFIXES = {".bin", ".gguf", ".npz", ".onnx", ".parquet", ".pt", ".safetensors", ".zip"}

NAME = r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)"
REVISION = r"(?P<revision>[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{NAME}"
SITE = rf"/(?:(?P<kind>datasets)/)?{NAME}"
OBJECT = r"/lfs/(?P<oid>[0-9a-f]{64})"


@dataclass
class Reply:
    """What the hub sends back."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


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
def inspect(source: Path, size: int, _modified_ns: int) -> StoredFile:
    """Hash a file, once for as long as its size and its modification time stay the same."""
    content = source.read_bytes()
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


@dataclass(frozen=True)
class Repository:
    """A folder that the hub serves as a model or a dataset."""

    folder: Path
    address: str

    def files(self) -> Files:
        sources = {s: s.stat() for s in sorted(self.folder.rglob("*")) if s.is_file()}
        return {
            source.relative_to(self.folder).as_posix(): inspect(source, stat.st_size, stat.st_mtime_ns)
            for source, stat in sources.items()
        }

    def entries(self) -> dict[str, Json]:
        """Every folder and every file, by path, as listings describe them."""
        files = self.files()
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        entries = {path: {"type": "file", "path": path} | files[path].listing for path in files}
        for folder in sorted(folders):
            below = {path: file for path, file in files.items() if path.startswith(f"{folder}/")}
            entries[folder] = {"type": "directory", "path": folder, "oid": tree_id(below), "size": 0}
        return entries

    def commit(self, operations: list[Json], objects: dict[str, bytes]) -> str:
        """Carry out every operation, or none of them if one is refused."""
        changes: dict[Path, bytes | None] = {}
        for action, value in ((operation["key"], operation["value"]) for operation in operations):
            place = inside(self.folder, value["path"])
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
        return tree_id(self.files())


ENDPOINTS: list[tuple[str, Callable[..., object]]] = []


def endpoint(pattern: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Let a method answer the requests that match, with the pattern's groups as its arguments."""

    def register(method: Callable[..., object]) -> Callable[..., object]:
        ENDPOINTS.append((pattern, method))
        return method

    return register


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
            reply = self.reply_to(f"{self.command} {location.path}")
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing: the hub's list of requests is the log."""

    def reply_to(self, request: str) -> Reply:
        self.hub.requests.append(request)
        for pattern, method in ENDPOINTS:
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

    def repository(self, kind: str | None, name: str, revision: str = "main") -> Repository:
        kind = kind or "models"
        address = name if kind == "models" else f"{kind}/{name}"
        repository = Repository(self.hub.root / kind / name, address)
        if not repository.folder.is_dir():
            raise HubError(404, "RepoNotFound", "Repository not found")
        if revision not in {"main", tree_id(repository.files())}:
            raise HubError(404, "RevisionNotFound", "Invalid rev id")
        return repository

    @endpoint("GET /api/whoami-v2")
    def whoami(self) -> Json:
        self.require_token()
        token = {"displayName": "loopback", "role": "write"}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": USER, "name": USER, "orgs": [], "auth": auth}

    @endpoint("POST /api/validate-yaml")
    def validate_yaml(self) -> Json:
        return {"errors": [], "warnings": []}

    @endpoint("POST /api/repos/create")
    def create_repository(self) -> Json:
        self.require_token()
        wish = json.loads(self.body)
        kind, name = f"{wish.get('type', 'model')}s", f"{wish['organization'] or USER}/{wish['name']}"
        if kind not in {"models", "datasets"} or not re.fullmatch(NAME, name):
            raise HubError(400, "BadRequest", "Invalid repository type or name")
        folder = inside(self.hub.root, f"{kind}/{name}")
        ...

