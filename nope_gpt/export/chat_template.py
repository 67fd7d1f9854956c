"""The chat template for other programs: what `ChatTokenizer` writes, in their languages.

They write a conversation as one text and then look for control tokens in it, so a user could type
one. The template in Jinja puts a blank into each, which makes it text.
"""

from __future__ import annotations

from pathlib import Path

JINJA = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
"""With `messages`, `tools` and `add_generation_prompt`, as transformers gives them."""

GO = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}\n<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n"
)
"""For Ollama, which has no way to take control tokens out of what users type."""
