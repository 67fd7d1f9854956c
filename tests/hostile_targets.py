"""What is damaged, and what reads it: for Hypothesis here and for atheris in `fuzz/`.

Each target writes an artefact with our own code, and then uses one as a command would. Any file of
it may be anything: it is used, or refused with a `NopeError`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hostile import Chance, damaged
from small import RECIPE, SHAPE, byte_dataset
from small_chats import base_run, dataset_of, preferences, questions, tuned

from nope_gpt.adaptation import adapters
from nope_gpt.chat import transcripts
from nope_gpt.chat.tools import calls_in, load_tools, told
from nope_gpt.cli import datasets, many
from nope_gpt.config import PretrainConfig, TuneConfig
from nope_gpt.config.knobs import read_settings, resolve
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.chats import ChatBatches
from nope_gpt.data.finding import find_dataset
from nope_gpt.data.samples import samples_of
from nope_gpt.data.shards import TOLD, Dataset
from nope_gpt.errors import NopeError
from nope_gpt.evaluation import record
from nope_gpt.export import card, legacy
from nope_gpt.export.record import Record, Report
from nope_gpt.files.artefacts import MANIFEST, PARITY, describe, verify
from nope_gpt.hub import storage
from nope_gpt.hub.history import logged, stages_of
from nope_gpt.hub.locating import locate
from nope_gpt.hub.published_layout import published_names
from nope_gpt.hub.transformers_layout import ARCEE, LLAMA, settings, to_layout
from nope_gpt.inspection import facts_of
from nope_gpt.memory import Message
from nope_gpt.model import NoPEGPT
from nope_gpt.network.sharpening import Sharpening
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, tokenizer_of
from nope_gpt.tokenization.byte_pairs import tokenizer_json
from nope_gpt.training import checkpoints, runs

TEXT = "The function returns a new list. The list holds the values that it was given. "


@dataclass
class Target:
    """An artefact and its use.

    Attributes:
        path: Of its directory.
        files: That are damaged, below it.
        use: Reads it.
        whole: The bytes of every file before any damage.
    """

    path: Path
    files: Sequence[str]
    use: Callable[[Path], object]
    whole: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = {name: (self.path / name).read_bytes() for name in self.files}
        manifests = (self.path.rglob(MANIFEST)) if self.path.is_dir() else ()
        self.whole |= {str(file.relative_to(self.path)): file.read_bytes() for file in manifests}

    def attempt(self, chance: Chance) -> None:
        """Damage a file, use what is there, and put the file back.

        Raises:
            Exception: Something else than a refusal.
        """
        name = chance.choice(self.files)
        file = self.path / name
        file.write_bytes(damaged(self.whole[name], name, chance))
        if chance.randrange(8):
            sign(file)
        try:
            self.use(self.path)
        except NopeError as error:
            assert error.what
        finally:
            for name, content in self.whole.items():
                (self.path / name).write_bytes(content)


def sign(file: Path) -> None:
    """Let the manifest beside a file agree with it, as its forger would."""
    manifest = file.with_name(MANIFEST)
    if manifest.is_file() and manifest != file:
        document = json.loads(manifest.read_text())
        document["files"][file.name] = describe(file)
        manifest.write_text(json.dumps(document))


# Models


def use_model(path: Path) -> None:
    """Load a model, continue a text, and read how it came to be."""
    place = locate(path)
    saved = storage.load(place)
    tokenizer = tokenizer_of(BaseTokenizer.load(place), saved.config.vocabulary_size)
    model = NoPEGPT.from_saved(saved)
    prompt = torch.tensor(tokenizer.tokenize("The list "))
    for token, _ in model.generate(prompt, max_tokens=2, context_length=16, compile="off"):
        assert isinstance(tokenizer.decode_single_token(token), str)
    tell_history(place)
    if found := record.kept(str(path), place):
        assert f"{found[0]['tokens']:,}"


def tell_history(place: Path) -> None:
    """What a model card says of the stages."""
    for stage in stages_of(place):
        assert card.stage_row(stage).count("\n") == 0


def model_in(root: Path, *, chat: bool = False) -> tuple[NoPEGPT, BaseTokenizer]:
    """A small model with a byte-pair tokenizer of its own."""
    kind = ChatTokenizer if chat else BaseTokenizer
    tokenizer = kind(BaseTokenizer.train([TEXT * 20], 300).encoding)
    torch.manual_seed(0)
    model = NoPEGPT(vocabulary_size=tokenizer.vocabulary_size, **SHAPE).eval()
    model.trained_context_length = 64
    model.first_token = 1
    root.mkdir(parents=True, exist_ok=True)
    return model, tokenizer


def published_model(root: Path) -> Target:
    """A model as it is on the Hub, with its history and what was found of it."""
    model, tokenizer = model_in(root)
    storage.save(root, model.saved())
    tokenizer.save(root)
    stage = {
        "command": "pretrain",
        "step": 3,
        "tokens": 192,
        "seconds": 1.5,
        "config": RECIPE,
        "data": {"name": "text", "documents": 3, "tokens": 500, "sources": [{"name": "text"}]},
        "losses": {"loss": [[1.0, 5.5], [2.0, 5.25]], "eval_loss": [[2.0, 5.5]]},
    }
    (root / "history.json").write_text(json.dumps({"stages": [stage, stage]}))
    figures = dict.fromkeys(("length", "multiple", "perplexity"), 2.0)
    figures |= {"perplexity_ratio": 1.0, "bits_per_byte": 3.0}
    found = {"weights_sha256": storage.digest(root), "tokens": 10, "lengths": [figures]}
    (root / "evaluation.json").write_text(json.dumps(found))
    storage.write_sharpenings(root, {128: Sharpening(1.5), 256: Sharpening(1.0, 0.2)}, 64)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.tiktoken"]
    return Target(root, [*files, "history.json", "evaluation.json"], use_model)


def use_export(path: Path) -> None:
    """What `nope inspect --verify` tells of an export."""
    assert json.dumps(facts_of(path, verify=True))


def exported_model(root: Path) -> Target:
    """An export, with the record of how it compared with its source."""
    published_model(root)
    numbers = dict.fromkeys(("largest_error", "largest_logit", "divergence", "likeliest"), 0.5)
    counts = dict.fromkeys(("num_tokens", "continued", "num_texts", "texts"), 24)
    report = Report.of({"read_by": "nope-gpt", "complaints": [], **numbers, **counts})
    files = {file.name: describe(file) for file in sorted(root.iterdir())}
    Record("hub", "0.2.0", {"license": None}, [report], files).write(root)
    return Target(root, [PARITY, "config.json"], use_export)


def model_in_parts(root: Path) -> Target:
    """A model whose weights are in several files."""
    model, tokenizer = model_in(root)
    storage.save(root, model.saved(), largest_file=20_000)
    tokenizer.save(root)
    parts = sorted(file.name for file in root.glob("model-*.safetensors"))
    return Target(root, ["model.safetensors.index.json", *parts[:2]], use_model)


def foreign_model(layout: str) -> Callable[[Path], Target]:
    """A model in one of transformers' layouts, with the tokenizer of those."""

    def make(root: Path) -> Target:
        model, tokenizer = model_in(root, chat=True)
        controls = tokenizer.control_tokens if isinstance(tokenizer, ChatTokenizer) else {}
        written = settings(
            model.config,
            layout,
            dtype="float32",
            context_length=64,
            trained_context_length=64,
            ends=[299],
            pad=299,
        )
        tensors = to_layout(model.state_dict(), layout, model.config.num_decoder_layers)
        storage.write_weights(root, tensors, {"format": "pt"}, None)
        special = tokenizer.encoding._special_tokens | controls
        document = tokenizer_json(tokenizer.ranks, tokenizer.encoding._pat_str, special, {})
        (root / "config.json").write_text(json.dumps(written))
        (root / "tokenizer.json").write_text(json.dumps(document))
        return Target(root, ["config.json", "tokenizer.json", "model.safetensors"], use_model)

    return make


def old_checkpoint(root: Path) -> Target:
    """A `.pt` file of the old scripts."""
    model, _ = model_in(root)
    names = published_names(model.config.num_decoder_layers)
    content = {
        "model": {names[name]: tensor for name, tensor in model.state_dict().items()},
        "model_args": model.config.as_dict(),
        "tokenizer_args": {"name": "r50k_base"},
    }
    torch.save(content, root / "old.pt", _use_new_zipfile_serialization=False)

    def use(path: Path) -> None:
        legacy.read_checkpoint(path / "old.pt")

    return Target(root, ["old.pt"], use)


# Runs


def trained_run(root: Path) -> Target:
    """A run of `nope tune` with an adapter in its checkpoint."""
    base = base_run(corpus_in(root), root)
    run, _ = tuned(base, dataset_of(questions(12), base, root), root / "runs", num_epochs=1)
    (place,) = (run / "checkpoints").glob("step-*")
    inside = ["config.json", "model.safetensors", "tokenizer.json", "run.json", "state.json"]
    inside += ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"]
    files = [f"checkpoints/{place.name}/{name}" for name in [*inside, MANIFEST]]
    base_model = storage.load(locate(base))
    facts = runs.stored_record(run, "tune")["facts"]

    def use(run: Path) -> None:
        use_model(run)
        place = locate(run)
        resolve(TuneConfig, [("run.json", runs.stored_record(run, "tune").get("config", {}))])
        runs.resumed_from(run, "tune")
        runs.resumed_from(place, "tune")
        runs.check_facts(runs.stored_record(run, "tune").get("facts", {}), facts, run)
        assert checkpoints.read_progress(place).data_step >= 0
        checkpoints.read_tensors(place / checkpoints.OPTIMIZER)
        logged(run / "metrics.jsonl")
        adapter = adapters.load(adapters.place_of(str(run)))
        NoPEGPT.from_saved(adapters.with_adapter(base_model, adapter))

    return Target(run, ["run.json", "metrics.jsonl", *files], use)


def corpus_in(root: Path) -> Path:
    """A few small texts."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        (root / f"{number}.txt").write_text(TEXT * (number + 2))
    texts = root / "texts"
    texts.mkdir()
    for file in root.glob("*.txt"):
        shutil.move(file, texts / file.name)
    return texts


# Data sets


def use_texts(path: Path) -> None:
    """Tell of a data set of text, and make a batch of it."""
    dataset = use_dataset(path)
    settings: dict[str, Any] = {"tokens_per_sample": 8, "batch_size": 2}
    batches = TextBatches(
        dataset.require("text"),
        **settings,
        micro_batches_per_step=2,
        seed=0,
        separate_documents=True,
    )
    size = BaseTokenizer.load(path).vocabulary_size
    for batch in [*batches.micro_batches(0, 0, 1), *islice(batches.holdout(4, 0, 1), 2)]:
        assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < size


def use_chats(path: Path) -> None:
    """Tell of a data set of conversations, and make a batch of it."""
    dataset = use_dataset(path)
    tokenizer = ChatTokenizer.load(path)
    batches = ChatBatches(
        dataset,
        subsets="all",
        max_tokens_per_sample=200,
        filter_long_samples=False,
        message_start=tokenizer.im_start_index,
        batch_size=2,
        micro_batches_per_step=1,
        seed=0,
        in_pairs=dataset.content == "preference",
    )
    for batch in [*batches.micro_batches(0, 0, 1), *islice(batches.holdout(4, 0, 1), 2)]:
        assert int(batch.tokens.min()) >= 0
        assert int(batch.tokens.max()) < tokenizer.vocabulary_size


def use_dataset(path: Path) -> Dataset:
    """Find a data set, and print what `nope inspect` prints."""
    dataset = Dataset.open(find_dataset(path, None)).with_keys(TOLD)
    assert datasets.report(dataset.manifest)
    assert datasets.summary(dataset.manifest)
    for sample in samples_of(dataset, 2):
        assert datasets.described(sample)["streams"]
    assert dataset.fingerprint
    assert json.dumps(dataset.origin)
    verify(path, dataset.manifest)
    return dataset


def texts(root: Path) -> Target:
    path = byte_dataset(corpus_in(root), root / "data")
    return Target(path, files_of(path), use_texts)


def chats(root: Path) -> Target:
    path = dataset_of(questions(12), base_run(corpus_in(root), root), root)
    return Target(path, files_of(path), use_chats)


def pairs(root: Path) -> Target:
    path = dataset_of(preferences(12), base_run(corpus_in(root), root), root)
    return Target(path, files_of(path), use_chats)


def files_of(path: Path) -> list[str]:
    """Every file of a data set, the manifest as often as all others together."""
    names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
    return [*names, *[MANIFEST] * len(names)]


# Conversations and settings

ASKS = '<tool_call>[{"name": "calculate", "arguments": {"expression": "2"}}]</tool_call>'
SAID = [("system", "Be brief."), ("user", "2?"), ("assistant", ASKS), ("tool", "2")]
CONVERSATION: list[Message] = [{"role": role, "content": content} for role, content in SAID]


def conversations(root: Path) -> Target:
    """A transcript that is loaded, encoded, searched for calls and saved again."""
    root.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        transcripts.add(root / "chat.jsonl", CONVERSATION, {"model": "x"})
    tokenizer = ChatTokenizer.of_bytes()
    tools = load_tools(["examples"])

    def use(path: Path) -> None:
        for line in many.read_lines(path / "chat.jsonl"):
            tokens = many.tokens_of(line, tokenizer, "line")
            markers = sum(token >= tokenizer.encoding.n_vocab for token in tokens)
            assert markers == 2 * len(line.get("messages", ())) + 1 or "prompt" in line
        messages = transcripts.load(path / "chat.jsonl")
        tokens = tokenizer.tokenize_prompt(messages)
        assert sum(token == tokenizer.im_start_index for token in tokens) == len(messages) + 1
        for said in messages:
            for call in calls_in(said["content"], tools):
                assert str(call)
                assert json.dumps(call.arguments)
        assert told(tools, messages[0]["content"] if messages else "")
        transcripts.save(path / "again.jsonl", messages, {})
        assert transcripts.load(path / "again.jsonl") == messages
        assert transcripts.as_markdown(messages)

    return Target(root, ["chat.jsonl"], use)


def settings_files(root: Path) -> Target:
    """What `--config` takes."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "settings.toml").write_text('max_steps = 5\nlearning_rate = 1e-3\nrun_name = "a"\n')
    (root / "settings.json").write_text(json.dumps({"config": RECIPE}))

    def use(path: Path) -> None:
        for name in ("settings.toml", "settings.json"):
            resolve(PretrainConfig, [(name, read_settings(path / name))])

    return Target(root, ["settings.toml", "settings.json"], use)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "a published model": published_model,
    "an export": exported_model,
    "a model in parts": model_in_parts,
    "an Arcee": foreign_model(ARCEE),
    "a Llama": foreign_model(LLAMA),
    "an old checkpoint": old_checkpoint,
    "a run": trained_run,
    "texts": texts,
    "chats": chats,
    "pairs": pairs,
    "a transcript": conversations,
    "settings": settings_files,
}
