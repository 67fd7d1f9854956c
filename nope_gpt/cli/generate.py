"""`nope generate`."""

from __future__ import annotations

import sys
from pathlib import Path

from nope_gpt.cli.options import JSON, argument, configured, option
from nope_gpt.cli.terminal import result, say
from nope_gpt.config import GenerateConfig
from nope_gpt.errors import MissingError, NopeError

PROMPT = argument(
    "prompt",
    str | None,
    "The text to continue; `-` or nothing reads standard input, if something is piped in.",
    default=None,
    metavar="[PROMPT]",
)
PROMPT_FILE = option("prompt_file", str | None, "Read the prompt from a file.", metavar="FILE")


@configured(GenerateConfig, PROMPT, PROMPT_FILE, JSON)
def command(
    config: GenerateConfig,
    prompt: str | None,
    prompt_file: str | None,
    json: bool,
) -> None:
    """Continue a text, streaming; without a prompt, begin one.

    The text goes to stdout, the statistics to stderr.

    Examples:

    - `nope generate "The garbage collector" --model runs/pretrain`

    - `cat question.txt | nope generate --model runs/pretrain --temperature 0`
    """
    text = read_prompt(prompt, prompt_file)
    from nope_gpt.chat import TextStream
    from nope_gpt.cli.loading import open_model
    from nope_gpt.cli.writing import write_stream

    model, tokenizer = open_model(config, "generate")
    tokens = tokenizer.tokenize(text) or [tokenizer.end_of_text]
    if len(tokens) > config.context_length:
        say(
            f"note: the prompt has {len(tokens):,} tokens, and only the last "
            f"{config.context_length:,} are read (--context-length)"
        )
    stream = TextStream(model, tokenizer, tokens, config)
    try:
        if json:
            written = "".join(piece.text for piece in stream)
            value = {"prompt": text, "text": written, **vars(stream.statistics)}
            result(written, value, as_json=True)
        else:
            write_stream(stream, config.colorize_tokens)
            sys.stdout.write("\n")
    finally:
        if not json:
            say(str(stream.statistics), style="dim")


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from wherever it was given."""
    if prompt_file is not None:
        try:
            return Path(prompt_file).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MissingError("there is no such prompt file", where=prompt_file) from None
        except (OSError, UnicodeDecodeError) as error:
            raise NopeError(f"the prompt cannot be read: {error}", where=prompt_file) from None
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise NopeError(f"the prompt is not UTF-8: {error}", where="standard input") from None
    return prompt or ""
