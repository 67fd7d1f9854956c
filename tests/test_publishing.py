"""An export goes to the Hub only after its comparison, is kept when that fails, and goes on."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_faults import Fault
from loopback_hub import LoopbackHub
from small_chats import dataset_of, questions, tuned
from test_export import exported, sharp

from nope_gpt.config import ExportConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.export import exporting, formats
from nope_gpt.export.exporting import export
from nope_gpt.export.formats import FORMATS
from nope_gpt.files.pictures import can_draw
from nope_gpt.hub import history
from nope_gpt.model import NoPEGPT

Nope = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A chat model over bytes."""
    return sharp(tmp_path / "model", vocabulary_size=261, tokenizer="bytes")


@pytest.mark.slow
def test_each_format_goes_to_a_repository_of_its_own_and_loads_from_there(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    words = ("export", "--model", model, "--format", "hub,transformers", "--output", "out")
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "cache")
        done = nope(*words, "--push-to-hub", "me/tiny", env=environment)
        assert done.returncode == 0, done.stderr
        urls = done.stdout.splitlines()
        assert [url.removeprefix(hub.url)[:22] for url in urls] == [
            "/me/tiny-hub/commit/" + urls[0][-40:-38],
            "/me/tiny-transformers/",
        ]
        for format in ("hub", "transformers"):
            repository = tmp_path / "hub" / "models" / "me" / f"tiny-{format}"
            place = tmp_path / "out" / format
            assert {file.name for file in repository.iterdir()} == {
                file.name for file in place.iterdir()
            }
            card_there = (repository / "README.md").read_text()
            assert f"# me/tiny-{format}\n" in card_there
            assert f"--model me/tiny-{format}\n" in card_there
            answer = nope(
                "generate", "The", "--model", f"me/tiny-{format}", "--max-tokens", 4,
                "--temperature", 0, env=environment,
            )  # fmt: skip
            assert answer.returncode == 0, answer.stderr


def test_nothing_goes_to_the_hub_when_the_comparison_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []
    monkeypatch.setattr(exporting.remote, "upload", lambda *_, **__: reached.append(1))
    write = FORMATS["hub"].write

    def write_wrongly(*given: object) -> formats.Readers:
        readers = write(*given)  # type: ignore[arg-type]
        directory = given[0]
        assert isinstance(directory, Path)
        NoPEGPT(261, 48, 6, 2, 3, 2).save_pretrained(directory)
        return readers

    monkeypatch.setitem(FORMATS, "hub", FORMATS["hub"]._replace(write=write_wrongly))
    settings = ExportConfig(model=str(model), output=str(tmp_path / "out"), push_to_hub="me/tiny")
    with pytest.raises(NopeError, match="the export is not what its source is"):
        export(settings)
    assert reached == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (Fault(path="/api/repos/create", status=403), "the Hub does not let you write here (403)"),
        (Fault(path="/commit/", status=403), "the Hub does not let you write here (403)"),
        (Fault(path="/api/repos/create", status=401), "the Hub does not let you write here (401)"),
        (Fault(path="/lfs/", method="PUT", status=400), "the upload failed: "),
    ],
)
def test_a_refused_upload_keeps_the_export_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, nope: Nope, fault: Fault, what: str
) -> None:
    words = ("export", "--model", model, "--format", "transformers", "--output", "out")
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "cache")
        with hub.fault(fault):
            done = nope(*words, "--push-to-hub", "me/tiny", env=environment)
        assert done.returncode == 5, done.stderr
        assert f"error: {what}" in done.stderr
        assert "out is kept, and the same command goes on from there" in done.stderr
        assert "Traceback" not in done.stderr
        before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
        again = nope(*words, "--push-to-hub", "me/tiny", env=environment)
        assert again.returncode == 0, again.stderr
        assert "out is there already, as asked for\n" in again.stderr
        assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_upload_does_not_send_again_what_arrived(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    words = ("export", "--model", model, "--format", "transformers", "--output", "out")
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "cache")
        with hub.fault(Fault(path="/commit/", offline=True)):
            done = nope(*words, "--push-to-hub", "me/tiny", env=environment)
        assert done.returncode == 5, done.stderr
        sent = [line for line in hub.requests if line.startswith("PUT /lfs/")]
        assert sent
        hub.requests.clear()
        again = nope(*words, "--push-to-hub", "me/tiny", env=environment)
        assert again.returncode == 0, again.stderr
        assert not [line for line in hub.requests if line.startswith("PUT /lfs/")]


@pytest.mark.slow
def test_what_is_there_is_written_anew_for_an_upload_if_the_source_or_the_file_changed(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    words = ("export", "--model", model, "--output", "out", "--push-to-hub", "me/tiny")
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "cache")
        assert nope(*words, env=environment).returncode == 0
        for change in ("--dtype=bfloat16", "--license=mit", "--context-length=99"):
            done = nope(*words, change, env=environment)
            assert done.returncode == 2
            assert "error: this already exists\n" in done.stderr
        with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0")
        done = nope(*words, env=environment)
        assert (done.returncode, "this already exists" in done.stderr) == (2, True)


def test_an_export_that_was_made_for_no_repository_gets_the_card_of_the_one_it_goes_to(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    words = ("export", "--model", model, "--format", "transformers", "--output", "out")
    assert nope(*words).returncode == 0
    weights = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert "# out\n" in (tmp_path / "out" / "README.md").read_text()
    with LoopbackHub(tmp_path / "hub") as hub:
        for name in ("me/one", "me/two"):
            done = nope(
                *words, "--push-to-hub", name, env=hub.environment(tmp_path / "cache")
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            text = (tmp_path / "hub" / "models" / name / "README.md").read_text()
            assert f"# {name}\n" in text
            assert f'pipeline("text-generation", model="{name}")' in text
            assert "- Read by transformers 5." in text
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == weights


def test_what_an_earlier_export_left_on_the_hub_is_removed_and_nothing_else(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    words = ("export", "--model", model, "--push-to-hub", "me/tiny", "--format")
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "cache")
        assert nope(*words, "gguf", "--output", "one", env=environment).returncode == 0
        repository = tmp_path / "hub" / "models" / "me" / "tiny"
        (repository / "LICENSE.txt").write_text("mine")
        (tmp_path / "one" / "notes.txt").write_text("not for others")
        done = nope(
            *words, "gguf", "--quantize", "q8_0", "--output", "two", env=environment
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert {file.name for file in repository.iterdir()} == {
            "LICENSE.txt", "README.md", "Modelfile", "model-q8_0.gguf", "parity.json",
        }  # fmt: skip


def test_a_public_repository_is_not_taken_for_a_private_model(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        (tmp_path / "hub" / "models" / "me" / "open").mkdir(parents=True)
        done = nope(
            "export", "--model", model, "--push-to-hub", "me/open", "--private",
            env=hub.environment(tmp_path / "cache"),
        )  # fmt: skip
    assert done.returncode == 2
    assert "error: this repository is there already, and is public\n" in done.stderr
    assert list((tmp_path / "hub" / "models" / "me" / "open").iterdir()) == []


@pytest.mark.parametrize("name", ["me/my--model", "me/-x", "me/x.git", "me/" + "x" * 97])
def test_a_name_that_the_hub_would_refuse_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, name: str
) -> None:
    settings = ExportConfig(model=str(model), output=str(tmp_path / "out"), push_to_hub=name)
    with pytest.raises(UsageError, match="cannot be a repository"):
        export(settings)
    assert not (tmp_path / "out").exists()


HOSTILE = [
    '{"stages": [{}]}',
    '{"stages": 3}',
    '{"stages": [{"command": "x", "step": 1, "tokens": 1, "losses": {"loss": [[1]]}}]}',
    '{"stages": [{"command": "x", "step": "a", "tokens": 1, "losses": {}}]}',
    "[]",
    "{",
]


@pytest.mark.parametrize("content", HOSTILE)
def test_a_history_of_something_else_is_refused_by_name(
    model: Path, tmp_path: Path, content: str
) -> None:
    (model / "history.json").write_text(content)
    with pytest.raises(NopeError, match="the history cannot be read"):
        exported(model, "hub", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_history_says_cannot_break_the_card(model: Path, tmp_path: Path) -> None:
    source = {"name": "a | b\n# c", "repo": "x: [y", "files": 1}
    stage = {
        "command": "tune", "version": "0", "config": {}, "step": 1, "tokens": 2, "seconds": 3.0,
        "data": {"name": "d\n\n## e", "sources": [source]},
        "losses": {"loss": [], "eval_loss": [[1, 2.5]]},
    }  # fmt: skip
    (model / "history.json").write_text(json.dumps({"stages": [stage]}))
    text = (exported(model, "hub", tmp_path / "out") / "README.md").read_text()
    assert "x: [y" not in text.split("---")[1]
    assert "| Tuning | 1 | 2 | 2.500 nats | d ## e: a \\| b # c" in text


@pytest.mark.slow
def test_a_log_that_was_cut_short_is_no_obstacle(base: Path, tmp_path: Path) -> None:
    log = base / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 2, "lo')
    stages = json.loads((exported(base, "hub", tmp_path / "out") / "history.json").read_text())
    assert [step for step, _ in stages["stages"][0]["losses"]["loss"]] == [1.0, 2.0]


@pytest.mark.slow
def test_the_card_is_made_of_facts(base: Path, tmp_path: Path) -> None:
    chats = dataset_of(questions(12), base, tmp_path)
    run, recorder = tuned(base, chats, tmp_path / "runs")
    place = exported(run, "transformers", tmp_path / "out", license="apache-2.0")
    text = (place / "README.md").read_text(encoding="utf-8")
    model = NoPEGPT.from_pretrained(run)
    count = sum(weight.numel() for weight in model.parameters())
    assert f"| Parameters | {count:,} |" in text
    assert "| Trained context length | 16 tokens |" in text
    assert "license: apache-2.0\n" in text
    stages = json.loads((place / "history.json").read_text())["stages"]
    assert [stage["command"] for stage in stages] == ["pretrain", "tune"]
    assert stages[0]["tokens"] == 2 * 8 * 16
    tokens = stages[0]["tokens"] + recorder.reports[-1].tokens
    assert f"| Tokens seen in training | {tokens:,} |" in text
    assert re.search(r"\| Pretraining \| 2 \| 256 \| \d\.\d{3} nats \| .*: corpus \|", text)
    assert "![Loss by step](loss.png)" in text
    assert (place / "loss.png").read_bytes().startswith(b"\x89PNG")
    last = stages[1]["losses"]["loss"][-1]
    assert last == [recorder.reports[-1].step, recorder.losses[-1]]
    report = json.loads((place / "parity.json").read_text())["reports"][0]
    assert f"largest error {report['largest_error']:.1e} of logits up to" in text
    again = exported(place, "llama", tmp_path / "again")
    assert json.loads((again / "history.json").read_text())["stages"] == stages


def test_a_model_of_unknown_history_has_a_card_without_one(model: Path, tmp_path: Path) -> None:
    text = (exported(model, "hub", tmp_path / "out") / "README.md").read_text()
    assert "## Training" not in text
    assert "Trained context length | not recorded" in text
    assert "license" not in text


@pytest.mark.parametrize(
    ("format", "lines"),
    [
        ("hub", ["nope chat --model out", 'NoPEGPT.from_pretrained("out")']),
        ("transformers", ['pipeline("text-generation", model="out")', "vllm serve out"]),
        ("llama", ["mlx_lm.generate --model out", "Not for SGLang"]),
        ("gguf", ["llama-server -m out/model-f32.gguf --jinja", "ollama create out -f Modelfile"]),
    ],
)
def test_the_card_tells_how_to_run_each_format(
    model: Path, tmp_path: Path, format: str, lines: list[str]
) -> None:
    text = (exported(model, format, tmp_path / "out") / "README.md").read_text()
    for line in lines:
        assert line in text
    assert "## Compared with its source" in text


def test_curves_are_thinned_to_means(tmp_path: Path) -> None:
    points = [[float(step), float(step % 2)] for step in range(1, 1001)]
    thinned = history.thinned(points)
    assert len(thinned) == history.POINTS
    assert thinned[0] == [5.0, pytest.approx(0.6)]
    assert thinned[-1][0] == 1000.0
    assert history.thinned(points[:7]) == points[:7]
    assert history.thinned([]) == []
    assert can_draw()
    assert tmp_path.is_dir()
