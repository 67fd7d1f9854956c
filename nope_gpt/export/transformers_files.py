"""The same network for transformers: as an Arcee, or as a Llama for what knows no Arcee."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nope_gpt.config import ChatConfig, GenerateConfig
from nope_gpt.export.chat_template import jinja
from nope_gpt.export.hub_files import LARGEST_FILE
from nope_gpt.export.source import Source
from nope_gpt.files.writing import write_file, write_json
from nope_gpt.hub import storage, transformers_layout
from nope_gpt.hub.locating import CONFIG, TOKENIZER
from nope_gpt.tokenization.byte_pairs import tokenizer_json
from nope_gpt.tokenization.encodings import END_OF_TEXT

TEMPLATE = "chat_template.jinja"


def write(directory: Path, source: Source, layout: str) -> None:
    """Write the model, its tokenizer, and how it is meant to be run.

    config.json is written here and not by transformers, which leaves out the spelling of the
    rotation's scaling that MLX-LM reads.
    """
    config = source.saved.config
    settings = transformers_layout.settings(
        config,
        layout,
        dtype=str(source.dtype).removeprefix("torch."),
        context_length=source.context_length,
        trained_context_length=source.saved.trained_context_length,
        first_token=source.saved.first_token,
        ends=source.ends,
        pad=source.tokenizer.pad_token,
    )
    tensors = transformers_layout.to_layout(source.saved.state, layout, config.num_decoder_layers)
    storage.write_weights(directory, tensors, {"format": "pt"}, LARGEST_FILE)
    write_json(directory / CONFIG, settings)
    write_json(directory / "generation_config.json", generation_settings(source))
    write_tokenizer(directory, source)


def write_tokenizer(directory: Path, source: Source) -> None:
    """Write the tokenizer, and for a chat model the template."""
    encoding = source.tokenizer.encoding
    document = tokenizer_json(
        source.tokenizer.ranks,
        encoding._pat_str,
        source.special_tokens,
        source.plain_tokens,
        source.saved.first_token,
    )
    write_json(directory / TOKENIZER, document)
    if source.is_chat:
        write_file(directory / TEMPLATE, jinja(source.special_tokens).encode())
    texts = {id: text for text, id in source.special_tokens.items()}
    first = source.saved.first_token
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.context_length,
        "bos_token": None if first is None else texts.get(first),
        "eos_token": "<|im_end|>" if source.is_chat else END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", settings)


def generation_settings(source: Source) -> dict[str, Any]:
    """How `nope chat` or `nope generate` would draw, but for the penalty that is ours alone."""
    sampling = ChatConfig() if source.is_chat else GenerateConfig()
    return {
        "eos_token_id": source.ends,
        "pad_token_id": source.tokenizer.pad_token,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
