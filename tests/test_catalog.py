"""Data sets of the Hub, through its real client: every subset, every fault, every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hub_datasets
import pytest
from hub_faults import Fault, gated
from loopback_hub import LoopbackHub

from nope_gpt.data.shards import Dataset
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

Nope = Callable[..., subprocess.CompletedProcess[str]]

PATIENT = """
import sys
from nope_gpt.data import downloads
downloads.FIRST_PAUSE = 0.01
downloads.TIMEOUT = float(sys.argv.pop(1))
from nope_gpt.cli import main
main()
"""
"""The real command line, which waits less between two attempts."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as served:
        yield served


@pytest.fixture
def prepare(tmp_path: Path, hub: LoopbackHub) -> Nope:
    """Run `nope prepare` against the loopback hub."""

    def run(
        *arguments: object, timeout: float = 20.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = ["prepare", *map(str, arguments)]
        if not any(word.startswith("--token-encoding") for word in words):
            words.append("--token-encoding=bytes")
        return subprocess.run(
            [sys.executable, "-c", PATIENT, str(timeout), *words],
            cwd=tmp_path,
            env=os.environ | hub.environment(tmp_path / "hf") | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def texts(path: Path) -> list[str]:
    """The documents of a data set of text in bytes, sorted."""
    dataset, tokenizer = Dataset.open(path), BaseTokenizer.load(path)
    found: list[str] = []
    for shard in dataset.shards:
        for index in range(shard.num_documents):
            found.append(tokenizer.decode_tokens(shard.document(index).tokens[:-1].tolist()))
    return sorted(found)


def chats(path: Path) -> list[str]:
    """The conversations of a data set in bytes, as the template writes them, sorted."""
    dataset, tokenizer = Dataset.open(path), ChatTokenizer.load(path)
    return sorted(
        tokenizer.decode_tokens(shard.document(index).tokens.tolist())
        for shard in dataset.shards
        for index in range(shard.num_documents)
    )


def templated(rows: list[dict[str, Any]], key: str = "messages") -> list[str]:
    """What the template makes of conversations, written out."""
    return sorted(
        "".join(f"<|im_start|>{m['role']}\n{m['content']}\n<|im_end|>\n" for m in row[key])
        for row in rows
    )


@pytest.mark.parametrize(
    ("subset", "pattern", "name"),
    [
        (None, "sample/10BT/*", "fineweb-sample-10BT-bytes"),
        ("sample-100BT", "sample/100BT/*", "fineweb-sample-100BT-bytes"),
        ("sample-350BT", "sample/350BT/*", "fineweb-sample-350BT-bytes"),
        ("none", "data/*/*", "fineweb-bytes"),
        ("None", "data/*/*", "fineweb-bytes"),
    ],
)
def test_every_subset_of_fineweb(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope, subset: str | None, pattern: str, name: str
) -> None:
    laid_out = hub_datasets.fineweb(hub.root)
    done = prepare("fineweb", *([f"--dataset-subset={subset}"] if subset else []))
    assert done.returncode == 0, done.stderr
    path = tmp_path / "datasets" / name
    assert done.stdout == f"datasets/{name}\n"
    assert texts(path) == sorted(row["text"] for row in laid_out.rows(pattern))
    (source,) = Dataset.open(path).manifest["recipe"]["sources"]
    assert source["repo"] == "HuggingFaceFW/fineweb"
    assert len(source["revision"]) == 40
    assert ("15 trillion tokens" in done.stderr) == (str(subset).lower() == "none" and bool(subset))
    assert [found.name for found in (tmp_path / "datasets").iterdir()] == [name], "all is cleared"


def test_a_prepared_fineweb_trains_with_no_path_given(
    hub: LoopbackHub, prepare: Nope, nope: Nope
) -> None:
    hub_datasets.fineweb(hub.root, documents=200)
    assert prepare("fineweb", "--token-encoding=bytes", "--name=fineweb-sample-10BT-r50k_base")
    done = nope("pretrain", "--preset=tiny", "--max-steps=2", "--num-eval-samples=3")
    assert done.returncode == 0, done.stderr


def test_a_dump_of_fineweb_is_a_subset(tmp_path: Path, hub: LoopbackHub, prepare: Nope) -> None:
    laid_out = hub_datasets.fineweb(hub.root)
    dump = next(path for path in laid_out.files if path.startswith("data/")).split("/")[1]
    done = prepare("fineweb", f"--dataset-subset={dump}")
    assert done.returncode == 0, done.stderr
    found = texts(tmp_path / "datasets" / f"fineweb-{dump}-bytes")
    assert found == sorted(row["text"] for row in laid_out.rows(f"data/{dump}/*"))


def test_smoltalk_is_all_of_it_or_the_named_parts(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    laid_out = hub_datasets.smoltalk(hub.root)
    done = prepare("smoltalk")
    assert done.returncode == 0, done.stderr
    found = chats(tmp_path / "datasets" / "smoltalk-bytes")
    usable = [r for r in laid_out.rows("data/all/train-*") if has_answer(r["messages"])]
    assert found == templated(usable)
    names = ["smol-summarize", "longalign", "apigen-80k"]
    done = prepare("smoltalk", f"--dataset-subset={','.join(names)}", "--name=parts")
    assert done.returncode == 0, done.stderr
    dataset = Dataset.open(tmp_path / "datasets" / "parts")
    assert [shard.source for shard in dataset.shards] == names
    rows = [row for name in names for row in laid_out.rows(f"data/{name}/train-*")]
    assert chats(dataset.path) == templated([r for r in rows if has_answer(r["messages"])])


def has_answer(messages: list[dict[str, str]]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def test_every_part_of_smoltalk_can_be_named(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    laid_out = hub_datasets.smoltalk(hub.root)
    names = sorted({path.split("/")[1] for path in laid_out.files if path.startswith("data/")})
    assert len(names) == 14
    done = prepare("smoltalk", f"--dataset-subset={','.join(names)}")
    assert done.returncode == 0, done.stderr
    dataset = Dataset.open(tmp_path / "datasets" / "smoltalk-bytes")
    assert [source["name"] for source in dataset.manifest["recipe"]["sources"]] == names


def test_shares_of_subsets_are_exact_and_the_same_every_time(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    laid_out = hub_datasets.smoltalk(hub.root, conversations=40)
    subset = "smol-summarize:0.5,longalign@7,smol-rewrite:0.9@11"
    found = []
    for name in ("one", "two"):
        done = prepare("smoltalk", f"--dataset-subset={subset}", f"--name={name}")
        assert done.returncode == 0, done.stderr
        dataset = Dataset.open(tmp_path / "datasets" / name)
        taken = {s.source: s.num_documents for s in dataset.shards}
        rows = len(laid_out.rows("data/smol-summarize/train-*"))
        refused = sum(e["count"] for e in dataset.manifest["statistics"]["refused"].values())
        assert sum(taken.values()) + refused == round(rows * 0.5) + 7 + 11
        found.append(dataset.fingerprint)
    assert found[0] == found[1]


def test_ultrafeedback_is_conversations_and_pairs(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    laid_out = hub_datasets.ultrafeedback(hub.root)
    done = prepare("ultrafeedback")
    assert done.returncode == 0, done.stderr
    root = tmp_path / "datasets"
    assert done.stdout.split() == [
        "datasets/ultrafeedback-bytes",
        "datasets/ultrafeedback-preference-bytes",
    ]
    sft = laid_out.rows("data/train_sft-*")
    assert chats(root / "ultrafeedback-bytes") == templated(sft)
    pairs = Dataset.open(root / "ultrafeedback-preference-bytes")
    tokenizer = ChatTokenizer.load(pairs.path)
    found = sorted(
        tuple(tokenizer.decode_tokens(side.document(index).tokens.tolist()) for side in sides)
        for sides in pairs.sides
        for index in range(sides[0].num_documents)
    )
    prefs = laid_out.rows("data/train_prefs-*")
    expected = [(templated([row], "chosen")[0], templated([row], "rejected")[0]) for row in prefs]
    assert found == sorted(expected)
    requested = {transfer.path for transfer in hub.transfers}
    assert not any("test_" in path or "_gen-" in path for path in requested), "two of six splits"


def test_any_other_data_set_is_read_by_its_columns(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    laid_out = hub_datasets.own_texts(hub.root)
    done = prepare("org/own-texts", "--text-column=body")
    assert done.returncode == 0, done.stderr
    expected = sorted(row["body"] for path in laid_out.files for row in laid_out.rows(path))
    assert texts(tmp_path / "datasets" / "own-texts-bytes") == expected
    refused = prepare("org/own-texts", "--name=other")
    assert refused.returncode == 2
    assert "there is neither `messages` nor 'text'; there are" in refused.stderr
    assert "body" in refused.stderr
    assert "--text-column" in refused.stderr


FAULTS = {
    "reset": Fault(path=r"\.parquet", cut_after=5_000, reset=True, times=4),
    "orderly close": Fault(path=r"\.parquet", cut_after=5_000, times=4),
    "500": Fault(path=r"\.parquet", status=500, times=3),
    "503 with a wish": Fault(path=r"\.parquet", status=503, times=2, retry_after=0),
    "429": Fault(path=r"\.parquet", status=429, times=2, retry_after=1),
    "range ignored": Fault(path=r"\.parquet", ignore_range=True),
    "flipped byte": Fault(path=r"\.parquet", corrupt=True, times=2),
    "longer length": Fault(path=r"\.parquet", length_error=7, times=2),
    "shorter length": Fault(path=r"\.parquet", length_error=-7, times=2),
    "416": Fault(path=r"\.parquet", method="GET", status=416, times=1),
    "HTML": Fault(path=r"\.parquet", html=True, times=2),
    "other content": Fault(path=r"\.parquet", content=b"PAR1 something else PAR1", times=1),
    "slow": Fault(path=r"\.parquet", latency=0.2, bytes_per_second=200_000),
}


@pytest.fixture
def expected(tmp_path: Path, hub: LoopbackHub, prepare: Nope) -> tuple[list[str], str]:
    """The texts of a prepared FineWeb, and its fingerprint."""
    hub_datasets.fineweb(hub.root, documents=60)
    done = prepare("fineweb", "--name=calm")
    assert done.returncode == 0, done.stderr
    calm = tmp_path / "datasets" / "calm"
    return texts(calm), Dataset.open(calm).fingerprint


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_changes_nothing(
    tmp_path: Path,
    hub: LoopbackHub,
    prepare: Nope,
    expected: tuple[list[str], str],
    name: str,
) -> None:
    with ExitStack() as faults:
        if name == "range ignored":
            faults.enter_context(hub.fault(Fault(path=r"\.parquet", cut_after=3_000, times=3)))
        fault = faults.enter_context(hub.fault(FAULTS[name]))
        done = prepare("fineweb", "--name=faulty")
    assert done.returncode == 0, done.stderr
    assert hub.happened[fault] > 0
    assert Dataset.open(tmp_path / "datasets" / "faulty").fingerprint == expected[1]
    if name in ("500", "429", "flipped byte", "HTML"):
        assert "trying again in" in done.stderr


def test_a_stall_is_given_up_and_resumed(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope, expected: tuple[list[str], str]
) -> None:
    stall = Fault(path=r"\.parquet", stall_after=4_000, stall_for=60, times=2)
    with hub.fault(stall) as fault:
        done = prepare("fineweb", "--name=faulty", timeout=0.5)
    assert done.returncode == 0, done.stderr
    assert hub.happened[fault] == 2
    assert Dataset.open(tmp_path / "datasets" / "faulty").fingerprint == expected[1]


def test_a_download_goes_on_in_another_process_where_it_stopped(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    hub_datasets.fineweb(hub.root, documents=1_500)
    calm = prepare("fineweb", "--name=calm")
    assert calm.returncode == 0, calm.stderr
    hub.transfers.clear()
    with (
        hub.fault(Fault(path=r"\.parquet", cut_after=100_000, times=1)),
        hub.fault(Fault(path=r"\.parquet", offline=True)),
    ):
        broken = prepare("fineweb", "--name=faulty")
    assert broken.returncode == 5, broken.stderr
    assert "try again when the network is back; 0 of 3 files are encoded" in broken.stderr
    assert "and the same command goes on" in broken.stderr
    parts = list((tmp_path / "datasets" / "faulty.partial" / "downloads").glob("*.part"))
    have = max(part.stat().st_size for part in parts)
    assert have > 50_000
    hub.transfers.clear()
    done = prepare("fineweb", "--name=faulty")
    assert done.returncode == 0, done.stderr
    assert have in {transfer.first for transfer in hub.transfers}
    one, two = (Dataset.open(tmp_path / "datasets" / name) for name in ("calm", "faulty"))
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(path=r"\.parquet", corrupt=True), "its bytes are not those that the Hub lists"),
        (Fault(path=r"\.parquet", status=500), "the Hub answered 500"),
        (Fault(path=r"\.parquet", offline=True), "the connection broke"),
        (Fault(path=r"\.parquet", html=True), "another length than the file"),
        (Fault(path=r"\.parquet", redirect_loop=True), "the connection broke"),
        (Fault(path=r"/api/datasets", offline=True), "the Hub cannot be reached"),
        (Fault(path=r"/api/datasets", status=500), "the Hub cannot be reached"),
    ],
    ids=["flipped byte", "500", "offline", "HTML", "redirect loop", "no listing", "broken listing"],
)
def test_a_lasting_fault_is_an_error_of_the_network(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope, fault: Fault, message: str
) -> None:
    hub_datasets.fineweb(hub.root)
    with hub.fault(fault):
        done = prepare("fineweb")
    assert done.returncode == 5, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "datasets" / "fineweb-sample-10BT-bytes").exists()
    again = prepare("fineweb")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_hub_forbids_is_no_network_that_is_gone(
    hub: LoopbackHub, prepare: Nope, status: int
) -> None:
    hub_datasets.fineweb(hub.root)
    with hub.fault(Fault(path=r"/api/datasets", status=status)):
        done = prepare("fineweb")
    assert done.returncode == 3, done.stderr
    assert f"the Hub does not let you read this data set ({status})" in done.stderr
    assert "hf auth login" in done.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_data_set_asks_to_log_in(hub: LoopbackHub, prepare: Nope, status: int) -> None:
    hub_datasets.fineweb(hub.root)
    with hub.fault(gated("HuggingFaceFW/fineweb", status=status)):
        done = prepare("fineweb")
    assert done.returncode == 3, done.stderr
    assert "asks you to accept its terms" in done.stderr
    assert "hf auth login" in done.stderr


def test_without_a_network_an_unfinished_preparation_still_goes_on(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    hub_datasets.fineweb(hub.root, documents=60)
    kept = f"--download-path={tmp_path / 'kept'}"
    assert prepare("fineweb", kept, "--shard=0/2").returncode == 0
    assert prepare("fineweb", kept, "--name=all").returncode == 0
    with hub.fault(Fault(offline=True)):
        done = prepare("fineweb", kept)
        again = prepare("fineweb", kept)
    assert done.returncode == 0, done.stderr
    assert "already prepared" in again.stderr
    assert len(list((tmp_path / "kept").glob("*.parquet"))) == 3


def test_a_newer_revision_is_not_mixed_in(tmp_path: Path, hub: LoopbackHub, prepare: Nope) -> None:
    laid_out = hub_datasets.own_texts(hub.root)
    assert prepare("org/own-texts", "--text-column=body").returncode == 0
    (laid_out.folder / "texts.jsonl").write_text('{"body": "newer"}\n')
    done = prepare("org/own-texts", "--text-column=body")
    assert "already prepared, of the same" in done.stderr, done.stderr
    fresh = prepare("org/own-texts", "--text-column=body", "--overwrite")
    assert fresh.returncode == 0, fresh.stderr
    assert "newer" in texts(tmp_path / "datasets" / "own-texts-bytes")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fineweb", "--dataset-subset=sample-1T"], 3, "there are none, sample-100BT"),
        (["smoltalk", "--dataset-subset=smol-talk"], 3, "there are all, apigen-80k"),
        (["smoltalk", "--dataset-subset=all:2"], 2, "no share of it"),
        (["smoltalk", "--dataset-subset=all,all"], 2, "is named twice"),
        (["org/nothing"], 3, "no such data set on the Hub"),
        (["fineweb", "--dataset-revision=v9"], 3, "no such revision"),
        (["../../etc/passwd"], 3, "no such file or directory"),
        (["/etc/../nothing.txt"], 3, "no such file or directory"),
        (["org/..", "--name=x"], 3, "no such file or directory"),
        (["python-docs", "--dataset-subset=all"], 2, "chooses among the subsets"),
        (["fineweb", "--name=../x"], 2, "must be a plain name"),
        (["fineweb", "--dataset-split=test"], 3, "has no split 'test'; it has train"),
        (["org/own-texts", "--dataset-split=test"], 3, "has no split 'test'; it has train"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_valid_names(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope, arguments: list[str], code: int, message: str
) -> None:
    hub_datasets.fineweb(hub.root)
    hub_datasets.smoltalk(hub.root)
    hub_datasets.own_texts(hub.root)
    done = prepare(*arguments)
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not any((tmp_path / "datasets").glob("*")), "nothing is left"


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    laid_out = hub_datasets.fineweb(hub.root)
    done = prepare("fineweb", "--dry-run")
    assert done.returncode == 0, done.stderr
    size = sum(
        (laid_out.folder / path).stat().st_size
        for path in laid_out.files
        if path.startswith("sample/10BT")
    )
    assert f"download   {size / 1000:.1f} KB" in done.stdout
    assert "disk" in done.stdout
    assert not hub.transfers
    assert not (tmp_path / "datasets").exists()


def described(hub: LoopbackHub, configs: str, files: dict[str, str]) -> None:
    """Lay out org/described, with a README that says something of files of one line each."""
    folder = hub.root / "datasets" / "org" / "described"
    hub_datasets.write_text(folder / "README.md", f"---\n{configs}\n---\n")
    for path, text in files.items():
        hub_datasets.write_text(folder / path, json.dumps({"text": text}) + "\n")


FILES = {f"{folder}/{split}-0.jsonl": f"{folder} {split}" for folder in ("a", "b", "c")
         for split in ("train", "test")}  # fmt: skip


@pytest.mark.parametrize(
    ("configs", "options", "expected"),
    [
        ("configs: [{config_name: x, data_files: './a/*'}]", "", "a test,a train"),
        ("configs: [{config_name: x, data_files: ['{a,b}/train-*']}]", "", "a train,b train"),
        ("configs: [{config_name: x, data_dir: b}]", "", "b train"),
        ("configs: [{config_name: x, data_dir: c, data_files: 'test-*'}]", "", "c test"),
        (
            "configs: [{config_name: x, data_files: [{split: train, path: a/train-*},"
            "{split: held, path: [a/test-*, c/test-*]}]}]",
            "--dataset-split=held",
            "a test,c test",
        ),
        ("license: mit", "--dataset-split=test", "a test,b test,c test"),
        ("license: mit", "", "a train,b train,c train"),
    ],
)
def test_a_readme_says_which_files_are_a_split(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope, configs: str, options: str, expected: str
) -> None:
    described(hub, configs, FILES)
    done = prepare("org/described", "--name=made", *options.split())
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "datasets" / "made") == expected.split(",")


@pytest.mark.parametrize(
    ("configs", "code", "message"),
    [
        ("configs: 5", 1, "the configs of its README are not understood"),
        ("configs: [{config_name: x}]", 1, "'x' names no files"),
        ("configs: [a, b]", 1, "the configs of its README are not understood"),
        ("configs: [", 1, "the configs of its README are not understood"),
        ("configs: [{config_name: x, data_files: [{split: a, path: a/*},{split: b, path: b/*}]}]",
         3, "the subset 'x' has no split 'train'; it has a, b"),
    ],
)  # fmt: skip
def test_a_readme_that_is_not_understood_is_not_passed_over(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope, configs: str, code: int, message: str
) -> None:
    described(hub, configs, FILES)
    done = prepare("org/described")
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not any((tmp_path / "datasets").glob("*"))


def test_files_of_several_contents_in_one_data_set_are_all_prepared(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    described(hub, "license: mit", {"a.jsonl": "some text", "empty.txt": ""})
    folder = hub.root / "datasets" / "org" / "described"
    messages = hub_datasets.spoken("Hello?", "Hi.")
    hub_datasets.write_text(folder / "b.jsonl", json.dumps({"messages": messages}) + "\n")
    (folder / "empty.txt").write_bytes(b"")
    done = prepare("org/described")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["datasets/described-bytes", "datasets/described-chat-bytes"]
    assert texts(tmp_path / "datasets" / "described-bytes") == ["some text"]
    assert chats(tmp_path / "datasets" / "described-chat-bytes") == templated(
        [{"messages": messages}]
    )


def test_two_processes_share_one_download(tmp_path: Path, hub: LoopbackHub, prepare: Nope) -> None:
    described(hub, "license: mit", {"a.jsonl": "some text " * 20_000})
    size = (hub.root / "datasets" / "org" / "described" / "a.jsonl").stat().st_size
    with (
        hub.fault(Fault(path=r"\.jsonl", method="GET", bytes_per_second=size // 2)),
        ThreadPoolExecutor() as together,
    ):
        kept = "--download-path=kept"
        runs = [together.submit(prepare, "org/described", kept, f"--name={n}") for n in "xy"]
        done = [run.result() for run in runs]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert texts(tmp_path / "datasets" / "x") == texts(tmp_path / "datasets" / "y")
    served = [transfer for transfer in hub.transfers if transfer.path.endswith(".jsonl")]
    assert sum(transfer.sent for transfer in served) < 1.5 * size
    assert sum("another process fetches it" in each.stderr for each in done) == 1


def test_a_share_is_the_same_in_parts_and_in_one(
    tmp_path: Path, hub: LoopbackHub, prepare: Nope
) -> None:
    hub_datasets.smoltalk(hub.root, conversations=40)
    chosen = "--dataset-subset=all:0.5@100,smol-magpie-ultra:0.3"
    assert prepare("smoltalk", chosen, "--name=one").returncode == 0
    with ThreadPoolExecutor() as together:
        parts = ("smoltalk", chosen, "--name=parts")
        runs = [together.submit(prepare, *parts, f"--shard={index}/2") for index in range(2)]
        done = [run.result() for run in runs]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert prepare(*parts, "--merge").returncode == 0
    one, joined = (Dataset.open(tmp_path / "datasets" / name) for name in ("one", "parts"))
    assert one.fingerprint == joined.fingerprint
    assert one.manifest["statistics"]["documents"] == 100 + 12
