"""How an exported model is run in the tools that its format is for, as its card says it."""

from __future__ import annotations

from pathlib import Path

from nope_gpt.export.source import Source


def code(language: str, *lines: str) -> str:
    """A block of code."""
    return "\n".join([f"```{language}", *lines, "```"])


def own_use(name: str, source: Source) -> str:
    """The line of this program's."""
    verb = "chat" if source.is_chat else 'generate "Once upon a time"'
    return code("sh", "pip install 'nope-gpt>=0.2'", f"nope {verb} --model {name}")


def use_hub(name: str, source: Source, _: Path) -> list[str]:
    """In this package, old and new."""
    tokenizer = type(source.tokenizer).__name__
    return [
        own_use(name, source),
        code(
            "python",
            "from nope_gpt.model import NoPEGPT",
            f"from nope_gpt.tokenization import {tokenizer}",
            "",
            f'model = NoPEGPT.from_pretrained("{name}")',
            f'tokenizer = {tokenizer}.from_pretrained("{name}")',
        ),
    ]


def use_transformers(name: str, source: Source, _: Path) -> list[str]:
    """In transformers, and in vLLM and SGLang through it."""
    prompt = '[{"role": "user", "content": "Hello!"}]' if source.is_chat else '"Once upon a time"'
    return [
        "No code of ours is needed: to transformers the network is an Arcee that does not turn "
        "its queries and keys.",
        code(
            "python",
            "from transformers import pipeline",
            "",
            f'answer = pipeline("text-generation", model="{name}")',
            f"print(answer({prompt}, max_new_tokens=100))",
        ),
        "vLLM and SGLang run it through transformers; for vLLM the llama format is faster:",
        code(
            "sh",
            f"vllm serve {name}",
            f"python -m sglang.launch_server --model-path {name} --model-impl transformers",
        ),
        "It is also a model of this package's:",
        own_use(name, source),
    ]


def use_llama(name: str, source: Source, _: Path) -> list[str]:
    """In vLLM and MLX-LM."""
    return [
        "For vLLM and MLX-LM, to whom the network is a Llama that does not turn its queries and "
        "keys, with one more matrix of zeros in each MLP. **Not for SGLang**, which leaves the "
        "MLP's biases out without a word: give it the transformers format.",
        code("sh", f"vllm serve {name}", f"mlx_lm.generate --model {name} --prompt 'Hello!'"),
        "It is also a model of transformers' and of this package's:",
        own_use(name, source),
    ]


def use_gguf(name: str, source: Source, directory: Path) -> list[str]:
    """In llama.cpp, Ollama and LM Studio."""
    files = [path.name for path in sorted(directory.glob("*.gguf"))]
    title = name.lower().replace("/", "-")
    mode = "" if source.is_chat else " -no-cnv"
    return [
        code(
            "sh",
            f"llama-cli -m {name}/{files[0]}{mode} -p 'Hello!'",
            f"llama-server -m {name}/{files[0]} --jinja",
            f"cd {name} && ollama create {title} -f Modelfile && ollama run {title}",
        ),
        "LM Studio finds it in its models' directory. Files: "
        + ", ".join(f"`{file}`" for file in files)
        + ".",
    ]
