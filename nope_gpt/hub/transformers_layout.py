"""The layouts of transformers: the same network as an Arcee, or as a Llama.

Both rotate queries and keys; the settings here divide every frequency by 1e30, so that nothing
turns: the cosine of any angle is 1 exactly. An Arcee has our MLP as it is. A Llama multiplies by a
second matrix, `up_proj`, which is zero here, with a bias of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nope_gpt.config import ModelConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.files.json_files import DAMAGE
from nope_gpt.hub.published_layout import FIRST_TOKEN, TIED
from nope_gpt.network.blocks import NORM_EPSILON
from nope_gpt.network.sharpening import SETTING

ARCEE = "arcee"
LLAMA = "llama"
MODEL_TYPES = (ARCEE, LLAMA)

MATRICES = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""The matrices of a block, ours and those of an Arcee."""

NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

FACTOR = 1e30
"""What every frequency is divided by."""

UNTURNED = {
    "rope_type": "llama3",
    "factor": FACTOR,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1,
}
"""Llama 3's scaling of frequencies, as of a model that was trained on one token. It alone is
exact everywhere: the linear one makes vLLM fill a table of a million entries for each position."""


def names(layout: str, num_layers: int) -> dict[str, str]:
    """The name of every tensor in memory, and in a layout."""
    result = {TIED: EMBEDDING, "norm.weight": "model.norm.weight"}
    gated = {"feed_forward.up": "mlp.gate_proj"} if layout == LLAMA else {}
    for layer in range(num_layers):
        for ours, theirs in (MATRICES | NORMS | gated).items():
            result[f"decoder.layers.{layer}.{ours}.weight"] = (
                f"model.layers.{layer}.{theirs}.weight"
            )
    return result


def settings(
    config: ModelConfig,
    layout: str,
    *,
    dtype: str,
    context_length: int,
    trained_context_length: int | None,
    first_token: int | None = None,
    ends: list[int],
    pad: int,
) -> dict[str, Any]:
    """The config.json of a layout.

    Args:
        config: The network.
        layout: `ARCEE` or `LLAMA`.
        dtype: Of the weights, such as "bfloat16".
        context_length: Tokens that a program may plan for.
        trained_context_length: Tokens of context that it was trained on, if known.
        first_token: What everything begins with that it reads, if it was trained so.
        ends: Tokens that end a text or an answer, the usual one first.
        pad: Token to fill up with.
    """
    architecture = "LlamaForCausalLM" if layout == LLAMA else "TransformersForCausalLM"
    rope = {"rope_theta": 10000.0, **UNTURNED}
    result = {
        # vLLM and llama.cpp take an Arcee's activation to be another one; by this name they run
        # transformers' own code, or refuse.
        "architectures": [architecture],
        "model_type": layout,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.embedding_dimensions,
        "intermediate_size": config.hidden_dimensions,
        "num_hidden_layers": config.num_decoder_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dimensions,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPSILON,
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "mlp_bias": layout == LLAMA,
        "tie_word_embeddings": True,
        "max_position_embeddings": context_length,
        "rope_parameters": rope,
        # The older spelling, which MLX-LM reads: without it it rotates.
        "rope_scaling": UNTURNED,
        "rope_theta": 10000.0,
        "bos_token_id": first_token,
        "eos_token_id": ends[0],
        "pad_token_id": pad,
        "use_cache": True,
    }
    if trained_context_length is not None:
        result["trained_context_length"] = trained_context_length
    if first_token is not None:
        result[FIRST_TOKEN] = first_token
    return result


def to_layout(state: Mapping[str, Tensor], layout: str, num_layers: int) -> dict[str, Tensor]:
    """Give tensors the names of a layout, and add what it asks for."""
    result = {theirs: state[ours] for ours, theirs in names(layout, num_layers).items()}
    if layout == LLAMA:
        for layer in range(num_layers):
            prefix = f"model.layers.{layer}.mlp."
            gate, down = result[f"{prefix}gate_proj.weight"], result[f"{prefix}down_proj.weight"]
            result[f"{prefix}up_proj.weight"] = torch.zeros_like(gate)
            result[f"{prefix}up_proj.bias"] = gate.new_ones(gate.size(0))
            result[f"{prefix}gate_proj.bias"] = gate.new_zeros(gate.size(0))
            result[f"{prefix}down_proj.bias"] = down.new_zeros(down.size(0))
    return result


def own_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a NoPE GPT that a config.json of these layouts describes.

    Raises:
        NopeError: It describes another network: one that rotates, or with another activation.
    """
    layout = str(config["model_type"])
    try:
        refuse_other_network(config, layout, where)
        shape = {
            "embedding_dimensions": config["hidden_size"],
            "num_q_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_key_value_heads"],
            "num_decoder_layers": config["num_hidden_layers"],
            "hidden_ratio": config["intermediate_size"] // config["hidden_size"],
            "dropout": float(config.get("attention_dropout") or 0.0),
        }
        ModelConfig(**shape)
    except (*DAMAGE, UsageError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"config.json describes no network ({reason})", where=where) from None
    kept = ("trained_context_length", FIRST_TOKEN, SETTING)
    return shape | {name: config[name] for name in kept if config.get(name) is not None}


def from_layout(
    tensors: Mapping[str, Tensor], layout: str, num_layers: int, where: str
) -> dict[str, Tensor]:
    """The tensors of a NoPE GPT in one of these layouts, by the names they have in memory.

    Raises:
        NopeError: They are of another network, or one is missing.
    """
    rest = dict(tensors)
    head = rest.pop(HEAD, None)
    if head is not None and not torch.equal(head, rest.get(EMBEDDING, head)):
        raise NopeError("the embedding and the head differ, and must be tied", where=where)
    state = {}
    for ours, theirs in names(layout, num_layers).items():
        if theirs not in rest:
            raise NopeError(f"config.json asks for {theirs}, which is not there", where=where)
        state[ours] = rest.pop(theirs)
    for name, tensor in rest.items():
        refuse_more(name, tensor, layout, where)
    return state


def refuse_other_network(config: Mapping[str, Any], layout: str, where: str) -> None:
    """Refuse a network of this kind that computes something else.

    Raises:
        NopeError: It does; says what.
    """
    complaints = {
        "it rotates queries and keys by their positions": turns(config),
        f"its activation is {config['hidden_act']}": config["hidden_act"] != "silu",
        "its attention has biases": bool(config.get("attention_bias")),
        "its head is not its embedding": not config.get("tie_word_embeddings"),
        f"its norms add {config['rms_norm_eps']}": not math.isclose(
            config["rms_norm_eps"], NORM_EPSILON, rel_tol=1e-6
        ),
        "its MLP has no biases": layout == LLAMA and not config.get("mlp_bias"),
    }
    for complaint, holds in complaints.items():
        if holds:
            name = layout.capitalize()
            raise NopeError(
                f"this {name} is another network than NoPE GPT: {complaint}", where=where
            )


def turns(config: Mapping[str, Any]) -> bool:
    """Whether queries and keys are turned by an angle that can be seen."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "llama3" or not rope["factor"] >= FACTOR:
        return True
    # With such a base every wavelength is 2 pi or more; those beyond this one are stretched.
    base = rope.get("rope_theta", config.get("rope_theta", 0.0))
    longest = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    return bool(base < 1 or longest >= 2 * math.pi)


def refuse_more(name: str, tensor: Tensor, layout: str, where: str) -> None:
    """Refuse a tensor that does something, but for what a Llama needs to do nothing.

    Raises:
        NopeError: It does something.
    """
    part = re.sub(r"^model\.layers\.\d+\.mlp\.", "", name)
    neutral = {"up_proj.weight": 0, "up_proj.bias": 1, "gate_proj.bias": 0, "down_proj.bias": 0}
    if layout == LLAMA and part in neutral and bool((tensor == neutral[part]).all()):
        return
    raise NopeError(f"this is another network than NoPE GPT: {name} does something", where=where)
