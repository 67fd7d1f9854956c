"""Whether a tuned model calls tools as its data do: before tuning and after.

    nope tune --model BASE --dataset tm4-chat.jsonl ...
    python benchmarks/tool_calls.py runs/tune [--calls 100]

Of the run's held-out conversations, each place where the assistant called a tool is a prompt. The
likeliest continuation counts as a call if it is `<tool_call>JSON</tool_call>` with a name and
arguments, and as the right tool if the name is that of the data.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nope_gpt.config import GenerateConfig, TuneConfig
from nope_gpt.config.knobs import known_fields
from nope_gpt.generation.batching import Request, answers
from nope_gpt.model import NoPEGPT
from nope_gpt.training.tuning import Tuning

CALL = re.compile(r"\s*<tool_call>(.*)</tool_call>\s*", re.DOTALL)


def main() -> None:
    """Count, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    record = json.loads((options.run / "run.json").read_text(encoding="utf-8"))
    task = Tuning.of(
        TuneConfig(**known_fields(TuneConfig, record["config"], "run.json")), torch.device("cpu")
    )
    calls = list(calls_in(task))[: options.calls]
    print(f"{len(calls)} calls of {len(task.batches.held_out)} held-out conversations\n")
    print("| model | calls a tool in valid JSON | the right tool |\n|---|---|---|")
    before, after = NoPEGPT.from_saved(task.saved), NoPEGPT.from_pretrained(options.run)
    for name, model in (("before tuning", before), ("after", after)):
        valid = right = 0
        for text, (_, expected) in zip(written(model, task, calls), calls, strict=True):
            found = tool_of(text)
            valid += found is not None
            right += found == expected
        print(f"| {name} | {valid / len(calls):.0%} | {right / len(calls):.0%} |", flush=True)


def calls_in(task: Tuning) -> Iterator[tuple[list[int], str]]:
    """Every prompt that the data answer with a call, and the tool that is called."""
    for (document,) in task.batches.held_out:
        assert document.mask is not None
        edges = np.flatnonzero(np.diff(document.mask, prepend=0, append=0))
        for start, end in edges.reshape(-1, 2).tolist():
            name = tool_of(task.tokenizer.decode_tokens(document.tokens[start : end - 1]))
            if name is not None:
                yield document.tokens[:start].tolist(), name


def tool_of(text: str) -> str | None:
    """The tool that a text calls, or None if it is no call."""
    match = CALL.fullmatch(text)
    try:
        call = json.loads(match[1]) if match else None
    except ValueError:
        return None
    is_call = isinstance(call, dict) and "arguments" in call and isinstance(call.get("name"), str)
    return call["name"] if is_call else None


def written(model: NoPEGPT, task: Tuning, calls: list[tuple[list[int], str]]) -> list[str]:
    """The likeliest continuation of each prompt."""
    config = GenerateConfig(temperature=0.0, max_tokens=128, repeat_penalty=0.0, seed=0)
    requests = [Request(prompt, 0) for prompt, _ in calls]
    found = answers(model, task.tokenizer, requests, config, 8)
    return [answer.text for answer in sorted(found, key=lambda answer: answer.index)]


if __name__ == "__main__":
    main()
