"""`nope generate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nope_gpt.cli.options import JSON, argument, configured, option
from nope_gpt.cli.reading import read_text
from nope_gpt.cli.terminal import result, say
from nope_gpt.config import GenerateConfig
from nope_gpt.errors import UsageError

if TYPE_CHECKING:
    from nope_gpt.model import NoPEGPT
    from nope_gpt.tokenization import BaseTokenizer

PROMPT = argument(
    "prompt",
    str | None,
    "The text to continue; `-` or nothing reads standard input, if something is piped in.",
    default=None,
    metavar="[PROMPT]",
)
PROMPT_FILE = option("prompt_file", str | None, "Read the prompt from a file.", metavar="FILE")
INPUT = option(
    "input",
    str | None,
    'Continue many prompts: a .jsonl file with {"prompt": ...} or {"messages": [...]} a line.',
    metavar="FILE",
)
OUTPUT = option(
    "output",
    str | None,
    "With --input: where each line goes with its `text`, in order. What is there of it already "
    "is kept, and the rest done.",
    metavar="FILE",
)


@configured(GenerateConfig, PROMPT, PROMPT_FILE, INPUT, OUTPUT, JSON)
def command(
    config: GenerateConfig,
    prompt: str | None,
    prompt_file: str | None,
    input: str | None,
    output: str | None,
    json: bool,
) -> None:
    """Continue a text, streaming; without a prompt, begin one.

    The text goes to stdout, the statistics to stderr.

    Examples:

    - `nope generate "The garbage collector" --model runs/pretrain`

    - `cat question.txt | nope generate --model runs/pretrain --temperature 0`

    - `nope generate --input prompts.jsonl --output texts.jsonl --model runs/pretrain`
    """
    refuse_contradictions(config, input, output, prompt or prompt_file, json)
    from nope_gpt.cli.loading import open_model, prepare_for_context

    if input is not None:
        from nope_gpt.cli.many import answer_file

        answer_file(config, Path(input), Path(str(output)), as_json=json)
        return
    text = read_prompt(prompt, prompt_file)
    model, tokenizer = open_model(config, "generate")
    tokens = tokenizer.tokenize(text) or [tokenizer.end_of_text]
    prepare_for_context(model, min(config.context_length, len(tokens) + config.max_tokens))
    if len(tokens) > config.context_length - (model.first_token is not None):
        pinned = f"the first {config.pin_tokens:,} and " if config.pin_tokens else ""
        say(
            f"note: the prompt has {len(tokens):,} tokens, and only {pinned}the last "
            f"{config.context_length - config.pin_tokens:,} are read (--context-length)"
        )
    continuing = Continuing(config, model, tokenizer, text, tokens, json)
    if config.num_beams > 1:
        continuing.search()
    elif config.num_samples > 1:
        continuing.samples()
    else:
        continuing.stream()


def refuse_contradictions(
    config: GenerateConfig,
    input: str | None,
    output: str | None,
    prompt: str | None,
    as_json: bool,
) -> None:
    """Refuse flags that ask for different things.

    Raises:
        UsageError: Names them.
    """
    if (input is None) != (output is None):
        given, missing = ("--input", "--output") if output is None else ("--output", "--input")
        raise UsageError(f"{given} needs {missing}", hint="give both, or neither")
    if input is not None and Path(input).resolve() == Path(str(output)).resolve():
        raise UsageError("--input and --output are the same file", hint="choose another --output")
    if input is not None and prompt is not None:
        raise UsageError("there is a prompt and --input", hint="give one of them")
    if config.log_probabilities is not None and not as_json:
        raise UsageError("--log-probabilities are printed with --json alone", hint="add --json")
    one = config.num_beams > 1 or config.log_probabilities is not None or config.colorize_tokens
    if one and (config.num_samples > 1 or input is not None):
        raise UsageError(
            "--num-beams, --log-probabilities and --colorize-tokens are for one continuation",
            hint="leave out --num-samples and --input",
        )


@dataclass(frozen=True)
class Continuing:
    """A prompt and what is to continue it, in one of three ways."""

    config: GenerateConfig
    model: NoPEGPT
    tokenizer: BaseTokenizer
    prompt: str
    tokens: list[int]
    as_json: bool

    def stream(self) -> None:
        """Stream one continuation."""
        from nope_gpt.cli.writing import write_stream
        from nope_gpt.generation.streaming import TextStream

        stream = TextStream(
            self.model,
            self.tokenizer,
            self.tokens,
            self.config,
            log_probabilities=self.config.log_probabilities,
        )
        try:
            if self.as_json:
                text = "".join(piece.text for piece in stream)
                value = {"prompt": self.prompt, "text": text, **stream.statistics.as_dict()}
                if self.config.log_probabilities is not None:
                    value["tokens"] = stream.scores
                result(text, value, as_json=True)
            else:
                write_stream(stream, self.config.colorize_tokens)
                sys.stdout.write("\n")
        finally:
            if not self.as_json:
                say(str(stream.statistics), style="dim")

    def samples(self) -> None:
        """Print several continuations of one prompt, side by side in a batch."""
        from nope_gpt.cli.loading import seed_for
        from nope_gpt.generation.batching import Request, answers

        requests = [
            Request(self.tokens, seed_for(self.config, 0, i))
            for i in range(self.config.num_samples)
        ]
        samples: list[dict[str, Any]] = []
        for answer in answers(
            self.model, self.tokenizer, requests, self.config, self.config.batch_size
        ):
            samples.append(answer.as_dict())
            if not self.as_json:
                say(f"sample {answer.index + 1} of {self.config.num_samples}", style="dim")
                print(answer.text, flush=True)
        if self.as_json:
            result("", {"prompt": self.prompt, "samples": samples}, as_json=True)

    def search(self) -> None:
        """Print the likeliest continuation that beams can find."""
        from nope_gpt.generation.beams import beam_search

        found = beam_search(
            self.model,
            self.tokens,
            self.config,
            num_beams=self.config.num_beams,
            length_penalty=self.config.length_penalty,
            stop_tokens=frozenset(self.tokenizer.stop_tokens),
        )
        texts = [
            self.tokenizer.decode_tokens(
                [t for t in item.tokens if t not in self.tokenizer.stop_tokens]
            )
            for item in found
        ]
        value = {
            "prompt": self.prompt,
            "text": texts[0],
            "hypotheses": [
                {"text": text, "log_probability": item.log_probability, "score": item.score}
                for text, item in zip(texts, found, strict=True)
            ],
        }
        result(texts[0], value, self.as_json)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from wherever it was given."""
    if prompt_file is not None:
        return read_text(prompt_file)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return read_text("-")
    return prompt or ""
