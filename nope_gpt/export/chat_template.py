"""The chat template for other programs: what `ChatTokenizer` writes, in their languages.

They write a conversation as one text and then look for control tokens in it, so a user could type
one. The template in Jinja puts a blank into each, which makes it text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

GO = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}\n<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n"
)
"""For Ollama, which has no way to take control tokens out of what users type."""


def jinja(special_tokens: Iterable[str]) -> str:
    """The template, with `messages`, `tools` and `add_generation_prompt`, as transformers has it.

    Args:
        special_tokens: That other programs look for in a text.
    """
    lines = []
    for token in special_tokens:
        broken = f"{token[:-2]} {token[-2:]}"
        split, join = json.dumps(token), json.dumps(broken)
        lines.append(f"    {{%- set text = text.split({split}) | join({join}) -%}}\n")
    return SOURCE.replace("    {#- SPECIAL TOKENS -#}\n", "".join(lines))
