"""What the pages say: their code, the commands in it, and whether the command line takes them."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from test_cli import CONFIGS

from nope_gpt.cli import app
from nope_gpt.cli.options import implied_layers, normalize, preset_layers
from nope_gpt.config import PRESETS
from nope_gpt.config.knobs import resolve

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("guides/*.md"))]
"""Where commands are taken at their word."""

OTHERS = set(
    "cat export hf llama-server lm_eval mlx_lm.generate ollama pip printf sbatch scontrol "
    "tensorboard vllm zcat cd done for".split()
)
"""Programs that are not ours, and words of the shell, that a block may hold."""

OTHER_MODULES = {"llama_cpp.server", "sglang.launch_server", "venv"}

HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?\n\1$", re.DOTALL | re.MULTILINE)
GROUP = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the line that it begins after."""

    page: Path
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    """Those of a language, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text[: match.start()].count("\n") + 1, match[1]) for match in found]


def lines(script: str) -> list[str]:
    """The lines of a script as the shell reads them: joined, without comments and documents."""
    joined = HEREDOC.sub("", script).replace("\\\n", " ")
    return [line for line in map(str.strip, joined.splitlines()) if line and line[0] != "#"]


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, each as its words; variables have the value 1."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    words: list[str] = []
    skips = False
    for word in [*lexer, ";"]:
        if set(word) <= set("<>"):
            skips = True
        elif set(word) <= set(";|&"):
            if words := unwrapped(words):
                yield words
            words = []
        elif skips:
            skips = False
        else:
            words.append(re.sub(r"\$\{?\w+\}?", "1", word))


def unwrapped(words: list[str]) -> list[str]:
    """A command without what only starts it: `do`, assignments, srun, the path of a bin."""
    while words and (words[0] in ("do", "srun") or re.match(r"\w+=", words[0])):
        words = words[1:]
    return [Path(words[0]).name, *words[1:]] if words else []


def nope_words(words: list[str]) -> list[str] | None:
    """What a command gives to `nope`, if it is one of ours."""
    if words[0] == "nope":
        return words[1:]
    if "nope_gpt.cli" in words and words[0] in ("torchrun", "python"):
        return words[words.index("nope_gpt.cli") + 1 :]
    return None


def check(words: list[str]) -> None:
    """Fail unless a command is one that there is.

    Raises:
        Exception: The command line refuses it.
        AssertionError: It is none that is known here.
    """
    ours = nope_words(words)
    if ours is not None:
        understand(ours)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
    elif words[0] in ("python", "python3") and words[1] != "-m":
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert not [flag for flag in flags if f'"{flag}"' not in script], words
    elif words[0] in ("python", "python3"):
        assert words[2] in OTHER_MODULES, words
    else:
        assert words[0] in OTHERS, words


def understand(words: list[str]) -> None:
    """Parse a command line as `nope` does, down to its settings.

    Raises:
        Exception: It is refused.
    """
    name, *arguments = normalize(words) or ["--help"]
    if name.startswith("-") or "--help" in arguments:
        return
    assert name in GROUP.commands, f"there is no command {name}"
    values = dict(GROUP.commands[name].make_context(name, arguments).params)
    if name not in CONFIGS:
        return
    config = CONFIGS[name]
    layers = preset_layers(values, PRESETS.get(config, {}))
    names = [field.name for field in dataclasses.fields(config)]
    given = {key: values[key] for key in names if values[key] not in (None, [], ())}
    layers.append(("the command line", given))
    resolve(config, implied_layers(config, layers) + layers)
