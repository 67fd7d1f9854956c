"""One file for llama.cpp, Ollama and LM Studio: the architecture is `llama`, and nothing turns.

llama.cpp has no plain MLP with SiLU. A mixture of one expert without a gate is one, with no weight
more: its router's softmax over one expert is 1. `--dense` writes a gated MLP whose other factor is
1 instead, a matrix of zeros and a bias of ones.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_gpt.config import ExportConfig, ModelConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.export.chat_template import GO, jinja
from nope_gpt.export.llama_cpp import QUANTIZER, find_quantizer, quantizations, quantize
from nope_gpt.export.source import Source
from nope_gpt.files.writing import write_file, writing
from nope_gpt.hub.published_layout import TIED
from nope_gpt.hub.storage import SavedModel
from nope_gpt.hub.transformers_layout import FACTOR
from nope_gpt.network.blocks import NORM_EPSILON
from nope_gpt.tokenization.byte_pairs import merges, spelled, splits_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

INSTALL = "pip install 'nope-gpt[gguf]'"

OWN_QUANTIZATIONS = ("q8_0",)
"""Written here; others are left to llama.cpp."""

NAMES = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.out_proj": "attn_output",
    "feed_forward_norm": "ffn_norm",
}
EXPERTS = {"feed_forward.up": "ffn_up_exps", "feed_forward.down": "ffn_down_exps"}
GATED = {"feed_forward.up": "ffn_gate", "feed_forward.down": "ffn_down"}
ROUTER = "ffn_gate_inp"

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""llama.cpp's types of tokens."""


def names(num_layers: int, *, dense: bool) -> dict[str, str]:
    """The name of every tensor in memory, and in the file."""
    result = {TIED: "token_embd.weight", "norm.weight": "output_norm.weight"}
    for layer in range(num_layers):
        for ours, theirs in (NAMES | (GATED if dense else EXPERTS)).items():
            result[f"decoder.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return result


def refuse_impossible(source: Source, config: ExportConfig) -> None:
    """Refuse what cannot be written here, before anything is.

    Raises:
        NopeError: A library is missing; names it.
        UsageError: There is no such quantization.
    """
    if importlib.util.find_spec("gguf") is None:
        raise NopeError("--format gguf needs the gguf library", hint=INSTALL)
    if splits_of(source.tokenizer.encoding._pat_str)[1] is None:
        raise UsageError(
            f"llama.cpp has no way to cut text into words as {source.tokenizer.name} does",
            hint="--format transformers",
        )
    known = [*OWN_QUANTIZATIONS, *quantizations()]
    for name in config.quantizations:
        if name not in known:
            raise UsageError(f"--quantize is {name}, and must be of {', '.join(known)}")
        if name not in OWN_QUANTIZATIONS and find_quantizer() is None:
            raise NopeError(f"--quantize {name} needs llama.cpp's own quantizer", hint=QUANTIZER)


def write(directory: Path, source: Source, config: ExportConfig) -> list[tuple[Path, str]]:
    """Write a file for each quantization, or one in the dtype, and a Modelfile for Ollama.

    Returns:
        The files of weights, each with what its matrices are kept in.
    """
    stem = source.name
    plain = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[source.dtype]
    wanted = config.quantizations or [plain]
    files = {name: directory / f"{stem}-{name}.gguf" for name in wanted}
    theirs = [name for name in wanted if name not in (plain, *OWN_QUANTIZATIONS)]
    whole = files.get(plain, directory / f"{stem}-{plain}.gguf")
    if plain in wanted or theirs:
        write_gguf(whole, source, plain, dense=config.dense)
    for name, path in files.items():
        if name in OWN_QUANTIZATIONS:
            write_gguf(path, source, name, dense=config.dense)
        elif name in theirs:
            quantize(whole, path, name)
    if plain not in wanted:
        whole.unlink(missing_ok=True)
    write_file(directory / "Modelfile", modelfile(next(iter(files.values())).name, source).encode())
    return [(path, name) for name, path in files.items()]


def write_gguf(path: Path, source: Source, kind: str, *, dense: bool) -> None:
    """Write one file.

    Args:
        path: Of it.
        source: What to write.
        kind: What matrices are kept in: f32, f16, bf16 or q8_0.
        dense: Whether the MLP is a gated one rather than an expert.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    quantization = GGMLQuantizationType[kind.upper()]
    writer = GGUFWriter(path, "llama")
    writer.add_name(source.name)
    if source.license:
        writer.add_license(source.license)
    write_settings(writer, source.saved.config, source.context_length, dense=dense)
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[file_type])
    write_vocabulary(writer, source)
    if source.is_chat:
        writer.add_chat_template(jinja(source.special_tokens))
    write_tensors(writer, source.saved, quantization, dense=dense)
    with writing(path):
        finish(writer)


def finish(writer: GGUFWriter) -> None:
    """Write everything into the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_settings(
    writer: GGUFWriter, config: ModelConfig, context_length: int, *, dense: bool
) -> None:
    """Write the shape of the network, and the tokens of context that may be planned for."""
    writer.add_vocab_size(config.vocabulary_size)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.embedding_dimensions)
    writer.add_block_count(config.num_decoder_layers)
    writer.add_feed_forward_length(config.hidden_dimensions)
    writer.add_head_count(config.num_q_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dimensions)
    writer.add_value_length(config.head_dimensions)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_rope_dimension_count(config.head_dimensions)
    writer.add_rope_freq_base(10000.0)
    if not dense:
        writer.add_expert_count(1)
        writer.add_expert_used_count(1)


def write_vocabulary(writer: GGUFWriter, source: Source) -> None:
    """Write the tokens, how they merge, and which of them end a text."""
    size = source.saved.config.vocabulary_size
    tokens = [f"<|unused_{id}|>" for id in range(size)]
    types = [UNUSED] * size
    for token, rank in source.tokenizer.ranks.items():
        tokens[rank], types[rank] = spelled(token), NORMAL
    for text, id in source.plain_tokens.items():
        tokens[id], types[id] = text, NORMAL  # Nothing merges to it.
    for text, id in source.special_tokens.items():
        tokens[id], types[id] = text, CONTROL
    pairs = [f"{spelled(left)} {spelled(right)}" for left, right in merges(source.tokenizer.ranks)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(splits_of(source.tokenizer.encoding._pat_str)[1]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # Of bytes nothing merges, and llama.cpp asks for a list: of these two, nothing is a token.
    writer.add_token_merges(pairs or [f"{tokens[0]}{tokens[0]} {tokens[0]}"])
    writer.add_eos_token_id(source.ends[0])
    writer.add_eot_token_id(source.ends[0])
    writer.add_pad_token_id(source.tokenizer.pad_token)
    first = source.saved.first_token
    # Named even where it is never added, or llama.cpp takes another's.
    writer.add_bos_token_id(source.tokenizer.end_of_text if first is None else first)
    writer.add_add_bos_token(first is not None)
    writer.add_add_eos_token(False)


def write_tensors(
    writer: GGUFWriter, saved: SavedModel, kind: GGMLQuantizationType, *, dense: bool
) -> None:
    """Write the weights; what has one dimension stays in float32."""
    from gguf import GGMLQuantizationType

    config = saved.config
    f32 = GGMLQuantizationType.F32
    for ours, theirs in names(config.num_decoder_layers, dense=dense).items():
        tensor = saved.state[ours].detach()
        expert = tensor[None] if "_exps" in theirs else tensor
        add(writer, theirs, expert, f32 if tensor.dim() == 1 else kind)
    width, hidden = config.embedding_dimensions, config.hidden_dimensions
    for layer in range(config.num_decoder_layers):
        if dense:
            add(writer, f"blk.{layer}.ffn_up.weight", torch.zeros(hidden, width), kind)
            add(writer, f"blk.{layer}.ffn_up.bias", torch.ones(hidden), f32)
        else:
            add(writer, f"blk.{layer}.{ROUTER}.weight", torch.zeros(1, width), f32)
    add(writer, "rope_freqs.weight", torch.full((config.head_dimensions // 2,), FACTOR), f32)


def add(writer: GGUFWriter, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> None:
    """Write a tensor as a kind, or in float16 where its rows do not fill that kind's blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize as quantized

    if tensor.size(-1) % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16
    content: NDArray[Any] = tensor.float().contiguous().numpy()
    if kind == GGMLQuantizationType.F16:
        writer.add_tensor(name, content.astype(np.float16))
    elif kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, content)
    else:
        writer.add_tensor(name, quantized(content, kind), raw_dtype=kind)


def modelfile(name: str, source: Source) -> str:
    """How Ollama is to run a file."""
    lines = [f"FROM ./{name}", f"PARAMETER num_ctx {source.context_length}"]
    if source.is_chat:
        lines += ['PARAMETER stop "<|im_end|>"', f'TEMPLATE """{GO}"""']
    else:
        lines += ['TEMPLATE "{{ .Prompt }}"']
    return "\n".join(lines) + "\n"
