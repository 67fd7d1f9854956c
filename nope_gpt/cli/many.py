"""`nope generate --input`: a file of prompts to a file of texts, interrupted or not."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nope_gpt.amounts import format_seconds
from nope_gpt.cli.loading import open_model, prepare_for_context, seed_for
from nope_gpt.cli.reading import read_text
from nope_gpt.cli.terminal import Pace, progress_bar, result, say, talk
from nope_gpt.config import GenerateConfig
from nope_gpt.data.documents import Refused, messages_of
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.files.json_files import ESCAPED, parse_json
from nope_gpt.files.writing import writing
from nope_gpt.generation.batching import Request, answers
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

GENERATED = {"text", "new_tokens", "reason", "samples"}
"""What a line of the output has other than that of the input."""


def answer_file(config: GenerateConfig, source: Path, target: Path, *, as_json: bool) -> None:
    """Continue every prompt of a file, and write each line as soon as those before it are there.

    Raises:
        NopeError: A line is not a prompt, or the output is of other prompts.
    """
    lines = read_lines(source)
    done = kept_lines(target, lines, "text" if config.num_samples == 1 else "samples")
    model, tokenizer = open_model(config, "generate")
    requests = [
        Request(tokens_of(line, tokenizer, f"{source}:{number + 1}"), seed_for(config, number, i))
        for number, line in enumerate(lines)
        if number >= done
        for i in range(config.num_samples)
    ]
    longest = max((len(request.prompt) for request in requests), default=0)
    prepare_for_context(model, min(config.context_length, longest + config.max_tokens))
    room = config.context_length - (model.first_token is not None)
    long = sum(len(request.prompt) > room for request in requests)
    if long:
        say(
            f"note: {long // config.num_samples:,} prompts are longer than the context, and only "
            f"their end is read (--context-length)"
        )
    if done:
        say(f"{done:,} of {len(lines):,} lines are there already")
    progress = Progress(len(lines), done)
    texts: list[dict[str, Any]] = []
    with writing(target), target.open("ab") as file, progress:
        for answer in answers(model, tokenizer, requests, config, config.batch_size):
            texts.append(answer.as_dict())
            if len(texts) == config.num_samples:
                line = lines[progress.done]
                more = texts[0] if config.num_samples == 1 else {"samples": texts}
                file.write(as_json_line(line | more).encode("utf-8", ESCAPED))
                file.flush()
                progress.advance(sum(text["new_tokens"] for text in texts))
                texts = []
    result(str(target), {"output": str(target), "lines": len(lines)}, as_json)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file.

    Raises:
        MissingError: There is no such file.
        NopeError: A line is no object; names it.
    """
    return [value for _, value in objects(read_text(str(path)), path)]


def objects(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of lines, each with its number; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise NopeError(f"this line is not JSON: {error}", where=f"{path}:{number}") from None
        if not isinstance(value, dict):
            raise NopeError("this line is not a JSON object", where=f"{path}:{number}")
        yield number, value


def kept_lines(target: Path, lines: list[dict[str, Any]], made: str) -> int:
    """How many lines of the output are there; what a kill left of another is cut off.

    Args:
        target: The output.
        lines: Of the input.
        made: What every line of the output has.

    Raises:
        UsageError: They are not of these prompts, or were not made by this.
    """
    if not target.exists():
        return 0
    with writing(target):
        content = target.read_bytes()
    whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
    found = [value for _, value in objects(whole.decode("utf-8", "replace"), target)]
    for number, value in enumerate(found):
        prompt = lines[number] if number < len(lines) else None
        if (
            prompt is None
            or made not in value
            or any(value.get(key) != prompt[key] for key in prompt if key not in GENERATED)
        ):
            raise UsageError(
                f"line {number + 1} of the output is not of line {number + 1} of the input",
                where=str(target),
                hint="choose another --output",
            )
    rest = content[len(whole) :]
    begun = beginning(lines[len(found)]) if len(found) < len(lines) else b""
    if rest and not (begun and (begun.startswith(rest) or rest.startswith(begun))):
        raise UsageError(
            "the output ends in something else than the next line",
            where=str(target),
            hint="choose another --output",
        )
    with writing(target):
        os.truncate(target, len(whole))
    return len(found)


def beginning(line: dict[str, Any]) -> bytes:
    """What the output of a line begins with, whatever is made of it."""
    kept = dict(itertools.takewhile(lambda item: item[0] not in GENERATED, line.items()))
    return as_json_line(kept)[:-2].encode("utf-8", ESCAPED)


def as_json_line(value: dict[str, Any]) -> str:
    """An object on a line."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def tokens_of(line: dict[str, Any], tokenizer: BaseTokenizer, where: str) -> list[int]:
    """The prompt of a line.

    Raises:
        NopeError: It has neither a prompt nor messages, or a message is none.
        UsageError: The model knows no turns.
    """
    if isinstance(line.get("prompt"), str):
        return tokenizer.tokenize(line["prompt"]) or [tokenizer.end_of_text]
    messages = line.get("messages")
    if not isinstance(messages, list):
        raise NopeError(
            'this line has neither a "prompt", a text, nor "messages", a list', where=where
        )
    if not isinstance(tokenizer, ChatTokenizer):
        raise UsageError("this is a base model, which was never taught to take turns", where=where)
    try:
        return tokenizer.tokenize_prompt(messages_of(messages))
    except Refused as error:
        raise NopeError(f"this line has {error}", where=where) from None


class Progress:
    """Shows how far it has come, on a terminal by a bar and elsewhere by lines.

    Args:
        total: Lines in all.
        done: Of them, before.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.begun_at = total, done, done
        self.tokens = 0
        self.pace = Pace()
        self.console = talk()
        self.bar = progress_bar(self.console) if self.console.is_terminal else None

    def __enter__(self) -> None:
        self.started = time.perf_counter()
        if self.bar:
            self.task = self.bar.add_task(
                "generate", total=self.total, completed=self.done, figures=""
            )
            self.bar.start()

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, tokens: int) -> None:
        """A line is done."""
        self.done += 1
        self.tokens += tokens
        seconds = time.perf_counter() - self.started
        speed = f"{self.tokens / seconds:,.1f} tok/s"
        if self.bar:
            self.bar.update(self.task, completed=self.done, figures=speed)
        elif self.done == self.total or self.pace.is_due():
            left = (self.total - self.done) * seconds / (self.done - self.begun_at)
            say(f"line {self.done}/{self.total} · {speed} · {format_seconds(left)} left")
