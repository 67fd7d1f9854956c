"""The model card: facts about an exported model, in the Hub's format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nope_gpt.evaluation import record
from nope_gpt.export.formats import FORMATS, Format
from nope_gpt.export.record import Report
from nope_gpt.export.source import Source
from nope_gpt.files.pictures import as_png, can_draw
from nope_gpt.hub.history import Stage

PICTURE = "loss.png"

VERBS = {"pretrain": "Pretraining", "tune": "Tuning"}


def model_card(
    name: str, format: str, source: Source, reports: Sequence[Report], directory: Path
) -> str:
    """Describe an exported model in Markdown.

    Args:
        name: Of its directory.
        format: Of it.
        source: What was exported.
        reports: How it compares with that.
        directory: With its files.
    """
    kind = "chat model" if source.is_chat else "base model"
    dtype = str(source.dtype).removeprefix("torch.")
    facts = FORMATS[format]
    computed = f", with its weights in {dtype}, computing in float32" if facts.is_computed else ""
    parts = [
        front_matter(facts, source),
        f"# {name}",
        f"A NoPE GPT {kind}: a decoder-only transformer without positional embeddings.",
        table(architecture(source, format)),
        "## Use it",
        *facts.use(name, source, directory),
        f"`{name}` is this directory, or the id of the repository that holds it.",
        *training(source, has_picture=(directory / PICTURE).is_file()),
        *reach(source),
        "## Compared with its source",
        "What is in this directory was read again before it was put here, and compared with the "
        f"model that it was written from{computed}.",
        *(f"- {report.line[0].upper()}{report.line[1:]}." for report in reports),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(format: Format, source: Source) -> str:
    """What the Hub reads."""
    lines = ["pipeline_tag: text-generation", "tags:", "- nope-gpt", "- text-generation"]
    if format.library:
        lines.insert(0, f"library_name: {format.library}")
    if format.tag:
        lines.append(f"- {format.tag}")
    if source.license:
        lines.append(f"license: {source.license}")
    repositories = {str(entry.get("repo", "")) for entry in sources_of(source.history)}
    datasets = sorted(repo for repo in repositories if re.fullmatch(r"[\w.-]+/[\w.-]+", repo))
    if datasets:
        lines += ["datasets:", *(f"- {repo}" for repo in datasets)]
    return "\n".join(["---", *lines, "---"])


def architecture(source: Source, format: str) -> dict[str, str]:
    """The network, for people."""
    config, length = source.saved.config, source.saved.trained_context_length
    facts = {
        "Parameters": f"{source.num_parameters:,}",
        "Vocabulary": f"{config.vocabulary_size:,} tokens, {source.tokenizer.name}",
        "Embedding dimensions": f"{config.embedding_dimensions:,}",
        "Query / key-value heads": f"{config.num_q_heads} / {config.num_kv_heads}",
        "Layers": str(config.num_decoder_layers),
        "MLP": f"SiLU, {config.hidden_dimensions:,} hidden neurons",
        "Trained context length": f"{length:,} tokens" if length else "not recorded",
        "Weights": str(source.dtype).removeprefix("torch."),
    }
    facts |= source.notes(format)
    tokens = sum(stage["tokens"] for stage in source.history)
    if tokens:
        facts["Tokens seen in training"] = f"{tokens:,}"
    if source.license:
        facts["License"] = source.license
    return facts


def table(facts: dict[str, str]) -> str:
    """A table of two columns."""
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {cell(fact)} |" for name, fact in facts.items())]
    )


def training(source: Source, *, has_picture: bool) -> list[str]:
    """How it came to be, as far as it is known."""
    if not source.history:
        return []
    rows = ["| | Steps | Tokens | Loss at the end, held out | Data |", "|---|---|---|---|---|"]
    rows += [stage_row(stage) for stage in source.history]
    picture = [f"![Loss by step]({PICTURE})"] if has_picture else []
    return ["## Training", "\n".join(rows), *picture]


def reach(source: Source) -> list[str]:
    """What was found of it by `nope eval --record`, if that was."""
    if source.evaluation is None:
        return []
    found, picture = source.evaluation
    rows = ["| Context | | Perplexity | Of 1x | Bits per byte |", "|---|---|---|---|---|"]
    rows += [
        f"| {each['length']:,.0f} tokens | {each['multiple']:g}x | {each['perplexity']:.3f} | "
        f"{each['perplexity_ratio']:.3f} | {each['bits_per_byte']:.4f} |"
        for each in found["lengths"]
    ]
    said = f"On {found['tokens']:,} tokens, the same in every context:"
    drawn = [f"![Loss by position and length]({record.PICTURE})"] if picture else []
    return ["## How far it reaches", said, "\n".join(rows), *drawn]


def stage_row(stage: Stage) -> str:
    """A stage in a row of a table."""
    losses = stage["losses"]["eval_loss"]
    data = stage.get("data") or {"name": "not recorded", "sources": []}
    sources = "; ".join(map(in_words, data["sources"]))
    return (
        f"| {VERBS.get(stage['command'], stage['command'])} | {stage['step']:,} | "
        f"{stage['tokens']:,} | {f'{losses[-1][1]:.3f} nats' if losses else 'not recorded'} | "
        f"{cell(data['name'])}{f': {cell(sources)}' if sources else ''} |"
    )


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def in_words(entry: dict[str, Any]) -> str:
    """A source of data, with its revision."""
    if "repo" in entry:
        return f"{entry['name']} ({entry['repo']}@{str(entry.get('revision', ''))[:12]})"
    return str(entry["name"])


def sources_of(history: list[Stage]) -> list[dict[str, Any]]:
    """Every source of data of every stage."""
    return [entry for stage in history for entry in (stage.get("data") or {}).get("sources", [])]


def pictures(source: Source) -> dict[str, bytes]:
    """The loss by step of each stage, if it is known and matplotlib is installed to draw it,
    and what was drawn of its reach.
    """
    reach = source.evaluation and source.evaluation[1]
    drawn = {record.PICTURE: reach} if reach else {}
    stages = [stage for stage in source.history if stage["losses"]["loss"]]
    if not stages or not can_draw():
        return drawn
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(stages), 3.4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        for name, style in (("loss", {"alpha": 0.6}), ("eval_loss", {"marker": "o", "ms": 3})):
            if stage["losses"][name]:
                label = "training" if name == "loss" else "held out"
                axes.plot(*zip(*stage["losses"][name], strict=True), label=label, **style)
        axes.set(title=VERBS.get(stage["command"]), xlabel="step", ylabel="nats a token")
        axes.grid(alpha=0.3)
        axes.legend()
    return drawn | {PICTURE: as_png(figure)}
