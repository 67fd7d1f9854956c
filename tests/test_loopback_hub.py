"""The loopback hub, as the real client sees it from a process of its own.

What goes wrong byte by byte is looked at from as close as http.client lets one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from fnmatch import fnmatchcase
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hub_datasets
import pyarrow.parquet
import pytest
from hub_datasets import DataSet
from hub_faults import HTML_PAGE, Fault, Transfer, gated
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import CLIENT, LoopbackHub

Client = Callable[..., Any]

CONFIG = b'{"layers": 2}\n'
WEIGHTS = random.Random(0).randbytes(2**20)
SHARD = b"PAR1 a shard of text PAR1"
CONFIG_PATH = "/ada/tiny/resolve/main/config.json"
WEIGHTS_PATH = "/ada/tiny/resolve/main/model.safetensors"


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
    url = f"{hub.url}{WEIGHTS_PATH}"
    client_process.submit(resume_download, url, partial).result(timeout=60)
    assert partial.read_bytes() == bytes(half) + WEIGHTS[half:]
    assert hub.transfers[-1] == Transfer(WEIGHTS_PATH, half, len(WEIGHTS) - half)


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


class Answer(NamedTuple):
    """What the hub said."""

    status: int
    headers: Any
    body: bytes


def connect(hub: LoopbackHub) -> Any:
    """A connection to the hub that is closed in the end."""
    return closing(HTTPConnection(urlsplit(hub.url).netloc, timeout=20))


def ask(hub: LoopbackHub, path: str, method: str = "GET", **headers: str) -> Answer:
    """A request of its own, its headers written with underscores."""
    with connect(hub) as connection:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=fields)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def received(hub: LoopbackHub, path: str, **headers: str) -> bytes:
    """What arrives of a body, however it ends."""
    try:
        return ask(hub, path, **headers).body
    except IncompleteRead as error:
        return error.partial


@pytest.mark.parametrize("status", [500, 503, 429])
def test_the_first_requests_fail_and_the_next_succeeds(hub: LoopbackHub, status: int) -> None:
    with hub.fault(Fault(path=r"config\.json$", status=status, times=2)) as fault:
        answers = [ask(hub, CONFIG_PATH) for _ in range(3)]
    assert [answer.status for answer in answers] == [status, status, 200]
    assert answers[2].body == CONFIG
    assert hub.happened[fault] == 2
    assert answers[0].headers["Retry-After"] is None


@pytest.mark.parametrize("wish", [7, "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_a_failing_answer_can_say_when_to_try_again(hub: LoopbackHub, wish: int | str) -> None:
    with hub.fault(Fault(status=429, retry_after=wish)):
        assert ask(hub, CONFIG_PATH).headers["Retry-After"] == str(wish)


def test_a_fault_ends_with_its_block_even_if_it_would_last_forever(hub: LoopbackHub) -> None:
    with hub.fault(Fault(status=500)) as fault:
        assert [ask(hub, CONFIG_PATH).status for _ in range(4)] == [500] * 4
    assert ask(hub, CONFIG_PATH).status == 200
    assert hub.happened[fault] == 4
    assert not hub.faults


def test_faults_befall_only_what_matches_and_one_after_the_other(hub: LoopbackHub) -> None:
    first = Fault(path=r"\.json$", method="GET", status=500, times=1)
    second = Fault(path=r"\.json$", method="GET", status=503, times=1)
    with hub.fault(first), hub.fault(second):
        assert ask(hub, CONFIG_PATH, "HEAD").status == 200
        assert ask(hub, WEIGHTS_PATH).status == 200
        assert [ask(hub, CONFIG_PATH).status for _ in range(3)] == [500, 503, 200]


def test_a_connection_cut_in_good_order_leaves_a_short_body(hub: LoopbackHub) -> None:
    with hub.fault(Fault(path="model", cut_after=1000, times=2)) as fault:
        assert ask(hub, WEIGHTS_PATH, "HEAD").headers["Content-Length"] == str(len(WEIGHTS))
        bodies = [received(hub, WEIGHTS_PATH) for _ in range(3)]
    assert bodies == [WEIGHTS[:1000], WEIGHTS[:1000], WEIGHTS]
    assert hub.happened[fault] == 2


@pytest.mark.parametrize("cut", [0, 1000, 700_000])
def test_a_connection_that_is_reset_has_delivered_what_was_sent(hub: LoopbackHub, cut: int) -> None:
    with hub.fault(Fault(path="model", cut_after=cut, reset=True, times=1)):
        with connect(hub) as connection:
            connection.request("GET", WEIGHTS_PATH)
            response = connection.getresponse()
            assert response.headers["Content-Length"] == str(len(WEIGHTS))
            time.sleep(0.05)
            assert response.read(cut) == WEIGHTS[:cut]
            with pytest.raises(ConnectionResetError):
                response.read(1)
        assert ask(hub, WEIGHTS_PATH).body == WEIGHTS


def test_the_transfers_show_where_each_part_began(hub: LoopbackHub) -> None:
    content, before = b"", len(hub.transfers)
    with hub.fault(Fault(cut_after=400_000)):
        while len(content) < len(WEIGHTS):
            content += received(hub, WEIGHTS_PATH, Range=f"bytes={len(content)}-")
    assert content == WEIGHTS
    assert hub.transfers[before:] == [
        Transfer(WEIGHTS_PATH, 0, 400_000),
        Transfer(WEIGHTS_PATH, 400_000, 400_000),
        Transfer(WEIGHTS_PATH, 800_000, len(WEIGHTS) - 800_000),
    ]


def test_a_stalled_body_goes_on_after_a_silence(hub: LoopbackHub) -> None:
    start = time.monotonic()
    with hub.fault(Fault(path="model", stall_after=1000, stall_for=0.3, times=1)):
        assert ask(hub, WEIGHTS_PATH, "HEAD").status == 200
        assert ask(hub, WEIGHTS_PATH).body == WEIGHTS
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize(
    "fault",
    [
        Fault(path="model", stall_after=1000, stall_for=60, times=1),
        Fault(path="model", bytes_per_second=1000, times=1),
    ],
    ids=["stalled", "slow"],
)
def test_a_body_that_takes_long_keeps_no_other_request_waiting(
    hub: LoopbackHub, fault: Fault
) -> None:
    with hub.fault(fault), connect(hub) as connection:
        connection.request("GET", WEIGHTS_PATH)
        stream = connection.sock
        response = connection.getresponse()
        assert response.read(20) == WEIGHTS[:20]
        assert ask(hub, WEIGHTS_PATH).body == WEIGHTS
        assert hub.transfers[-2].sent <= 10_000
        if fault.stall_for:
            assert response.read(980) == WEIGHTS[20:1000]
            stream.settimeout(0.2)
            with pytest.raises(TimeoutError):
                response.read(1)


def test_a_stalled_body_ends_with_the_hub(tmp_path: Path) -> None:
    write_tree(tmp_path / "models/ada/tiny", {"config.json": CONFIG})
    brief = LoopbackHub(tmp_path)
    with connect(brief) as connection:
        with brief, brief.fault(Fault(stall_after=5, stall_for=60)):
            connection.request("GET", CONFIG_PATH)
            response = connection.getresponse()
            assert response.read(5) == CONFIG[:5]
        with pytest.raises(IncompleteRead):
            response.read()


def test_an_answer_can_be_late(hub: LoopbackHub) -> None:
    start = time.monotonic()
    with hub.fault(Fault(path="config", latency=0.3, times=1)):
        assert ask(hub, CONFIG_PATH, "HEAD").status == 200
        assert time.monotonic() - start >= 0.3
        assert ask(hub, CONFIG_PATH).body == CONFIG


def test_a_late_answer_keeps_no_other_request_waiting(hub: LoopbackHub) -> None:
    with hub.fault(Fault(path="config", latency=60)) as fault, connect(hub) as connection:
        connection.request("GET", CONFIG_PATH)
        while not hub.happened[fault]:
            time.sleep(0.01)
        assert ask(hub, WEIGHTS_PATH).body == WEIGHTS


def test_a_body_can_be_slow(hub: LoopbackHub) -> None:
    rate = 4 * len(WEIGHTS)
    with hub.fault(Fault(path="model", bytes_per_second=rate, times=1)):
        start = time.monotonic()
        assert ask(hub, WEIGHTS_PATH, "HEAD").status == 200
        assert ask(hub, WEIGHTS_PATH).body == WEIGHTS
        assert time.monotonic() - start >= len(WEIGHTS) / rate
        assert ask(hub, WEIGHTS_PATH).body == WEIGHTS


def test_a_range_can_be_ignored(hub: LoopbackHub) -> None:
    with hub.fault(Fault(ignore_range=True, times=1)) as fault:
        assert ask(hub, WEIGHTS_PATH).status == 200
        assert not hub.happened[fault], "a request for the whole is none that this befalls"
        status, _, body = ask(hub, WEIGHTS_PATH, Range="bytes=1000-")
        assert (status, body, hub.happened[fault]) == (200, WEIGHTS, 1)
        assert hub.transfers[-1] == Transfer(WEIGHTS_PATH, 0, len(WEIGHTS))
        status, _, body = ask(hub, WEIGHTS_PATH, Range="bytes=1000-")
        assert (status, body) == (206, WEIGHTS[1000:])


def test_one_byte_in_the_middle_of_a_body_can_be_flipped(hub: LoopbackHub) -> None:
    with hub.fault(Fault(path="model", corrupt=True, times=2)):
        assert ask(hub, WEIGHTS_PATH, "HEAD").status == 200
        whole = ask(hub, WEIGHTS_PATH).body
        part = ask(hub, WEIGHTS_PATH, Range="bytes=100-200").body
        assert ask(hub, WEIGHTS_PATH).body == WEIGHTS
    for damaged, right in ((whole, WEIGHTS), (part, WEIGHTS[100:201])):
        assert len(damaged) == len(right)
        differing = [i for i, byte in enumerate(right) if damaged[i] != byte]
        assert differing == [len(right) // 2]


def test_every_connection_can_be_reset_at_once(hub: LoopbackHub) -> None:
    before = len(hub.transfers)
    with hub.fault(Fault(offline=True)) as fault:
        for path, method in ((CONFIG_PATH, "HEAD"), (WEIGHTS_PATH, "GET"), ("/api/x", "GET")):
            with pytest.raises(ConnectionResetError) as caught:
                ask(hub, path, method)
            assert caught.type is ConnectionResetError, "not an end in good order"
    assert hub.happened[fault] == 3
    assert len(hub.transfers) == before
    assert ask(hub, CONFIG_PATH).body == CONFIG


def test_the_content_length_can_be_wrong(hub: LoopbackHub) -> None:
    for error, body in ((3, CONFIG), (-3, CONFIG[:-3])):
        with hub.fault(Fault(path="config", length_error=error, times=2)):
            told = ask(hub, CONFIG_PATH, "HEAD").headers["Content-Length"]
            assert int(told) == len(CONFIG) + error
            assert received(hub, CONFIG_PATH) == body
            assert ask(hub, CONFIG_PATH).body == CONFIG


def test_a_range_can_be_refused(hub: LoopbackHub) -> None:
    with hub.fault(Fault(path="model", method="GET", status=416, times=1)):
        assert [ask(hub, WEIGHTS_PATH, Range="bytes=9-").status for _ in range(2)] == [416, 206]
    assert ask(hub, WEIGHTS_PATH, Range=f"bytes={len(WEIGHTS)}-").status == 416


def test_a_web_page_can_come_instead(hub: LoopbackHub) -> None:
    before = len(hub.transfers)
    with hub.fault(Fault(html=True, times=1)):
        status, headers, body = ask(hub, CONFIG_PATH)
        assert (status, headers["Content-Type"], body) == (200, "text/html", HTML_PAGE)
        assert headers["ETag"] is None
        assert len(hub.transfers) == before
        assert ask(hub, CONFIG_PATH).body == CONFIG


def test_redirects_can_lead_in_circles(hub: LoopbackHub) -> None:
    with (
        hub.fault(Fault(redirect_loop=True)),
        pytest.raises(urllib.error.HTTPError, match="infinite loop"),
    ):
        urllib.request.urlopen(hub.url + CONFIG_PATH)
    with hub.fault(Fault(redirect_loop=True, times=2)) as fault:
        assert urllib.request.urlopen(hub.url + CONFIG_PATH).read() == CONFIG
    assert hub.happened[fault] == 2


@pytest.mark.parametrize("path", [CONFIG_PATH, WEIGHTS_PATH])
def test_a_file_can_become_another(hub: LoopbackHub, path: str) -> None:
    old = ask(hub, path)
    etag, part = old.headers["ETag"], "bytes=2-"
    with hub.fault(Fault(content=b"new content", times=3)):
        head = ask(hub, path, "HEAD").headers
        assert head["ETag"] not in (None, etag)
        assert head["Content-Length"] == "11"
        assert ask(hub, path, Range=part).body == b"w content"
        assert ask(hub, path, Range=part, If_Range=etag)[::2] == (200, b"new content")
        assert ask(hub, path, Range=part, If_Range=etag)[::2] == (206, old.body[2:])


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_can_be_gated(
    client: Client, hub: LoopbackHub, status: int, tmp_path: Path
) -> None:
    with hub.fault(gated("ada/tiny", status)):
        with pytest.raises(GatedRepoError, match=str(status)):
            client("hf_hub_download", "ada/tiny", "config.json", cache_dir=tmp_path)
        assert "config.json" in client("list_repo_files", "ada/tiny")
        assert ask(hub, "/datasets/ada/corpus/resolve/main/data/train%200.parquet").body == SHARD
    assert client("hf_hub_download", "ada/tiny", "config.json", cache_dir=tmp_path)


@pytest.mark.skipif(CLIENT < (2, 1), reason="older clients give up at once")
def test_the_client_tries_again_after_a_failing_answer(client: Client, hub: LoopbackHub) -> None:
    with hub.fault(Fault(path="/tree/", status=503, times=1)) as fault:
        assert len(client("list_repo_tree", "ada/tiny")) == 3
    assert hub.happened[fault] == 1


@pytest.mark.skipif(CLIENT < (1, 20), reason="older clients give up at once")
def test_the_client_heals_a_cut_from_the_start_of_a_small_file(
    client: Client, hub: LoopbackHub, tmp_path: Path
) -> None:
    before = len(hub.transfers)
    with hub.fault(Fault(path="model", cut_after=400_000, times=1)):
        file = client("hf_hub_download", "ada/tiny", "model.safetensors", cache_dir=tmp_path)
    assert Path(file).read_bytes() == WEIGHTS
    parts = [(transfer.first, transfer.sent) for transfer in hub.transfers[before:]]
    assert parts == [(0, 400_000), (0, len(WEIGHTS))]


def test_the_client_takes_a_flipped_byte_as_it_comes(
    client: Client, hub: LoopbackHub, tmp_path: Path
) -> None:
    with hub.fault(Fault(path="model", corrupt=True)):
        file = client("hf_hub_download", "ada/tiny", "model.safetensors", cache_dir=tmp_path)
    assert Path(file).read_bytes() != WEIGHTS


LAYOUTS = {
    "HuggingFaceFW/fineweb": hub_datasets.fineweb,
    "HuggingFaceTB/smoltalk": hub_datasets.smoltalk,
    "HuggingFaceH4/ultrafeedback_binarized": hub_datasets.ultrafeedback,
    "org/own-texts": hub_datasets.own_texts,
}


@pytest.fixture(scope="module")
def data_sets(hub: LoopbackHub) -> dict[str, DataSet]:
    return {name: lay_out(hub.root) for name, lay_out in LAYOUTS.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_downloads_with_the_rows_it_was_laid_out_with(
    client: Client, data_sets: dict[str, DataSet], name: str
) -> None:
    data = data_sets[name]
    assert data.repo_id == name
    snapshot = Path(client("snapshot_download", name, repo_type="dataset", max_workers=2))
    assert read_tree(snapshot) == read_tree(data.folder)
    files = {path for path in read_tree(snapshot) if path.endswith((".jsonl", ".parquet"))}
    assert files == set(data.files)
    for path, rows in data.files.items():
        assert rows
        assert read_rows(snapshot / path) == rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_is_the_same_each_time(
    data_sets: dict[str, DataSet], name: str, tmp_path: Path
) -> None:
    again = LAYOUTS[name](tmp_path)
    assert again.files == data_sets[name].files
    assert read_tree(again.folder) == read_tree(data_sets[name].folder)


def test_a_folder_of_a_data_set_is_listed_alike_by_branch_and_by_commit(
    client: Client, data_sets: dict[str, DataSet]
) -> None:
    data, folder = data_sets["HuggingFaceFW/fineweb"], "sample/10BT"
    contents = read_tree(data.folder)
    info = client("dataset_info", data.repo_id, files_metadata=True)
    for revision in ("main", info.sha):
        repo = {"repo_type": "dataset", "revision": revision}
        files = client("list_repo_tree", data.repo_id, folder, recursive=True, **repo)
        assert [file.path for file in files] == [
            path for path in sorted(contents) if path.startswith(f"{folder}/")
        ]
        for file in files:
            assert file.size == file.lfs.size == len(contents[file.path])
            assert file.lfs.sha256 == hashlib.sha256(contents[file.path]).hexdigest()
        pinned = client("dataset_info", data.repo_id, revision=revision, files_metadata=True)
        assert pinned == info
        readme = client("hf_hub_download", data.repo_id, filename="README.md", **repo)
        assert Path(readme).read_bytes() == contents["README.md"]
    assert {file.rfilename: file.size for file in info.siblings} == {
        path: len(content) for path, content in contents.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_card_names_the_files_of_each_config(
    client: Client, data_sets: dict[str, DataSet], name: str
) -> None:
    data = data_sets[name]
    configs = (client("metadata_load", data.folder / "README.md") or {}).get("configs", [])
    patterns = {
        (config["config_name"], file["split"]): file["path"]
        for config in configs
        for file in config["data_files"]
    }
    assert all(data.rows(pattern) for pattern in patterns.values())
    expected = {
        "HuggingFaceFW/fineweb": {
            ("default", "train"): "data/*/*",
            ("sample-10BT", "train"): "sample/10BT/*",
            ("CC-MAIN-2013-20", "train"): "data/CC-MAIN-2013-20/*",
        },
        "HuggingFaceTB/smoltalk": {("all", "test"): "data/all/test-*"},
        "HuggingFaceH4/ultrafeedback_binarized": {("default", "train_prefs"): "data/train_prefs-*"},
        "org/own-texts": {},
    }
    assert patterns.items() >= expected[name].items()
    assert len(patterns) == {"fineweb": 6, "smoltalk": 28, "own-texts": 0}.get(data.folder.name, 6)


def test_fineweb_has_as_many_documents_as_wanted_in_several_files_and_row_groups(
    tmp_path: Path,
) -> None:
    data = hub_datasets.fineweb(tmp_path, documents=20, row_group_size=2)
    texts = [row["text"] for row in data.rows("sample/10BT/*")]
    assert len(texts) == len(set(texts)) == 20
    paths = [path for path in data.files if fnmatchcase(path, "sample/10BT/*")]
    assert paths == [f"sample/10BT/00{number}_00000.parquet" for number in range(3)]
    for path in paths:
        metadata = pyarrow.parquet.read_metadata(data.folder / path)
        assert metadata.num_row_groups >= 3
        assert metadata.schema.names == (
            "text id dump url date file_path language language_score token_count".split()
        )
    assert all(any(oddity in text for text in texts) for oddity in hub_datasets.ODDITIES)


def test_smoltalk_has_in_all_what_its_parts_have(data_sets: dict[str, DataSet]) -> None:
    data = data_sets["HuggingFaceTB/smoltalk"]
    everything = data.rows("data/all/train-*")
    for part in hub_datasets.SMOLTALK_PARTS:
        talks = [row["messages"] for row in data.rows(f"data/{part}/train-*")]
        assert [row["messages"] for row in everything if row["source"] == part] == talks
    roles = {message["role"] for row in everything for message in row["messages"]}
    assert roles == {"system", "user", "assistant", "tool"}
    schema = pyarrow.parquet.read_schema(data.folder / "data/all/test-00000-of-00001.parquet")
    assert schema.names == ["messages", "source"]
    assert [field.name for field in schema.field("messages").type.value_type] == [
        "content",
        "role",
    ]


def test_ultrafeedback_has_six_splits_of_pairs_that_differ(data_sets: dict[str, DataSet]) -> None:
    data = data_sets["HuggingFaceH4/ultrafeedback_binarized"]
    assert set(data.files) == {
        f"data/{split}_{purpose}-00000-of-00001.parquet"
        for split in ("train", "test")
        for purpose in ("prefs", "sft", "gen")
    }
    assert data.rows("data/train_prefs-*") == data.rows("data/train_sft-*")
    for row in data.rows("data/*"):
        assert row["chosen"][0] == row["rejected"][0] == row["messages"][0]
        assert row["chosen"][1] != row["rejected"][1]
        assert list(row) == (
            "prompt prompt_id chosen rejected messages score_chosen score_rejected".split()
        )


def test_own_texts_lie_in_git_and_in_large_file_storage(
    client: Client, data_sets: dict[str, DataSet]
) -> None:
    repo = {"repo_type": "dataset", "recursive": True}
    files = client("list_repo_tree", data_sets["org/own-texts"].repo_id, **repo)
    stored = {file.path: bool(file.lfs) for file in files if hasattr(file, "lfs")}
    assert stored.pop("texts.jsonl") is False
    assert stored.pop("more/texts.parquet") is True
    assert not any(stored.values())
