"""First contact with the real Hub: both published models. Run with `make test-online`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

OWNER = "andrewdalpino"

CODE = """
import hashlib, json, sys
import torch
from nope_gpt.hub.locating import locate
from nope_gpt.config import ChatConfig
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, tokenizer_of
name = sys.argv[1]
path = locate(name)
model = NoPEGPT.from_pretrained(name)
tokenizer = tokenizer_of(BaseTokenizer.load(path), model.vocabulary_size)
text = "What is the capital of France?"
message = [{"role": "user", "content": text}]
is_chat = hasattr(tokenizer, "tokenize_prompt")
tokens = tokenizer.tokenize_prompt(message) if is_chat else tokenizer.tokenize(text)
prompt = torch.tensor(tokens)
logits = model(prompt[None])[0, -1]
reply = ""
for token, _ in model.generate(prompt, max_tokens=40, temperature=0):
    if int(token) in tokenizer.stop_tokens:
        break
    reply += tokenizer.decode_single_token(token)
print(json.dumps({
    "config": model.config.as_dict(),
    "files": sorted(file.name for file in path.iterdir()),
    "logits": hashlib.sha256(logits.topk(5).indices.numpy().tobytes()).hexdigest(),
    "finite": bool(torch.isfinite(logits).all()),
    "reply": reply,
}))
"""


@pytest.mark.online
@pytest.mark.parametrize(
    ("name", "rows"), [("NoPE-GPT-400M-Base", 50257), ("NoPE-GPT-400M-Chat", 50261)]
)
def test_a_published_model_loads_and_says_something(name: str, rows: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, f"{OWNER}/{name}"],
        capture_output=True,
        encoding="utf-8",
        env={key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(json.dumps(seen, indent=2, ensure_ascii=False))
    assert seen["config"] == {
        "vocabulary_size": rows,
        "embedding_dimensions": 1280,
        "num_q_heads": 20,
        "num_kv_heads": 5,
        "num_decoder_layers": 20,
        "hidden_ratio": 4,
        "dropout": seen["config"]["dropout"],
    }
    assert seen["finite"]
    assert len(seen["logits"]) == hashlib.sha256().digest_size * 2
    assert seen["reply"].strip()
