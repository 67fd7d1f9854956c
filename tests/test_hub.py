"""Every generation of the published files loads; what is none of them is refused by name."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import SETTINGS, forward, published_tensors, write_published
from safetensors.torch import load_file, save_file
from torch import Tensor

from nope_gpt.errors import MissingError, NetworkError, NopeError
from nope_gpt.hub.locating import INDEX, RANKS, WEIGHTS, is_whole, locate
from nope_gpt.hub.storage import load
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer

MULTI_HEAD = SETTINGS | {"num_kv_heads": 6}


def renamed(tensors: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def joined(tensors: dict[str, Tensor], attention: str, name: str) -> dict[str, Tensor]:
    """q, k and v as one matrix, as in the multi-head generations."""
    result = dict(tensors)
    for key in [key for key in tensors if key.endswith("q_proj.weight")]:
        prefix = key.removesuffix("q_proj.weight")
        parts = [result.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
        result[prefix + name] = torch.cat(parts)
    assert any(attention in key for key in result)
    return result


def generation_b(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = renamed(
        tensors,
        ("decoder.layers.", "body."),
        ("stage1", "attention"),
        ("stage2.linear1", "mlp.layers.0"),
        ("stage2.linear2", "mlp.layers.2"),
        ("token_classifier.norm", "output_norm"),
        ("token_classifier.linear", "output_layer"),
    )
    return joined(names, "attention", "in_proj_weight")


def generation_c(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(generation_b(tensors), ("in_proj_weight", "qkv_proj.weight"))


def generation_d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(
        tensors,
        ("decoder.layers.", "decoder."),
        ("stage1", "attention"),
        ("stage2", "feedforward"),
        ("token_classifier.norm", "output_norm"),
        ("token_classifier.linear", "output_layer"),
    )


def generation_e(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(tensors, ("stage1", "attention"), ("stage2", "feedforward"))


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


EARLY_CONFIG = {"num_heads": 6, "num_layers": 3, "feed_forward_ratio": 2}
EARLY_LEFT_OUT = ("num_q_heads", "num_kv_heads", "num_decoder_layers", "hidden_ratio")


@pytest.mark.parametrize(
    ("settings", "names", "early"),
    [
        pytest.param(MULTI_HEAD, generation_b, True, id="B"),
        pytest.param(MULTI_HEAD, lambda t: prefixed(generation_b(t), "model."), True, id="B'"),
        pytest.param(MULTI_HEAD, generation_c, True, id="C"),
        pytest.param(MULTI_HEAD, lambda t: prefixed(generation_c(t), "model."), True, id="C-hub"),
        pytest.param(SETTINGS, generation_d, False, id="D"),
        pytest.param(SETTINGS, generation_e, False, id="E"),
        pytest.param(SETTINGS, dict, False, id="F"),
        pytest.param(SETTINGS, lambda t: prefixed(t, "_orig_mod."), False, id="F-compiled"),
        pytest.param(
            SETTINGS,
            lambda t: renamed(t, ("token_classifier.linear", "token_embeddings")),
            False,
            id="F-tied-the-other-way",
        ),
        pytest.param(
            SETTINGS,
            lambda t: t | {"token_embeddings.weight": t["token_classifier.linear.weight"].clone()},
            False,
            id="F-stored-twice",
        ),
    ],
)
def test_every_historical_generation_of_names_loads(
    tmp_path: Path, settings: dict[str, Any], names: Any, early: bool
) -> None:
    tensors = published_tensors(settings)
    config = dict(settings)
    if early:
        config = {key: value for key, value in config.items() if key not in EARLY_LEFT_OUT}
        config |= EARLY_CONFIG | {"padding_index": 0, "eos_index": 1, "block_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(names(tensors), tmp_path / "model.safetensors")
    model = NoPEGPT.from_pretrained(tmp_path)
    tokens = torch.arange(30)
    heads = {"num_q_heads": 6, "num_kv_heads": int(settings["num_kv_heads"])}
    expected = forward(tensors, tokens, **heads)
    torch.testing.assert_close(model(tokens[None])[0], expected, rtol=0, atol=1e-5)


def test_a_model_with_positions_is_refused_as_another_network(tmp_path: Path) -> None:
    write_published(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["positional_embeddings.weight"] = torch.zeros(64, 48)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(NopeError, match="it has positional embeddings"):
        NoPEGPT.from_pretrained(tmp_path / "model")


def damaged_tensors(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.layers.1.norm2.weight"), "asks for decoder.layers.1.feed_forw"),
        (lambda t: t.pop("token_classifier.linear.weight"), "the token embedding is missing"),
        (lambda t: t.update({"decoder.layers.0.stage3.weight": torch.ones(2)}), "another network"),
        (
            lambda t: t.update({"decoder.layers.2.norm1.weight": torch.ones(7)}),
            r"has shape \(7,\), and config.json asks for \(48,\)",
        ),
        (
            lambda t: t.update({"token_classifier.norm.weight": torch.ones(48).int()}),
            "holds torch.int32, not weights",
        ),
        (
            lambda t: t.update({"token_embeddings.weight": torch.ones(61, 48)}),
            "must be tied",
        ),
        (
            lambda t: t.update(
                {name.replace("0", "3"): x.clone() for name, x in t.items() if ".0." in name}
            ),
            "config.json has no place for decoder.layers.3",
        ),
    ],
)
def test_tensors_that_are_not_the_network_are_refused_by_name(
    tmp_path: Path, change: Any, message: str
) -> None:
    write_published(tmp_path / "model")
    damaged_tensors(tmp_path / "model", change)
    with pytest.raises(NopeError, match=message):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "is not a table"),
        ("{}", "has no embedding_dimensions: this is not a NoPE GPT"),
        (json.dumps(SETTINGS | {"num_q_heads": 5}), "multiple of --num-q-heads"),
        (json.dumps(SETTINGS | {"embedding_dimensions": -48}), "must be at least 1"),
        (json.dumps(SETTINGS | {"num_decoder_layers": 1e308}), "must be a whole number"),
        (json.dumps(SETTINGS | {"num_decoder_layers": True}), "must be a whole number"),
        (json.dumps(SETTINGS | {"num_decoder_layers": 4000}), "which is not there"),
        ("[" * 100_000, "config.json cannot be read"),
    ],
)
def test_a_config_that_describes_no_network_is_refused(
    tmp_path: Path, config: str, message: str
) -> None:
    write_published(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    with pytest.raises(NopeError, match=message):
        load(tmp_path / "model")


def test_unknown_settings_are_harmless(tmp_path: Path) -> None:
    write_published(tmp_path / "model")
    config = SETTINGS | {"attention_scale": 1.2, "model_type": "nope_gpt"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "model").config.num_decoder_layers == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", pickle.dumps({"weight": 1})])
def test_a_pickle_is_never_opened_as_weights(tmp_path: Path, content: bytes) -> None:
    write_published(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(NopeError, match="not a whole safetensors file"):
        load(tmp_path / "model")


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_weights_cut_short_are_refused(tmp_path: Path, cut: int) -> None:
    write_published(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(NopeError, match="not a whole safetensors file"):
        load(tmp_path / "model")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    write_published(tmp_path / "model")
    model = NoPEGPT.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(NopeError, match=r"norm.weight holds numbers that are not finite"):
        model.save_pretrained(tmp_path / "out")


def test_an_index_of_weights_reads_nothing_outside_of_its_directory(tmp_path: Path) -> None:
    tensors = write_published(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    inside = tmp_path / "model" / "elsewhere.safetensors"
    with pytest.raises(NopeError, match=f"{INDEX} cannot be read.*{re.escape(str(inside))}"):
        load(tmp_path / "model")


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS, "tokenizer.json", RANKS])
def test_a_download_that_lacks_a_file_is_not_whole(tmp_path: Path, missing: str) -> None:
    write_published(tmp_path / "model")
    BaseTokenizer.train(["a text of some variety"], 260).save(tmp_path / "model")
    assert is_whole(tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    assert not is_whole(tmp_path / "model")


@pytest.mark.parametrize("name", ["nothing", "/nothing", "no/such/thing"])
def test_a_name_that_is_no_model_says_what_would_be(name: str) -> None:
    with pytest.raises(MissingError, match="there is no such model") as caught:
        locate(name)
    assert "NoPE-GPT-400M-Chat" in str(caught.value)


def test_what_was_never_downloaded_is_missed_for_want_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="the Hub cannot be reached"):
        locate("org/model", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["runs/tunee", "./runs/tun", "deep/runs/tuen"])
def test_a_model_that_is_not_there_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / Path(name).parent / "tune").mkdir(parents=True)
    with pytest.raises((MissingError, NetworkError)) as caught:
        locate(name)
    assert caught.value.hint == f"did you mean {Path(name).parent / 'tune'}?"
