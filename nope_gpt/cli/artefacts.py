"""Runs, checkpoints, exports and models in words, as `nope inspect` tells of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nope_gpt.amounts import format_bytes, format_seconds
from nope_gpt.cli.datasets import counted
from nope_gpt.cli.tables import Section, text

Facts = dict[str, Any]

CURVE = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40


def described(facts: Facts) -> str:
    """What is known of an artefact, in sections."""
    sections = SECTIONS[facts["kind"]](facts)
    return text([Section(title, [(*row, None) for row in rows]) for title, rows in sections])


Sections = list[tuple[str, list[tuple[str, str]]]]
"""Titles, and names with their values."""


def collection(facts: Facts) -> Sections:
    """Several artefacts, a line for each."""
    rows = [
        (item["name"], f"{item['kind']}, {format_bytes(item['bytes'])}") for item in facts["items"]
    ]
    return [(f"{facts['path']}: {len(rows)} inside", rows)]


def unfinished(facts: Facts) -> Sections:
    """A preparation that is not over."""
    rows = [
        ("finished", f"{counted(facts['units'], 'shard')}, {format_bytes(facts['bytes'])} in all"),
        ("state", "a process prepares it now" if facts["prepared_now"] else "nothing goes on"),
        ("next", "the `nope prepare` that began it goes on with it"),
    ]
    return [("unfinished part of a data set", rows)]


def run(facts: Facts) -> Sections:
    """How far a run has come."""
    latest, losses = facts["latest"], facts["losses"]
    rows = [("state", f"{facts['trained_by']} trains it now" if facts["trained_by"] else "ended")]
    rows.append(("step", f"{facts['step']:,}"))
    if losses["loss"]:
        rows.append(("loss", curve(losses["loss"])))
    if losses["eval_loss"]:
        rows.append(("hold-out loss", curve(losses["eval_loss"])))
    if "tokens" in latest:
        rate = latest["tokens"] / max(latest["seconds"], 1e-9)
        spent = f"{latest['tokens']:,} tokens in {format_seconds(latest['seconds'])}"
        rows.append(("trained on", f"{spent}, {rate:,.0f} tokens/s"))
    if facts["data"]:
        rows.append(("data", data_line(facts["data"])))
    settings = [(name, shown(value)) for name, value in facts["changed_settings"].items()]
    checkpoints = [
        (f"step-{each['step']}", each["complaint"] or format_bytes(each["bytes"]))
        for each in facts["checkpoints"]
    ]
    whole = [each for each in facts["checkpoints"] if not each["complaint"]]
    following = [("", f"nope {facts['command']} --resume {facts['path']}")]
    if whole:
        following.insert(0, ("", f"nope generate --model {facts['path']}"))
        following.insert(1, ("", f"nope export --model {facts['path']} --output exports/NAME"))
    return [
        (f"run of nope {facts['command']} {facts['version']}", rows),
        ("settings that are not the defaults", settings or [("", "none")]),
        ("checkpoints", checkpoints or [("", "none yet")]),
        ("next", following),
    ]


def checkpoint(facts: Facts) -> Sections:
    """A model and its step."""
    return [(f"checkpoint after {counted(facts['step'], 'step')}", model_rows(facts)), *made(facts)]


def export(facts: Facts) -> Sections:
    """A model in another format, and how it compares with its source."""
    rows = [("written by", f"nope {facts['version']}")]
    for report in facts["reports"]:
        same = f"{report['texts']:,} of {report['num_texts']:,} texts have the same tokens"
        rows.append(
            (
                f"read by {report['read_by']}",
                f"logits differ by {report['largest_error']:.1e} of {report['largest_logit']:.1f} "
                f"at most, {report['divergence']:.1e} nats; {same}",
            )
        )
    if "config" in facts:
        rows += model_rows(facts)
    return [(f"export, format {facts['format']}", rows), *files(facts), *made(facts)]


def model(facts: Facts) -> Sections:
    """A model's directory."""
    return [("model in the published layout", model_rows(facts)), *files(facts), *made(facts)]


def model_rows(facts: Facts) -> list[tuple[str, str]]:
    """What a network is, in rows."""
    shape = facts["config"]
    rows = [
        ("parameters", f"{facts['parameters']:,} in {' and '.join(facts['dtypes'])}"),
        (
            "shape",
            f"{shape['num_decoder_layers']} layers of {shape['embedding_dimensions']:,} "
            f"dimensions, {shape['num_q_heads']} query and {shape['num_kv_heads']} key/value "
            f"heads, {shape['hidden_ratio']} times as many hidden",
        ),
        ("vocabulary", f"{shape['vocabulary_size']:,} tokens, {tokenizer_line(facts)}"),
    ]
    if facts["trained_context_length"]:
        rows.append(("trained context", f"{facts['trained_context_length']:,} tokens"))
    if facts["first_token"] is not None:
        rows.append(("begins with", f"token {facts['first_token']}, before every text"))
    for length, scale in (facts["attention_scales"] or {}).items():
        rows.append((f"at {int(length):,} tokens", f"attention is scaled by {shown(scale)}"))
    return rows


def tokenizer_line(facts: Facts) -> str:
    """What tokenizer a model has."""
    tokenizer = facts["tokenizer"]
    if "complaint" in tokenizer:
        return str(tokenizer["complaint"])
    return f"{tokenizer['name']}, {'a chat model' if tokenizer['chat'] else 'a base model'}"


def made(facts: Facts) -> Sections:
    """The stages that made a model."""
    rows = []
    for stage in facts["stages"]:
        final = stage["losses"]["eval_loss"] or stage["losses"]["loss"]
        loss = f", loss {final[-1][1]:.3f}" if final else ""
        data = f" of {stage['data']['name']}" if stage["data"] else ""
        told = f"{stage['step']:,} steps, {stage['tokens']:,} tokens{data}{loss}"
        rows.append((f"nope {stage['command']}", told))
    return [("how it came to be", rows)] if rows else []


def files(facts: Facts) -> Sections:
    """The files of a directory."""
    return [("files", [(name, format_bytes(size)) for name, size in facts["files"].items()])]


def data_line(data: Facts) -> str:
    """A data set, in a line."""
    counts = [f"{data[name]:,} {name}" for name in ("documents", "tokens") if name in data]
    return f"{data['name']} ({', '.join(counts)})" if counts else str(data["name"])


def curve(points: list[list[float]]) -> str:
    """A curve of losses in a line of characters, and its ends."""
    losses = [loss for _, loss in points]
    size = -(-len(losses) // CURVE_WIDTH)
    means = [
        sum(group) / len(group)
        for group in (losses[start : start + size] for start in range(0, len(losses), size))
    ]
    low, span = min(means), max(means) - min(means) or 1.0
    drawn = "".join(CURVE[round((mean - low) / span * (len(CURVE) - 1))] for mean in means)
    return f"{drawn}  {losses[0]:.3f} to {losses[-1]:.3f}"


def shown(value: Any) -> str:
    """A setting's value, as it is typed."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


SECTIONS: dict[str, Callable[[Facts], Sections]] = {
    "collection": collection,
    "unfinished dataset": unfinished,
    "run": run,
    "checkpoint": checkpoint,
    "export": export,
    "model": model,
}
"""What is told of each kind; a data set has a report of its own."""
