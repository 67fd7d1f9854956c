"""What users get wrong: each mistake is named, placed, followed by what to type, and undone."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reference import write_published
from small import RECIPE, small_run

from nope_gpt.cli import main
from nope_gpt.config import PrepareConfig, PretrainConfig
from nope_gpt.data.prepare import prepare
from nope_gpt.training.pretraining import pretrain

Call = Callable[..., "subprocess.CompletedProcess[str]"]

WORDS = "the list holds a value and the function sets its name if an error was raised in it "
QUESTION = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "A list."}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, runs and models, whole ones and broken ones."""
    root = tmp_path_factory.mktemp("workshop")
    with contextlib.chdir(root):
        write_sources()
        for name, source, encoding in (
            ("text", "corpus", "bytes"),
            ("other", "corpus2", "bytes"),
            ("first", "corpus", "bpe:270"),
            ("second", "corpus2", "bpe:270"),
            ("short", "short.txt", "bytes"),
            ("chats", "chats.jsonl", "bytes"),
        ):
            prepare([source], PrepareConfig(name=name, token_encoding=encoding))
        pretrain(PretrainConfig(**RECIPE | {"dataset": "text", "max_steps": 2}), [])
        own = {"dataset": "first", "max_steps": 1, "run_name": "own"}
        pretrain(PretrainConfig(**RECIPE | own), [])
        write_broken()
    return root


def write_sources() -> None:
    for name in ("corpus", "corpus2"):
        Path(name).mkdir()
        for number in range(9):
            text = WORDS * (number + 2) if name == "corpus" else WORDS[::-1] * (number + 2)
            Path(name, f"{number}.txt").write_text(text)
    chats = [json.dumps({"messages": [QUESTION, ANSWER], "id": n}) for n in range(4)]
    Path("chats.jsonl").write_text("\n".join(chats))
    Path("asked.jsonl").write_text(json.dumps({"messages": [QUESTION]}))
    Path("torn.jsonl").write_text(chats[0] + '\n{"messages": [')
    Path("roles.jsonl").write_text(json.dumps({"messages": [{"role": "boss", "content": "x"}]}))
    Path("keys.jsonl").write_text(json.dumps({"body": "x"}))
    Path("torn.parquet").write_bytes(b"PAR1")
    Path("short.txt").write_text("ab")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("picture.png").write_bytes(b"")
    Path("plain").mkdir()
    Path("file").write_text("")
    settings = {name: value for name, value in RECIPE.items() if name != "seed"}
    tiny = (f"{name} = {json.dumps(value)}" for name, value in settings.items())
    Path("tiny.toml").write_text("\n".join(tiny))
    Path("torn.toml").write_text("batch_size = ")
    Path("list.json").write_text("[1]")


def write_broken() -> None:
    shutil.copytree("datasets/text", "cut")
    cut(next(Path("cut").glob("shard-*.tokens.npy")), 10)
    shutil.copytree("runs/pretrain/checkpoints/step-2", "spoiled")
    spoil(Path("spoiled/model.safetensors"))
    shutil.copytree("runs/pretrain", "runs/spoiled")
    for weights in Path("runs/spoiled").rglob("model.safetensors"):
        spoil(weights)
    for name in ("pickled", "truncated", "torn-config", "other-shape"):
        write_published(Path(name), vocabulary_size=257, tokenizer="bytes")
    Path("pickled/model.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))
    cut(Path("truncated/model.safetensors"), 100)
    Path("torn-config/config.json").write_text("{")
    config = json.loads(Path("other-shape/config.json").read_text())
    Path("other-shape/config.json").write_text(json.dumps(config | {"hidden_ratio": 4}))
    Path("old").mkdir()
    Path("old/checkpoint.pt").write_bytes(b"")
    Path("old.pt").write_bytes(b"")
    Path("exports/done").mkdir(parents=True)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in this process; anything but an orderly exit fails the test."""

    def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit:
            main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(exit.value.code or 0), out, err)

    return run


def contents(root: Path) -> dict[Path, tuple[int, int] | None]:
    """Every path below a directory, and for a file its size and when it was written; for a lock,
    which some versions of filelock write to whenever it is taken, as if that were never.
    """
    return {
        path: (path.stat().st_size, 0 if path.suffix == ".lock" else path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


TRANSCRIPTS = """
$ nope prepare none.txt  [3]
error: there is no such file or directory
  where: none.txt
  next:  give text, .jsonl or .parquet files, directories of them, `-` for standard input, `python-…

$ nope prepare :smile:[red].txt  [3]
error: there is no such file or directory
  where: :smile:[red].txt
  next:  give text, .jsonl or .parquet files, …

$ nope prepare plain  [3]
error: no .txt, .md, .jsonl, .parquet file is in this directory
  where: plain

$ nope prepare picture.png  [2]
error: files that end in '.png' cannot be read
  where: picture.png
  next:  give .txt, .md, .jsonl, .parquet, or pipe text in: `nope prepare - < picture.png`

$ nope prepare empty.txt --token-encoding bytes  [1]
error: the corpus is empty
  where: empty
  next:  give files that hold text, or conversations with an answer

$ nope prepare latin.txt --token-encoding bytes  [1]
error: byte 3 is not UTF-8 (…
  where: latin.txt
  next:  convert the file first, for example: iconv -f latin1 -t utf-8 OLD > NEW

$ nope prepare torn.jsonl --token-encoding bytes  [1]
error: this line is not JSON: …
  where: torn.jsonl:2

$ nope prepare roles.jsonl --token-encoding bytes  [1]
error: there is nothing to train on; refused: 1 with a role that is none of system, user, …
  where: roles
  next:  give files that hold text, or conversations with an answer

$ nope prepare keys.jsonl  [2]
error: there is neither `messages` nor 'text'; there are body
  where: keys.jsonl
  next:  choose the text with --text-column

$ nope prepare asked.jsonl --token-encoding bytes  [1]
error: there is nothing to train on; refused: 1 with no answer (first: asked.jsonl:1)
  where: asked
  next:  give files that hold text, or conversations with an answer

$ nope prepare torn.parquet  [1]
error: this is not a whole parquet file: …
  where: torn.parquet

$ nope prepare corpus --token-encoding klingon  [2]
error: unknown encoding 'klingon'
  next:  choose one of r50k_base, p50k_base, cl100k_base, o200k_base, bytes, or bpe:4096

$ nope prepare corpus --token-encoding bpe:9  [2]
error: a byte-pair vocabulary of 9 is out of range
  next:  choose a size from 257 to 1048576, such as bpe:4096

$ nope prepare corpus --token-encoding bpe:9999  [2]
error: the corpus has variety for … tokens, not for 9999
  next:  use --token-encoding bpe:…, or bytes, or a larger corpus

$ nope prepare corpus --name a/b --token-encoding bytes  [2]
error: --name is 'a/b', and must be a plain name
  next:  use letters, digits, dots, dashes and underscores

$ nope prepare corpus2 --name text --token-encoding bytes  [2]
error: this data set already exists, and it was made of corpus, not of corpus2
  where: datasets/text
  next:  train on it, choose another --name, or add --overwrite to replace it

$ nope prepare corpus --dataset-path file/x --token-encoding bytes  [1]
error: cannot write here: …
  where: file/x/corpus-bytes.partial
  next:  choose a directory that you may write to

$ nope pretrain --config tiny.toml --dataset-path plain  [3]
error: there is no data set of text
  where: plain
  next:  nope prepare python-docs, which needs no network, or nope prepare fineweb

$ nope pretrain --config tiny.toml --dataset none  [3]
error: there is no data set 'none'; there are chats, first, other, second, short, text
  where: datasets
  next:  nope prepare FILE, or choose one with --dataset

$ nope pretrain --config tiny.toml  [2]
error: there are several data sets: first, other, second, short, text
  where: datasets
  next:  choose one: --dataset first

$ nope pretrain --config tiny.toml --dataset chats  [2]
error: this data set holds conversations
  where: datasets/chats
  next:  `nope tune` uses it

$ nope pretrain --config tiny.toml --dataset-path cut  [1]
error: this dataset is damaged: shard-….tokens.npy has … bytes instead of …
  where: cut

$ nope pretrain --config tiny.toml --dataset-path file  [3]
error: there is no data set of text
  where: file
  next:  nope prepare python-docs, which needs no network, or nope prepare fineweb

$ nope pretrain --config tiny.toml --dataset short --run-name new  [1]
error: the data set has 3 tokens to train on, and a sample needs 17
  where: datasets/short
  next:  --tokens-per-sample 1, or prepare more text

$ nope pretrain --config tiny.toml --dataset text  [2]
error: this run already exists
  where: runs/pretrain
  next:  go on with it: nope pretrain --run-name pretrain --resume; or begin another: …

$ nope pretrain --dataset other --resume  [2]
error: the data set changed since the run began: it was …
  where: runs/pretrain
  next:  begin another run with --run-name

$ nope pretrain --dataset second --run-name own --resume  [2]
error: the tokenizer changed since the run began: fingerprint: it was …
  where: runs/own
  next:  begin another run with --run-name

$ nope pretrain --resume --dataset text --num-hidden-layers 3  [2]
error: the model changed since the run began: num_decoder_layers: it was 2, and is now 3
  where: runs/pretrain
  next:  begin another run with --run-name

$ nope pretrain --resume --dataset text --tokens-per-sample 8  [2]
error: the tokens per sample changed since the run began: it was 16, and is now 8
  where: runs/pretrain
  next:  begin another run with --run-name

$ nope pretrain --config tiny.toml --dataset text --run-name a/b  [2]
error: --run-name is 'a/b', and must be a plain name
  next:  use letters, digits, dots, dashes and underscores

$ nope pretrain --config tiny.toml --dataset text --run-dir-path file  [1]
error: this run's settings are damaged (…
  where: file/pretrain/run.json

$ nope pretrain --dataset text --run-name spoiled --resume  [3]
error: there is no valid checkpoint
  step-2: this checkpoint is damaged: model.safetensors is not what was written
  where: runs/spoiled/checkpoints
  next:  train first: nope pretrain, or choose another run

$ nope pretrain --config tiny.toml --dataset text --ddp-sharding-level 3 --run-name new  [2]
error: --ddp-sharding-level is 3, which needs more than one rank
  next:  nope pretrain --gpus 2, or leave the flag out

$ nope pretrain --config tiny.toml --dataset text --ddp-sharding-level 1  [2]
error: --ddp-sharding-level is 1, and must be one of 0, 2, 3
  where: the command line

$ nope pretrain --config tiny.toml --dataset text --tokens-per-step 7  [2]
error: --tokens-per-step is 7, which batches of …
  next:  --tokens-per-step …

$ nope pretrain --config tiny.toml --dataset text --device cuda --gpus 99  [2]
error: --gpus is 99, and this machine has …
  next:  …

$ nope pretrain --config tiny.toml --dataset text --gpus 77  [2]
error: --gradient-accumulation-steps is … ranks cannot share evenly
  next:  --gradient-accumulation-steps 77

$ nope pretrain --config tiny.toml --device tpu --dataset text  [2]
error: --device is 'tpu', which is no device
  next:  use auto, cpu, cuda, cuda:1 or mps

$ nope tune  [2]
error: there is no base model to tune
  next:  nope tune --model runs/pretrain, or --model andrewdalpino/NoPE-GPT-400M-Base

$ nope tune --model none  [3]
error: there is no such model
  where: none
  next:  give a run, checkpoint or export directory, or a Hub id such as …

$ nope tune --model datasets/text  [2]
error: this is a dataset, not a checkpoint
  where: datasets/text
  next:  see what it is: nope inspect datasets/text

$ nope tune --model runs/pretrain --dataset text  [2]
error: this data set holds text
  where: datasets/text
  next:  `nope pretrain` uses it

$ nope tune --model runs/own  [2]
error: the model's tokenizer is bpe-270, and the data set's is bytes
  where: runs/own/checkpoints/step-1 and datasets/chats
  next:  prepare the data again: nope prepare FILE --token-encoding runs/own/checkpoints/step-1

$ nope tune --model runs/pretrain --rank 17  [2]
error: --rank is 17, and the smallest matrix has rank 16

$ nope tune --model runs/pretrain --dataset-subset x  [3]
error: there is no subset 'x'; there are chats
  where: datasets/chats
  next:  choose with --dataset-subset, or take `all`

$ nope tune --model runs/pretrain --max-tokens-per-sample 9  [1]
error: no conversation can be trained on: 4 have no answer within 9 tokens or are …
  where: datasets/chats
  next:  raise --max-tokens-per-sample

$ nope tune --model runs/pretrain --compile on  [2]
error: --compile is on, and no two batches of conversations have the same length
  next:  leave it out: the blocks are not compiled while tuning

$ nope tune --model runs/pretrain --objective dpo  [2]
error: --objective dpo needs pairs of answers, and this data set has none
  where: datasets/chats
  next:  nope prepare ultrafeedback, or FILE with `chosen` and `rejected`

$ nope tune --model runs/pretrain --dataset-subset chats:2  [2]
error: ':2' behind a subset is no share of it
  next:  write NAME:0.5 for half of its rows, NAME@10000 for at most so many

$ nope generate x --model runs/pretrain --adapter runs/pretrain  [3]
error: there is no adapter
  where: runs/pretrain/checkpoints/step-2
  next:  give a run of `nope tune` without --full, or a checkpoint of one

$ nope tune --model runs/pretrain --run-name pretrain  [2]
error: this is a run of nope pretrain
  where: runs/pretrain
  next:  choose another --run-name

$ nope tune --model runs/pretrain --run-name pretrain --resume  [2]
error: this is a run of nope pretrain
  where: runs/pretrain
  next:  choose another --run-name

$ nope export  [2]
error: there is no model to export
  next:  nope export --model runs/tune

$ nope export --model gone.pt  [3]
error: there is no such file
  where: gone.pt

$ nope export --model old.pt  [1]
error: this checkpoint is damaged, or is none (EOFError)
  where: old.pt

$ nope export --model plain  [3]
error: this is not a model: it has neither config.json nor model.safetensors
  where: plain
  next:  give a run, checkpoint or export directory, or a Hub id

$ nope export --model runs/pretrain --output exports/done  [2]
error: this already exists
  where: exports/done
  next:  choose another name, or add --overwrite to replace it

$ nope export --model runs/pretrain --output file/x  [1]
error: cannot write here: …
  where: file/x
  next:  choose a directory that you may write to

$ nope generate hi  [2]
error: there is no model
  next:  nope generate --model runs/tune, or --model andrewdalpino/NoPE-GPT-400M-Chat

$ nope chat  [2]
error: there is no model
  next:  nope chat --model runs/tune, or --model andrewdalpino/NoPE-GPT-400M-Chat

$ nope generate hi --model none  [3]
error: there is no such model
  where: none
  next:  give a run, checkpoint or export directory, or a Hub id such as …

$ nope generate hi --model a/b  [5]
error: the Hub cannot be reached: …
  where: https://huggingface.co/a/b
  next:  try again with a network, or give a local directory

$ nope chat --model a/b  [5]
error: the Hub cannot be reached: …
  where: https://huggingface.co/a/b
  next:  try again with a network, or give a local directory

$ nope generate hi --model plain  [3]
error: this is not a model: it has neither config.json nor model.safetensors
  where: plain
  next:  give a run, checkpoint or export directory, or a Hub id

$ nope generate hi --model old  [2]
error: this holds a pickled checkpoint, checkpoint.pt, and no model.safetensors
  where: old
  next:  nope export --model old/checkpoint.pt --format hub --output exports/checkpoint

$ nope generate hi --model old.pt  [2]
error: this is a single file, and a model is a directory
  where: old.pt
  next:  …: nope export --model old.pt --format hub --output exports/old

$ nope chat --model old.pt  [2]
error: this is a single file, and a model is a directory
  where: old.pt
  next:  …: nope export --model old.pt --format hub --output exports/old

$ nope tune --model old.pt  [2]
error: this is a single file, and a model is a directory
  where: old.pt
  next:  …: nope export --model old.pt --format hub --output exports/old

$ nope generate hi --model gone.pt  [3]
error: there is no such file
  where: gone.pt

$ nope generate hi --model pickled  [1]
error: this is not a whole safetensors file: …
  where: pickled/model.safetensors
  next:  download or export the model again

$ nope chat --model truncated  [1]
error: this is not a whole safetensors file: …
  where: truncated/model.safetensors
  next:  download or export the model again

$ nope chat --model torn-config  [1]
error: config.json cannot be read: …
  where: torn-config/config.json

$ nope chat --model other-shape  [1]
error: decoder.layers.0.feed_forward.up.weight has shape (96, 48), and config.json asks for (192,…
  where: other-shape

$ nope generate hi --model spoiled  [1]
error: this checkpoint is damaged: model.safetensors is not what was written
  where: spoiled

$ nope generate hi --model runs/spoiled  [3]
error: there is no valid checkpoint
  step-2: this checkpoint is damaged: model.safetensors is not what was written
  where: runs/spoiled/checkpoints
  next:  train first: nope pretrain, or choose another run

$ nope generate hi --model datasets/text  [2]
error: this is a dataset, not a checkpoint
  where: datasets/text
  next:  see what it is: nope inspect datasets/text

$ nope generate --prompt-file none  [3]
error: there is no such file
  where: none

$ nope generate --prompt-file latin.txt  [1]
error: byte … is not UTF-8 (…)
  where: latin.txt
  next:  convert the file first, for example: iconv -f latin1 -t utf-8 OLD > NEW

$ nope pretrain --config none.toml  [3]
error: there is no such settings file
  where: none.toml

$ nope pretrain --config plain  [2]
error: the settings file cannot be read: …
  where: plain

$ nope pretrain --config torn.toml  [2]
error: the settings file cannot be parsed: …
  where: torn.toml
  next:  write one `name = value` a line (TOML), or pass the run.json of a run

$ nope pretrain --config list.json  [2]
error: the settings file is not a table of settings
  where: list.json

$ nope size --memory lots  [2]
error: 'lots' is not an amount of memory
  where: --memory
  next:  write a number above zero and a unit, such as --memory 24GB or --memory 24GiB

$ nope size --memory 1MB  [4]
error: the smallest shape, 3,413,632 parameters, needs 112.8 MB …
  where: --memory 1MB
  next:  train on a device with more memory
"""
"""What is typed, [the exit code], and all that follows; … stands for any text."""

MISTAKES = {
    block.partition("\n")[0].removeprefix("$ nope ").partition("  [")[0]: block
    for block in TRANSCRIPTS.strip().split("\n\n")
}


def refused(done: subprocess.CompletedProcess[str], line: str) -> None:
    """Compare an exit code and a message with the transcript of a line."""
    first, _, message = MISTAKES[line].partition("\n")
    pattern = re.escape(message).replace("…", ".*")
    assert re.search(rf"(?m)^{pattern}\n\Z", done.stderr.replace("\\", "/")), done.stderr
    assert first.endswith(f"  [{done.returncode}]")
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_named_and_placed_and_leaves_nothing_behind(
    line: str, call: Call, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop)
    before = contents(workshop)
    refused(call(*line.split()), line)
    assert contents(workshop) == before


@pytest.mark.parametrize("words", ["prepare - --token-encoding bytes", "generate --model x"])
def test_what_is_piped_in_must_be_utf_8(words: str, call: Call) -> None:
    done = call(*words.split(), stdin=b"caf\xe9")
    assert done.returncode == 1
    assert re.search("error: .*not UTF-8.*\n  where: standard input\n", done.stderr)


def test_a_gpu_that_is_not_there_is_named(call: Call, workshop: Path) -> None:
    model = workshop / "runs" / "pretrain"
    done = call("generate", "x", "--model", model, "--device", "cuda:99")
    assert done.returncode == 2
    assert "error: --device is cuda" in done.stderr


def test_the_same_command_works_once_its_mistake_is_mended(
    call: Call, workshop: Path, tmp_path: Path
) -> None:
    words = ["tune", "--model", workshop / "runs" / "pretrain", "--num-epochs=1", "--device=cpu"]
    words += ["--dataset-path", workshop / "datasets", "--run-dir-path", tmp_path / "runs"]
    assert call(*words, "--rank=17").returncode == 2
    assert call(*words, "--rank=2").returncode == 0


def test_a_resumed_run_is_judged_by_its_stored_settings_and_the_flags_together(
    call: Call, workshop: Path, tmp_path: Path
) -> None:
    small_run(
        workshop / "datasets" / "text",
        tmp_path / "runs",
        max_steps=1,
        embedding_dimensions=12,
        num_q_heads=3,
        num_kv_heads=3,
    )
    done = call("pretrain", "--resume", "--num-q-heads=3")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_full_disk_is_said_to_be_full_and_holds_nothing_half_written(
    workshop: Path, tmp_path: Path
) -> None:
    script = (
        "import resource, sys\n"
        "from nope_gpt.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "for words in sys.argv[1:]:\n"
        "    try: main(words.split())\n"
        "    except SystemExit as exit: print(exit.code)\n"
    )
    commands = [
        f"prepare {workshop / 'corpus'} --token-encoding bytes",
        f"export --model {workshop / 'runs' / 'pretrain'} --output out/model",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *commands], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["4", "4"], done.stderr
    assert done.stderr.count("error: the disk is full") == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("line", ["generate hi --model old.pt", "size --memory 1MB"])
def test_a_real_process_says_the_same_and_exits_with_the_code(
    line: str, nope: Call, workshop: Path, tmp_path: Path
) -> None:
    shutil.copy(workshop / "old.pt", tmp_path)
    refused(nope(*line.split()), line)
