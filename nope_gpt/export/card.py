"""The model card: facts about an exported model, in the Hub's format."""

from __future__ import annotations

from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

HEAD = """---
library_name: nope-gpt
pipeline_tag: text-generation
tags:
- nope-gpt
- text-generation
---

# {name}

A NoPE GPT {kind}: a decoder-only transformer without positional embeddings.

| | |
|---|---|
| Parameters | {parameters:,} |
| Vocabulary | {vocabulary_size:,} tokens, {encoding} |
| Embedding dimensions | {embedding_dimensions:,} |
| Query / key-value heads | {num_q_heads} / {num_kv_heads} |
| Layers | {num_decoder_layers} |
| Hidden ratio | {hidden_ratio} |
| Trained context length | {context} |
| Weights | {dtype} |

## Use it

```sh
pip install "nope-gpt>=0.2"
nope {command} --model {name}
```

```python
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import {tokenizer}

model = NoPEGPT.from_pretrained("{name}")
tokenizer = {tokenizer}.from_pretrained("{name}")
```

`{name}` is this directory, or the id of the repository that holds it.
"""


def model_card(name: str, model: NoPEGPT, tokenizer: BaseTokenizer) -> str:
    """Describe a model in Markdown."""
    is_chat = isinstance(tokenizer, ChatTokenizer)
    length = model.trained_context_length
    return HEAD.format(
        name=name,
        kind="chat model" if is_chat else "base model",
        command="chat" if is_chat else 'generate "Once upon a time"',
        tokenizer=type(tokenizer).__name__,
        encoding=tokenizer.name,
        parameters=sum(weight.numel() for weight in model.parameters()),
        context=f"{length:,} tokens" if length else "not recorded",
        dtype=str(model.token_embeddings.weight.dtype).removeprefix("torch."),
        **model.config.as_dict(),
    )
