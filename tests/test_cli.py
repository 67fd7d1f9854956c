"""The command line: its flags, help and settings, and what goes to stdout and to stderr."""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from reference import SETTINGS, forward, published_tensors, write_published
from safetensors.torch import save_file
from small import RECIPE

import nope_gpt.config
from nope_gpt.cli import main
from nope_gpt.cli.options import configured, normalize
from nope_gpt.cli.writing import write_stream
from nope_gpt.config import (
    PRESETS,
    ChatConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    PretrainConfig,
    QuickstartConfig,
    SizeConfig,
    TuneConfig,
)
from nope_gpt.config.knobs import Knobs, as_words, differences, flag_of
from nope_gpt.errors import MissingError, UsageError
from nope_gpt.generation.streaming import Piece
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

Call = Callable[..., "subprocess.CompletedProcess[str]"]

CONFIGS: dict[str, type[Knobs]] = {
    "quickstart": QuickstartConfig,
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "tune": TuneConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "eval": EvaluateConfig,
    "size": SizeConfig,
}

ELSEWHERE = "our default is another, on purpose"

PRETRAIN: dict[str, tuple[Any, Any]] = {
    "dataset_subset": (ELSEWHERE, "sample-100BT"),
    "token_encoding": (ELSEWHERE, "cl100k_base"),
    "dataset_path": ("./datasets", "elsewhere"),
    "batch_size": (2, 3),
    "gradient_accumulation_steps": (128, 3),
    "tokens_per_sample": (4096, 3),
    "max_steps": (10000, 3),
    "learning_rate": (ELSEWHERE, 0.25),
    "max_gradient_norm": (10.0, 0.25),
    "embedding_dimensions": (1024, 2048),
    "num_q_heads": (16, 8),
    "num_kv_heads": (4, 2),
    "num_hidden_layers": (16, 3),
    "feed_forward_ratio": (4, 2),
    "dropout": (0.0, 0.25),
    "activation_checkpointing": (False, True),
    "ddp_sharding_level": (ELSEWHERE, 0),
    "eval_interval": (100, 3),
    "num_eval_samples": (2048, 3),
    "checkpoint_interval": (100, 3),
    "checkpoint_path": (ELSEWHERE, "./checkpoints/checkpoint.pt"),
    "run_dir_path": ("./runs", "elsewhere"),
    "device": (ELSEWHERE, "cpu"),
    "seed": (None, 3),
}

TUNE: dict[str, tuple[Any, Any]] = {
    "base_checkpoint_path": (None, "elsewhere"),
    "dataset_subset": ("all", "one,two"),
    "max_tokens_per_sample": (4096, 3),
    "filter_long_samples": (False, True),
    "batch_size": (2, 3),
    "gradient_accumulation_steps": (64, 3),
    "learning_rate": (ELSEWHERE, 0.25),
    "max_gradient_norm": (1.0, 0.25),
    "rank": (8, 3),
    "alpha": (1.0, 0.25),
    "num_epochs": (2, 3),
    "activation_checkpointing": (False, True),
    "eval_interval": (1, 3),
    "num_eval_samples": (2048, 3),
    "checkpoint_interval": (1, 3),
    "checkpoint_path": (ELSEWHERE, "./checkpoints/checkpoint.pt"),
    "run_dir_path": ("./runs", "elsewhere"),
    "device": (ELSEWHERE, "cpu"),
    "seed": (None, 3),
}

GENERATE: dict[str, tuple[Any, Any]] = {
    "checkpoint_path": (ELSEWHERE, "elsewhere"),
    "max_tokens": (2000, 3),
    "colorize_tokens": (False, True),
    "context_length": (4096, 3),
    "temperature": (0.9, 0.25),
    "top_k": (500, 3),
    "top_p": (0.9, 0.25),
    "repeat_penalty": (0.1, 0.25),
    "repeat_window": (50, 3),
    "device": (ELSEWHERE, "cpu"),
    "seed": (None, 3),
}

CHAT = GENERATE | {"temperature": (0.7, 0.25), "max_message_history": (4, 3)}

WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "pretrain": {"low_memory_optimizer": True},
    "tune": {"low_memory_optimizer": True, "num_dataset_processes": 3},
    "generate": {},
    "chat": {},
}

SEED = {"pretrain": PRETRAIN, "tune": TUNE, "generate": GENERATE, "chat": CHAT}

FIELDS = {
    "num_hidden_layers": "num_decoder_layers",
    "feed_forward_ratio": "hidden_ratio",
    "base_checkpoint_path": "model",
}

EVERY_FLAG = [
    pytest.param(command, name, value, id=f"{command}-{name}")
    for command, table in SEED.items()
    for name, (_, value) in table.items()
]


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


@functools.cache
def parser(command: str) -> tuple[typer.Typer, list[Any]]:
    """A command's flags in front of a body that only keeps its settings."""
    seen: list[Any] = []
    app = typer.Typer()
    app.command()(configured(CONFIGS[command])(seen.append))
    return app, seen


def settled(command: str, *arguments: object) -> Any:
    """The settings that a command makes of its arguments."""
    app, seen = parser(command)
    app(args=normalize([command, *map(str, arguments)])[1:], standalone_mode=False)
    return seen.pop()


def field_of(command: str, name: str) -> str:
    if name == "checkpoint_path" and command in ("generate", "chat"):
        return "model"
    return FIELDS.get(name, name)


def spellings(name: str, value: Any) -> list[list[str]]:
    """A flag as the old scripts were given it, and as it is spelled today."""
    kebab = "--" + name.replace("_", "-")
    if value is True:
        return [[f"--{name}"], [kebab]]
    return [[f"--{name}={value}"], [f"--{name}", str(value)], [kebab, str(value)]]


def help_of(call: Call, command: str, monkeypatch: pytest.MonkeyPatch, width: int = 160) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    done = call(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def shown_flags(text: str) -> list[str]:
    """The flags in the first column of a help page."""
    return re.findall(r"^│ \*?\s*(--[^\s,]+)", text, flags=re.MULTILINE)


# The seed's flags


@pytest.mark.parametrize(("command", "name", "value"), EVERY_FLAG)
def test_every_flag_of_the_seed_sets_its_knob_in_either_spelling(
    command: str, name: str, value: Any
) -> None:
    for words in spellings(name, value):
        assert getattr(settled(command, *words), field_of(command, name)) == value


@pytest.mark.parametrize("command", SEED)
@pytest.mark.parametrize("spelling", [0, -1])
def test_a_command_line_of_all_the_seeds_flags_is_understood(
    command: str, spelling: int, call: Call
) -> None:
    table = SEED[command].items()
    words = [word for name, (_, value) in table for word in spellings(name, value)[spelling]]
    for name, value in WITHOUT_EFFECT[command].items():
        words += spellings(name, value)[spelling]
    if command in ("pretrain", "tune"):
        words.append("--resume")
    done = call(command, *words)
    # Every flag was taken, and the command went on to miss its data or its model.
    assert done.returncode == 3, done.stderr
    assert re.search("there is no (data set|such model)", done.stderr)
    for name in WITHOUT_EFFECT[command]:
        assert f"note: --{name.replace('_', '-')} changes nothing: " in done.stderr


@pytest.mark.parametrize("command", SEED)
def test_shapes_batches_and_intervals_default_to_the_seeds_values(command: str) -> None:
    config = settled(command)
    for name, (default, _) in SEED[command].items():
        if default is not ELSEWHERE:
            assert getattr(config, field_of(command, name)) == default, name


@pytest.mark.parametrize("command", SEED)
def test_the_device_is_found_by_itself_unless_it_is_named(command: str) -> None:
    assert settled(command).device == "auto"


@pytest.mark.parametrize("command", ["pretrain", "tune"])
def test_the_preset_seed_brings_back_the_seeds_recipe(command: str) -> None:
    config = settled(command, "--preset", "seed")
    assert (config.optimizer, config.peak_learning_rate) == ("adafactor", 1e-2)
    assert (config.schedule, config.warmup_fraction, config.weight_decay) == ("constant", 0, 0)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--dataset_subset=sample-100BT"], "fineweb-sample-100BT-r50k_base"),
        (["--dataset_subset=none"], "fineweb-r50k_base"),
        (["--token_encoding=o200k_base"], "fineweb-sample-10BT-o200k_base"),
    ],
)
def test_a_fineweb_subset_and_encoding_name_their_data_set(
    words: list[str], name: str, call: Call
) -> None:
    assert f"there is no data set '{name}'" in call("pretrain", *words).stderr


@pytest.mark.parametrize("command", ["pretrain", "tune"])
def test_what_changes_nothing_is_taken_and_neither_shown_nor_kept(
    command: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, config = help_of(call, command, monkeypatch), settled(command)
    for name, value in WITHOUT_EFFECT[command].items():
        for words in spellings(name, value):
            assert settled(command, *words) == config
        for spelling in (name, name.replace("_", "-")):
            (tmp_path / "a.toml").write_text(f"{spelling} = {json.dumps(value)}\n")
            assert settled(command, "--config", tmp_path / "a.toml") == config
        assert f"--{name.replace('_', '-')}" not in shown
        assert name not in config.as_dict()


# Historical spellings


@pytest.mark.parametrize(
    ("command", "words", "field", "value"),
    [
        ("pretrain", ["--num_decoder_layers=3"], "num_decoder_layers", 3),
        ("pretrain", ["--num-decoder-layers", "3"], "num_decoder_layers", 3),
        ("pretrain", ["--num_hidden_layers=3"], "num_decoder_layers", 3),
        ("pretrain", ["--hidden_ratio=2"], "hidden_ratio", 2),
        ("pretrain", ["--feed_forward_ratio=2"], "hidden_ratio", 2),
        ("pretrain", ["--dataset_subsets=sample-10BT"], "dataset_subset", "sample-10BT"),
        ("pretrain", ["--schedule=cosine", "--anneal_learning_rate"], "schedule", "linear"),
        ("tune", ["--lora_rank=3"], "rank", 3),
        ("tune", ["--rank=3"], "rank", 3),
        ("tune", ["--lora_alpha=2"], "alpha", 2.0),
        ("tune", ["--dataset_subsets=one,two"], "dataset_subset", "one,two"),
        ("tune", ["--base_checkpoint_path=runs/base"], "model", "runs/base"),
        ("generate", ["--checkpoint_path=exports/m"], "model", "exports/m"),
        ("generate", ["--beam_width=4"], "num_beams", 4),
        ("chat", ["--checkpoint_path", "exports/m"], "model", "exports/m"),
        ("size", ["--num_decoder_layers=3"], "num_decoder_layers", 3),
    ],
)
def test_historical_spellings_mean_todays_knob(
    command: str, words: list[str], field: str, value: Any
) -> None:
    assert getattr(settled(command, *words), field) == value


def test_only_flags_are_respelled() -> None:
    words = ["generate", "snake_case_prompt", "--top_k=1", "--", "--lora_rank=1", "hidden_ratio"]
    assert normalize(words) == [*words[:2], "--top-k=1", *words[3:]]
    assert normalize(["pretrain", "--run_name=my_run"]) == ["pretrain", "--run-name=my_run"]
    assert normalize(["pretrain", "--checkpoint_path=a_b.pt"])[1] == "--checkpoint-path=a_b.pt"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["tune", "--quantize_base_weights"], "leave the flag out"),
        (["tune", "--quant_group_size=64"], "leave the flag out"),
        (["pretrain", "--resume_scheduler"], "--resume always goes on with the schedule"),
        (["generate", "--num_candidates=3"], "the best one is printed"),
    ],
)
def test_a_retired_flag_says_what_to_do_and_leaves_in_order(
    words: list[str], advice: str, call: Call
) -> None:
    done = call(*words)
    flag = words[1].partition("=")[0].replace("_", "-")
    assert done.returncode == 2
    assert flag in done.stderr
    assert advice in done.stderr


# Help


def test_a_resumed_run_takes_its_stored_settings_before_a_preset(call: Call, corpus: Path) -> None:
    call("prepare", corpus, "--token-encoding=bytes", "--name=text")
    words = ["pretrain", "--preset=tiny", "--tokens-per-sample=16", "--seed=0", "--device=cpu"]
    assert call(*words, "--max-steps=1").returncode == 0
    done = call("pretrain", "--preset=tiny", "--resume", "--max-steps=2")
    assert done.returncode == 0, done.stderr
    assert "going on from step 1 of 2" in done.stderr


@pytest.mark.parametrize("command", CONFIGS)
def test_help_shows_every_knob_once_and_by_one_name(
    command: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = shown_flags(help_of(call, command, monkeypatch))
    knobs = {flag_of(field) for field in dataclasses.fields(CONFIGS[command])}
    own = {"--help", "--json", "--config", "--preset", "--resume", "--prompt-file"}
    own |= {"--input", "--output"}
    own |= {"--merge", "--dry-run", "--preview", "--gpus"}
    own |= {"--verify", "--measure", "--plot", "--format", "--calibrate", "--record"}
    assert len(flags) == len(set(flags))
    assert knobs <= set(flags) <= knobs | own
    assert not [flag for flag in flags if "_" in flag]


def test_no_knob_is_written_twice() -> None:
    package = Path(str(nope_gpt.config.__file__)).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.glob("*.py")]
    fields = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    knobs = Counter(
        (ast.unparse(field.target), ast.unparse(field.value.args[1]))
        for field in fields
        if isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "knob"
    )
    assert len(knobs) > 100
    assert [knob for knob, count in knobs.items() if count > 1] == []


@pytest.mark.parametrize("command", CONFIGS)
def test_help_gives_examples_made_of_flags_that_exist(
    command: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(call, command, monkeypatch)
    examples = re.findall(rf"• .*\bnope {command}(.*)", shown)
    assert examples
    used = {word for line in examples for word in line.split() if word.startswith("--")}
    assert used <= set(shown_flags(shown))


def test_the_first_page_lists_every_command_with_a_sentence(call: Call) -> None:
    done = call("--help")
    for command in CONFIGS:
        assert re.search(rf"│ {command} +[A-Z]\w+ ", done.stdout)
    assert call("-h").stdout == done.stdout


def test_help_and_sizes_are_answered_without_torch() -> None:
    script = (
        "import sys\n"
        "from nope_gpt.cli import main\n"
        "for words in (['pretrain', '--help'], ['size', '--json']):\n"
        "    try: main(words)\n"
        "    except SystemExit as exit: assert not exit.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_the_version_is_the_packages(call: Call) -> None:
    from nope_gpt import __version__

    assert call("--version").stdout == f"nope-gpt {__version__}\n"


# Settings: flag, file, preset, default


def test_a_flag_beats_a_file_beats_a_preset_beats_a_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("batch_size = 5\nmax-steps = 6\nnum_hidden_layers = 7\n")
    words = ["--preset", "tiny", "--config", file, "--max_steps", 9]
    for order in (words, words[2:] + words[:2], words[4:] + words[:4]):
        config = settled("pretrain", *order)
        assert config.max_steps == 9
        assert (config.batch_size, config.num_decoder_layers) == (5, 7)
        tiny = PRESETS[PretrainConfig]["tiny"]
        assert config.embedding_dimensions == tiny["embedding_dimensions"] != 1024
        assert config.dropout == 0.0


def test_a_flag_given_its_default_still_beats_a_preset() -> None:
    assert settled("pretrain", "--preset", "tiny", "--batch-size", 2).batch_size == 2
    assert settled("pretrain", "--preset", "tiny", "--max-steps", 10000).max_steps == 10000


def test_a_file_may_name_a_knob_as_the_flag_or_as_the_published_key(tmp_path: Path) -> None:
    for name in ("num_hidden_layers", "num-hidden-layers", "num_decoder_layers"):
        (tmp_path / "a.toml").write_text(f"{name} = 3\nactivation_checkpointing = true\n")
        config = settled("pretrain", "--config", tmp_path / "a.toml")
        assert (config.num_decoder_layers, config.activation_checkpointing) == (3, True)


def test_a_files_whole_number_will_do_for_a_fraction(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("temperature = 1\n")
    config = settled("chat", "--config", tmp_path / "a.toml")
    assert (config.temperature, type(config.temperature)) == (1.0, float)


def test_the_json_of_a_run_is_a_settings_file(tmp_path: Path) -> None:
    config = PretrainConfig(**RECIPE)
    record = {"command": "pretrain", "config": config.as_dict(), "facts": {}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert settled("pretrain", "--config", tmp_path / "run.json") == config


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("pretrain", {"anchor": False, "seed": 3, "dataset_path": "a b"}),
        ("pretrain", {"tokens_per_step": 8192, "batch_size": 1, "length_growth": 0.0}),
        ("tune", {"packing": False, "model": "runs/base", "max_steps": 9}),
        ("chat", {"stop": ("a", "-"), "system_message": "", "markdown": False}),
    ],
)
@pytest.mark.parametrize("preset", [None, "tiny"])
def test_the_flags_that_differ_make_the_settings_again(
    command: str, settings: dict[str, Any], preset: str | None
) -> None:
    kind = CONFIGS[command]
    beside = PRESETS.get(kind, {}).get(preset or "", {})
    config = kind(**{**beside, **settings})
    flags = differences(config, beside)
    before = ["--preset", preset] if beside else []
    assert settled(command, *before, *as_words(flags)) == config
    for flag in flags:
        fewer = {name: value for name, value in flags.items() if name != flag}
        assert settled(command, *before, *as_words(fewer)) != config, flag


def test_what_is_settled_by_other_settings_is_no_difference() -> None:
    assert differences(PretrainConfig(tokens_per_sample=30)) == {"--tokens-per-sample": 30}
    assert differences(PretrainConfig(learning_rate=2e-2)) == {}
    adamw = PretrainConfig(optimizer="adamw", learning_rate=1e-3)
    assert differences(adamw) == {"--optimizer": "adamw"}


@pytest.mark.parametrize(
    ("command", "words", "file", "what", "where"),
    [
        ("pretrain", ["--batch-size=0"], None, "--batch-size is 0, and must be at least 1", ""),
        ("pretrain", ["--dropout=1"], None, "--dropout is 1.0, and must be below 1", ""),
        ("pretrain", ["--learning-rate=0"], None, "--learning-rate is 0.0, and must be", ""),
        ("pretrain", ["--learning-rate=nan"], None, "must be a finite number", ""),
        ("pretrain", ["--learning-rate=inf"], None, "must be a finite number", ""),
        ("pretrain", ["--schedule=up"], None, "--schedule is up, and must be one of const", ""),
        ("tune", ["--lora_rank=0"], None, "--rank is 0, and must be at least 1", ""),
        ("generate", ["--top-p=2"], None, "--top-p is 2.0, and must be at most 1", ""),
        ("generate", ["--temperature=-1"], None, "--temperature is -1.0, and must be at least", ""),
        ("export", ["--dtype=int3"], None, "--dtype is int3, and must be one of auto", ""),
        ("pretrain", [], "batch_size = 0", "--batch-size is 0, and must be at least 1", "a.toml"),
        ("pretrain", [], "batch_size = 'x'", "--batch-size is 'x', and must be a whole", "a.toml"),
        ("pretrain", [], "batch_size = true", "--batch-size is True, and must be a", "a.toml"),
        ("pretrain", [], "batch_size = 2.5", "--batch-size is 2.5, and must be a whole", "a.toml"),
        ("pretrain", [], "hidden_ratio = 0", "--feed-forward-ratio is 0, and must be", "a.toml"),
        ("tune", [], "alpha = 'x'", "--alpha is 'x', and must be a number", "a.toml"),
        ("prepare", ["x.txt"], "overwrite = 1", "--overwrite is 1, and must be true or", "a.toml"),
        ("chat", [], "system_message = 3", "--system-message is 3, and must be text", "a.toml"),
        ("pretrain", [], "batch_sise = 1", "unknown setting 'batch_sise'", "a.toml"),
        ("generate", [], "max_steps = 1", "unknown setting 'max_steps'", "a.toml"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named_with_the_place_it_came_from(
    command: str, words: list[str], file: str | None, what: str, where: str, call: Call
) -> None:
    if file:
        Path("a.toml").write_text(file)
        words = [*words, "--config", "a.toml"]
    done = call(command, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert what in done.stderr.splitlines()[0]
    place = f"--config {where}" if where else "the command line"
    assert f"  where: {place}\n" in done.stderr


def test_the_place_of_a_bad_setting_is_that_of_the_layer_which_won(call: Call) -> None:
    Path("a.toml").write_text("batch_size = 3")
    done = call("pretrain", "--preset", "tiny", "--config", "a.toml", "--batch-size", -1)
    assert "where: the command line" in done.stderr
    Path("a.toml").write_text("batch_size = -1")
    assert "where: --config a.toml" in call("pretrain", "--config", "a.toml").stderr
    assert "no data set" in call("pretrain", "--config", "a.toml", "--batch-size", 1).stderr


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--num-q-heads=3"], ("--embedding-dimensions is 1024", "--num-q-heads, which is 3")),
        (["--num-kv-heads=3"], ("--num-q-heads is 16", "--num-kv-heads, which is 3")),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "size"])
def test_heads_that_do_not_divide_name_both_flags(
    command: str, words: list[str], flags: tuple[str, str], call: Call
) -> None:
    done = call(command, *words)
    assert done.returncode == 2
    assert all(flag in done.stderr for flag in flags)


@pytest.mark.parametrize(
    ("command", "names"), [("pretrain", "tiny, small, 125m, 400m, 1b, seed"), ("tune", "tiny")]
)
def test_an_unknown_preset_lists_those_that_there_are(command: str, names: str, call: Call) -> None:
    done = call(command, "--preset", "huge")
    assert done.returncode == 2
    assert f"--preset is 'huge', and must be one of {names}" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pretrain", "--bogus"], "--bogus"),
        (["pretrain", "--batch-size", "x"], "--batch-size"),
        (["pretrain", "--batch-size"], "--batch-size"),
        (["pretrian"], "Did you mean 'pretrain'?"),
        (["prepare"], "SOURCE"),
        (["chat", "hello"], "hello"),
    ],
)
def test_words_that_are_no_command_line_are_pointed_at(
    words: list[str], says: str, call: Call
) -> None:
    done = call(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


# Results on stdout, everything else on stderr


def flags_of(settings: dict[str, Any]) -> list[str]:
    """As they are typed; what is on or off has no value."""
    return [
        f"--{'' if value else 'no-'}{name}" if type(value) is bool else f"--{name}={value}"
        for name, value in settings.items()
    ]


def losses(run: str) -> list[float]:
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [value for line in lines for name, value in line.items() if "loss" in name]


def test_the_whole_family_speaks_results_on_stdout_and_everything_else_on_stderr(
    call: Call, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)

    def done(*words: object, stdin: bytes = b"") -> tuple[str, str]:
        result = call(*words, stdin=stdin)
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout + result.stderr
        return result.stdout, result.stderr

    out, err = done("prepare", corpus, "--token_encoding=bytes", "--json")
    (data,) = json.loads(out)["datasets"]
    stats = data["statistics"]
    assert (data["content"], stats["documents"], stats["refused"]) == ("text", 12, {})
    assert "12 documents, 1 of them held out" in err

    recipe = flags_of(RECIPE | {"max_steps": 2, "eval_interval": 1, "dataset_path": "datasets"})
    out, err = done("pretrain", *recipe)
    assert out == f"{Path('runs/pretrain')}\n"
    assert "step 2/2 · loss " in err
    assert "step 1: hold-out loss " in err
    assert f"saved {Path('runs/pretrain/checkpoints/step-2')}" in err
    again = ["--config", "runs/pretrain/run.json", "--run-name", "again", "--json"]
    assert json.loads(done("pretrain", *again)[0]) == {"run": str(Path("runs/again"))}
    assert losses("runs/pretrain") == losses("runs/again")

    roles = ("user", "assistant")
    chats = [[{"role": role, "content": f"{role} {n}"} for role in roles] for n in range(8)]
    lines = [json.dumps({"messages": messages}) for messages in chats]
    Path("chats.jsonl").write_text("\n".join(lines))
    out, err = done("prepare", "chats.jsonl", "--token-encoding", "runs/pretrain")
    assert out == f"{Path('datasets/chats-bytes')}\n"
    tuning = ["--num_epochs=1", "--lora_rank=4", "--seed=0", "--device=cpu", "--json"]
    out, err = done("tune", "--base_checkpoint_path=runs/pretrain", *tuning)
    assert json.loads(out) == {"run": str(Path("runs/tune"))}
    assert "adapters of rank 4" in err

    out, _ = done("export", "--model", "runs/tune", "--json")
    exported = json.loads(out)["exports"][0]["path"]
    assert Path(exported, "model.safetensors").is_file()
    assert done("export", "--model", "runs/tune", "--output", "o")[0] == "o\n"

    model = ["--model", "runs/pretrain", "--max-tokens=24", "--dtype=float32", "--seed=7"]
    text, err = done("generate", "The list", *model)
    assert re.search(r"24 tokens · .* tok/s · .* prompt 8 tokens at .* · length\n", err)
    Path("prompt.txt").write_text("The list")
    for words, stdin in (
        (["The list"], b""),
        ([], b"The list"),
        (["-"], b"The list"),
        (["--prompt-file", "prompt.txt"], b"not read"),
        (["--checkpoint_path=runs/pretrain", "The list"], b""),
    ):
        assert done("generate", *words, *model, stdin=stdin)[0] == text
    answer = json.loads(done("generate", "The list", "--json", *model)[0])
    assert (answer["prompt"], answer["text"] + "\n") == ("The list", text)
    assert (answer["prompt_tokens"], answer["new_tokens"], answer["reason"]) == (8, 24, "length")
    assert done("generate", "The list", *model[:-1], "--seed=8")[0] != text
    begun = done("generate", *model, stdin=b"")[0]
    assert begun != text
    assert begun == done("generate", *model, stdin=b"")[0]
    cold = ["--temperature=0", *model[:-1]]
    greedy = done("generate", "The list", *cold)[0]
    assert greedy == done("generate", "The list", *cold, "--top-k=1")[0]

    plain, _ = done("generate", "The", *model, "--colorize-tokens")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    coloured = call("generate", "The", *model, "--colorize-tokens").stdout
    assert "\x1b[38;2;" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert call("generate", "The", *model, "--colorize-tokens").stdout == plain


def test_a_size_is_one_json_object_for_programs_and_a_table_for_people(call: Call) -> None:
    shape = ["--embedding-dimensions=1280", "--num-q-heads=20", "--num-kv-heads=5"]
    facts = call("size", *shape, "--num_decoder_layers=20", "--json")
    assert json.loads(facts.stdout)["parameters"]["total"] == 408_445_440
    assert facts.stderr == ""
    assert "408,445,440" in call("size", *shape, "--num_hidden_layers=20").stdout


@pytest.mark.parametrize("colour", [False, True])
def test_colouring_adds_colour_and_changes_no_character(
    colour: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if colour:
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLORTERM", "truecolor")
    pieces = ["a\tb", "\r\n", "[red]", ":smile:", "\x07\x0c", "x" * 300, "\n\n", "é "]
    assert write_stream([Piece(text, 0.5) for text in pieces], True) == "".join(pieces)
    out = capsys.readouterr().out
    assert ("\x1b[38;2;110;100;60m" in out) == colour
    assert re.sub(r"\x1b\[[\d;]*m", "", out) == "".join(pieces)


def test_an_unlikely_token_is_red_and_a_likely_one_green(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    write_stream([Piece("no", 0.0), Piece("yes", 1.0)], True)
    assert "\x1b[38;2;220;0;60mno\x1b[0m\x1b[38;2;0;200;60myes" in capsys.readouterr().out


def test_a_traceback_is_shown_where_one_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOPE_DEBUG", "1")
    with pytest.raises(MissingError, match="no data set"):
        main(["pretrain"])
    with pytest.raises(UsageError, match="--resume-scheduler is gone"):
        main(["pretrain", "--resume_scheduler"])


def test_a_bug_is_not_dressed_as_a_mistake() -> None:
    app = typer.Typer()

    def body(_config: Any) -> None:
        raise ZeroDivisionError

    app.command()(configured(SizeConfig)(body))
    with pytest.raises(ZeroDivisionError):
        app(args=[], standalone_mode=False)


@pytest.mark.skipif(sys.platform == "win32", reason="closes a POSIX pipe")
def test_a_reader_that_has_seen_enough_ends_the_program_quietly(tmp_path: Path) -> None:
    settings = SETTINGS | {"vocabulary_size": 257}
    tensors = published_tensors(settings)
    for name, tensor in tensors.items():
        if "out_proj" in name or "linear2" in name:
            tensor.zero_()
    embedding = tensors["token_classifier.linear.weight"]
    embedding[torch.arange(257) != ord("a")] = 0  # It says a, and nothing else for ever.
    write_published(tmp_path / "m", vocabulary_size=257, tokenizer="bytes")
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    words = ["--model=m", "--max-tokens=1000000", "--context-length=32", "--temperature=0"]
    with subprocess.Popen(
        [sys.executable, "-m", "nope_gpt.cli", "generate", "a", *words, "--repeat-penalty=0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(1) == b"a"
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(60) in (0, 1)
    assert not re.search("Traceback|Broken|Error|error", err), err


# The .pt files of the old scripts


OLD_SHAPE = {"embedding_dimensions": 8, "num_q_heads": 2, "num_kv_heads": 1, "hidden_ratio": 1}


def old_checkpoint(vocabulary_size: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the old scripts saved, and the weights that are in it."""
    settings = SETTINGS | OLD_SHAPE | {"num_decoder_layers": 2, "vocabulary_size": vocabulary_size}
    tensors = published_tensors(settings)
    tied = {"token_embeddings.weight": tensors["token_classifier.linear.weight"]}
    record = {
        "step": 3,
        "model_args": settings | {"vocabulary_size": 50257},
        "tokenizer_args": {"name": "r50k_base"},
        "model": {f"_orig_mod.{name}": tensor for name, tensor in (tensors | tied).items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-2}]},
        "scheduler": {"last_epoch": 3},
    }
    return record, tensors


def same_logits(exported: str, tensors: dict[str, torch.Tensor]) -> None:
    tokens = torch.tensor([464, 2068, 7586, 21831, 50256])
    expected = forward(tensors, tokens, num_q_heads=2, num_kv_heads=1)
    actual = NoPEGPT.from_pretrained(exported)(tokens.unsqueeze(0))[0].detach()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.ranks
def test_an_old_checkpoint_becomes_a_model_that_computes_the_same(call: Call) -> None:
    record, tensors = old_checkpoint(50257)
    Path("checkpoints").mkdir()
    torch.save(record, "checkpoints/checkpoint.pt")
    done = call("export", "--model", "checkpoints/checkpoint.pt", "--format", "hub")
    assert (done.returncode, done.stdout) == (0, f"{Path('exports/checkpoint')}\n")
    same_logits("exports/checkpoint", tensors)
    assert BaseTokenizer.from_pretrained("exports/checkpoint").name == "r50k_base"


@pytest.mark.ranks
def test_an_old_tuned_checkpoint_is_exported_with_its_adapters_folded_in(call: Call) -> None:
    record, tensors = old_checkpoint(50261)
    record["lora_args"] = {"rank": 2, "alpha": 3.0}
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if "stage" in name]:
        weight = record["model"].pop(f"_orig_mod.{name}")
        a = torch.randn(2, weight.size(1), generator=generator) / 4
        b = torch.randn(weight.size(0), 2, generator=generator) / 4
        stem = f"_orig_mod.{name.removesuffix('.weight')}.parametrizations.weight"
        record["model"] |= {f"{stem}.original": weight, f"{stem}.0.lora_a": a}
        record["model"][f"{stem}.0.lora_b"] = b
        tensors[name] = weight + 3.0 * b @ a
    torch.save(record, "old.pt")
    assert call("export", "--model", "old.pt", "--output", "chat").returncode == 0
    same_logits("chat", tensors)
    stated = json.loads(Path("chat/config.json").read_text())
    assert stated["vocabulary_size"] == ChatTokenizer.from_pretrained("chat").vocabulary_size


class Payload:
    """Touches a file when it is unpickled the careless way."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("taken"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_asks_for_code_to_be_run_is_refused(zipped: bool, call: Call) -> None:
    record = {"model": {"x": torch.zeros(1)}, "model_args": {}, "step": Payload()}
    torch.save(record, "evil.pt", _use_new_zipfile_serialization=zipped)
    done = call("export", "--model", "evil.pt")
    assert done.returncode == 1
    assert "cannot be read without running code from it" in done.stderr
    assert "  where: evil.pt\n" in done.stderr
    assert not Path("taken").exists()
    assert not Path("exports").exists()
    torch.load("evil.pt", weights_only=False)
    assert Path("taken").exists()


@pytest.mark.parametrize(
    ("command", "flag", "before"),
    [("tune", "packing", "packing = false"), ("tune", "full", "full = true")],
)
def test_every_switch_can_be_turned_on_and_off_again(
    command: str, flag: str, before: str, call: Call
) -> None:
    Path("a.toml").write_text(before)
    for form in (f"--{flag}", f"--no-{flag}", f"--no_{flag}"):
        done = call(command, "--config", "a.toml", form)
        assert done.stderr.startswith("error: there is no base model to tune"), done.stderr
