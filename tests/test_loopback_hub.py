"""The loopback hub, as the real client sees it from a process of its own."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub

Client = Callable[..., Any]

CONFIG = b'{"layers": 2}\n'
WEIGHTS = random.Random(0).randbytes(2**20)
SHARD = b"PAR1 a shard of text PAR1"


def write_tree(folder: Path, contents: dict[str, bytes]) -> Path:
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read_tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def call_client(function: str, *arguments: Any, **options: Any) -> Any:
    """Runs in the client's process; a commit comes back as its id, a generator as a list."""
    import huggingface_hub

    result = getattr(huggingface_hub, function)(*arguments, **options)
    if isinstance(result, huggingface_hub.CommitInfo):
        return result.oid
    return list(result) if isinstance(result, Iterator) else result


def resume_download(url: str, partial: Path) -> None:
    """Runs in the client's process."""
    from huggingface_hub.file_download import http_get

    with partial.open("ab") as file:
        http_get(url, file, resume_size=file.tell())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    root = tmp_path_factory.mktemp("hub") / "served"
    write_tree(
        root / "models/ada/tiny",
        {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer/merges.txt": b"a b\n"},
    )
    write_tree(root / "datasets/ada/corpus", {"data/train 0.parquet": SHARD})
    with LoopbackHub(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def client_process(
    hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, spawn) as pool:
        for name, value in hub.environment(tmp_path_factory.mktemp("home")).items():
            patch.setenv(name, value)
        pool.submit(int).result()  # Starts the process while the environment is right.
        yield pool


@pytest.fixture(scope="module")
def client(client_process: ProcessPoolExecutor) -> Client:
    return lambda *arguments, **options: client_process.submit(
        call_client, *arguments, **options
    ).result(timeout=60)


def test_a_file_downloads_byte_for_byte(client: Client, hub: LoopbackHub) -> None:
    assert Path(client("hf_hub_download", "ada/tiny", "model.safetensors")).read_bytes() == WEIGHTS
    assert "HEAD /ada/tiny/resolve/main/model.safetensors" in hub.requests


def test_a_dataset_file_downloads_byte_for_byte(client: Client) -> None:
    path = client("hf_hub_download", "ada/corpus", "data/train 0.parquet", repo_type="dataset")
    assert Path(path).read_bytes() == SHARD


def test_a_snapshot_holds_every_file(client: Client, hub: LoopbackHub) -> None:
    snapshot = Path(client("snapshot_download", "ada/tiny"))
    assert read_tree(snapshot) == read_tree(hub.root / "models/ada/tiny")


def test_a_snapshot_can_be_pinned_to_the_current_commit(client: Client) -> None:
    commit = client("model_info", "ada/tiny").sha
    snapshot = client("snapshot_download", "ada/tiny", revision=commit, allow_patterns="*.json")
    assert Path(snapshot).name == commit


def test_an_interrupted_download_fetches_only_the_rest(
    client_process: ProcessPoolExecutor, hub: LoopbackHub, tmp_path: Path
) -> None:
    half = len(WEIGHTS) // 2
    partial = tmp_path / "model.safetensors"
    partial.write_bytes(bytes(half))
    url = f"{hub.url}/ada/tiny/resolve/main/model.safetensors"
    client_process.submit(resume_download, url, partial).result(timeout=60)
    assert partial.read_bytes() == bytes(half) + WEIGHTS[half:]


def test_listings_tell_sizes_and_hashes(client: Client) -> None:
    files = {file.path: file for file in client("list_repo_tree", "ada/tiny")}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer"}
    assert files["config.json"].size == len(CONFIG)
    assert files["config.json"].lfs is None
    assert files["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    [weights, folder] = client("get_paths_info", "ada/tiny", ["model.safetensors", "tokenizer"])
    assert weights == files["model.safetensors"]
    assert folder == files["tokenizer"]
    [inner] = client("list_repo_tree", "ada/tiny", "tokenizer")
    assert inner.path == "tokenizer/merges.txt"


def test_repository_information_names_the_files_and_on_request_their_sizes(client: Client) -> None:
    names = client("list_repo_files", "ada/tiny")
    plain = client("model_info", "ada/tiny").siblings
    detailed = client("model_info", "ada/tiny", files_metadata=True).siblings
    assert [file.rfilename for file in plain] == [file.rfilename for file in detailed] == names
    assert [file.size for file in plain] == [None, None, None]
    assert [file.size for file in detailed] == [len(CONFIG), len(WEIGHTS), len(b"a b\n")]


def test_what_is_missing_is_reported_as_what_it_is(client: Client) -> None:
    with pytest.raises(RepositoryNotFoundError):
        client("hf_hub_download", "ada/absent", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        client("model_info", "ada/absent")
    with pytest.raises(EntryNotFoundError):
        client("hf_hub_download", "ada/tiny", "absent.json")
    with pytest.raises(RevisionNotFoundError):
        client("hf_hub_download", "ada/tiny", "config.json", revision="absent")


def test_an_uploaded_folder_downloads_byte_for_byte(
    client: Client, hub: LoopbackHub, tmp_path: Path
) -> None:
    contents = {
        "README.md": b"---\nlicense: mit\n---\n",
        "empty.txt": b"",
        "model.safetensors": random.Random(1).randbytes(2**20),
        "nested/binary.dat": b"\0\1\2",
        "nested/naïve name.txt": b"text",
    }
    folder = write_tree(tmp_path / "folder", contents)
    assert client("create_repo", "ada/uploaded").repo_id == "ada/uploaded"
    client("create_repo", "ada/uploaded", exist_ok=True)
    commit = client("upload_folder", repo_id="ada/uploaded", folder_path=folder)
    assert read_tree(hub.root / "models/ada/uploaded") == contents
    assert read_tree(Path(client("snapshot_download", "ada/uploaded"))) == contents
    assert client("model_info", "ada/uploaded").sha == commit
    weights = hashlib.sha256(contents["model.safetensors"]).hexdigest()
    assert f"PUT /lfs/{weights}" in hub.requests


def test_a_file_can_be_uploaded_to_a_dataset_and_replaced_and_deleted(
    client: Client, hub: LoopbackHub
) -> None:
    repo = {"repo_id": "ada/notes", "repo_type": "dataset"}
    client("create_repo", **repo)
    commits = [
        client("upload_file", path_or_fileobj=content, path_in_repo="a/note.txt", **repo)
        for content in (b"first", b"second", b"second", b"first")
    ]
    assert commits[0] == commits[3] != commits[1] == commits[2]
    assert hub.requests.count("POST /api/datasets/ada/notes/commit/main") == 3
    client("delete_file", "a/note.txt", **repo)
    assert client("list_repo_files", **repo) == []


def test_a_repository_that_exists_is_not_created_twice(client: Client) -> None:
    with pytest.raises(HfHubHTTPError, match="409"):
        client("create_repo", "ada/tiny")


def test_an_upload_without_a_token_is_refused(client: Client) -> None:
    with pytest.raises(HfHubHTTPError, match="401"):
        client("create_repo", "ada/anonymous", token=False)


def test_the_token_belongs_to_a_user(client: Client) -> None:
    assert client("whoami")["name"] == "hub-user"


@pytest.mark.parametrize("path", ["../escaped", "a/../../escaped", "a/../escaped", "/escaped"])
def test_a_commit_never_writes_outside_its_repository(hub: LoopbackHub, path: str) -> None:
    before = read_tree(hub.root.parent)
    content = base64.b64encode(b"content").decode()
    operations = [
        {"key": "header", "value": {"summary": "escape"}},
        {"key": "file", "value": {"path": "allowed", "content": content}},
        {"key": "file", "value": {"path": path, "content": content}},
    ]
    request = urllib.request.Request(
        f"{hub.url}/api/models/ada/tiny/commit/main",
        data="\n".join(map(json.dumps, operations)).encode(),
        headers={"Authorization": "Bearer hf_loopback"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert read_tree(hub.root.parent) == before


def test_a_cached_file_is_found_again_after_the_hub_has_stopped(
    client: Client, tmp_path: Path
) -> None:
    write_tree(tmp_path / "models/ada/cached", {"config.json": CONFIG})
    with LoopbackHub(tmp_path) as brief:
        online = client("hf_hub_download", "ada/cached", "config.json", endpoint=brief.url)
    offline = client("hf_hub_download", "ada/cached", "config.json", endpoint=brief.url)
    assert offline == online
    assert len(brief.requests) == 2
    assert Path(offline).read_bytes() == CONFIG
