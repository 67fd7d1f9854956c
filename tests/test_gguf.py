"""The GGUF file holds the model: seen by an own reader, and by llama.cpp where it is installed.

`make test-llama` installs llama.cpp, which compiles for minutes, and runs what asks for it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
import torch
from reference import SETTINGS, forward, published_tensors
from test_export import CORPUS, ENCODINGS, SPECIAL, both_tokenizers, exported, sharp, source_of

from nope_gpt.config import ExportConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.export import formats, gguf_files, parity
from nope_gpt.export.chat_template import jinja
from nope_gpt.export.exporting import export
from nope_gpt.export.formats import FORMATS
from nope_gpt.export.gguf_reader import GgufReader
from nope_gpt.export.llama_cpp import LlamaCppReader
from nope_gpt.export.source import Source
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

Nope = Callable[..., subprocess.CompletedProcess[str]]

SHAPE = {"embedding_dimensions": 64, "num_q_heads": 4, "num_kv_heads": 2, "hidden_ratio": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A chat model over bytes whose attention is sharp."""
    return sharp(tmp_path / "model", vocabulary_size=261, tokenizer="bytes", **SHAPE)


@pytest.fixture
def own_model(tmp_path: Path) -> tuple[Path, ChatTokenizer]:
    """The same over a vocabulary of its own."""
    tokenizer = ChatTokenizer(BaseTokenizer.train(CORPUS, 300).encoding)
    path = sharp(tmp_path / "own", vocabulary_size=tokenizer.vocabulary_size, **SHAPE)
    tokenizer.save(path)
    return path, tokenizer


def file_of(model: Path, place: Path, **changes: Any) -> Path:
    (path,) = exported(model, "gguf", place, **changes).glob("*.gguf")
    return path


def published_from(tensors: dict[str, Any], mlp: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file under their published names, written down here once more."""
    names = {
        "token_embd.weight": "token_classifier.linear.weight",
        "output_norm.weight": "token_classifier.norm.weight",
    }
    for layer in range(SETTINGS["num_decoder_layers"]):
        for theirs, published in {
            "attn_norm": "norm1",
            "attn_q": "stage1.q_proj",
            "attn_k": "stage1.k_proj",
            "attn_v": "stage1.v_proj",
            "attn_output": "stage1.out_proj",
            "ffn_norm": "norm2",
            mlp[0]: "stage2.linear1",
            mlp[1]: "stage2.linear2",
        }.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"decoder.layers.{layer}.{published}.weight"
    return {
        ours: torch.from_numpy(tensors.pop(theirs)).squeeze(0) for theirs, ours in names.items()
    }


@pytest.mark.parametrize("dense", [False, True])
def test_the_file_holds_the_tensors_and_what_does_nothing(
    model: Path, tmp_path: Path, dense: bool
) -> None:
    settings, tensors = gguf_file.read(file_of(model, tmp_path / "out", dense=dense))
    mlp = ("ffn_gate", "ffn_down") if dense else ("ffn_up_exps", "ffn_down_exps")
    found = published_from(tensors, mlp)
    tokens = torch.randint(261, (40,), generator=torch.Generator().manual_seed(3))
    ours = NoPEGPT.from_pretrained(model)(tokens[None])[0].detach()
    theirs = forward(found, tokens, num_q_heads=4, num_kv_heads=2)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    assert set(found) == set(published_tensors(SETTINGS | SHAPE))
    assert np.array_equal(tensors.pop("rope_freqs.weight"), np.full(8, 1e30, np.float32))
    for layer in range(3):
        if dense:
            assert not tensors.pop(f"blk.{layer}.ffn_up.weight").any()
            assert (tensors.pop(f"blk.{layer}.ffn_up.bias") == 1).all()
        else:
            assert not tensors.pop(f"blk.{layer}.ffn_gate_inp.weight").any()
    assert tensors == {}
    experts = {"llama.expert_count": 1, "llama.expert_used_count": 1}
    assert {name: settings.get(name) for name in experts} == (
        dict.fromkeys(experts) if dense else experts
    )


def test_the_files_settings_are_the_networks(model: Path, tmp_path: Path) -> None:
    path = file_of(model, tmp_path / "out", context_length=777, license="mit")
    settings, _ = gguf_file.read(path)
    shape = {
        "vocab_size": 261,
        "context_length": 777,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }
    assert {name: settings[f"llama.{name}"] for name in shape} == shape
    epsilon = settings["llama.attention.layer_norm_rms_epsilon"]
    assert np.float32(epsilon) == np.finfo(np.float32).eps
    assert settings["general.architecture"] == "llama"
    assert settings["general.license"] == "mit"
    assert "tokenizer.ggml.add_space_prefix" not in settings


def test_the_files_vocabulary_is_the_tokenizers(
    own_model: tuple[Path, ChatTokenizer], tmp_path: Path
) -> None:
    path, tokenizer = own_model
    settings, _ = gguf_file.read(file_of(path, tmp_path / "out"))
    ours = {name.removeprefix("tokenizer.ggml."): value for name, value in settings.items()}
    assert (ours["model"], ours["pre"]) == ("gpt2", "gpt-2")
    assert len(ours["tokens"]) == 304
    assert ours["tokens"][299:] == ["<|endoftext|>", *tokenizer.control_tokens]
    assert ours["token_type"] == [1] * 299 + [3, 3, 3, 1, 1]
    assert (ours["eos_token_id"], ours["eot_token_id"], ours["padding_token_id"]) == (301, 301, 299)
    assert (ours["add_bos_token"], ours["add_eos_token"]) == (False, False)
    assert len(ours["merges"]) == 299 - 256
    assert settings["tokenizer.chat_template"] == jinja(SPECIAL)


@pytest.mark.parametrize(
    ("kind", "largest"), [("float16", 2**-10), ("bfloat16", 2**-7), ("q8_0", 2**-6)]
)
def test_rounded_files_hold_the_nearest_numbers(
    model: Path, tmp_path: Path, kind: str, largest: float
) -> None:
    changes = {"quantize": kind} if kind == "q8_0" else {"dtype": kind}
    path = file_of(model, tmp_path / "out", **changes)
    assert (
        path.name
        == {"float16": "model-f16", "bfloat16": "model-bf16"}.get(kind, "model-q8_0") + ".gguf"
    )
    _, tensors = gguf_file.read(path)
    found = published_from(tensors, ("ffn_up_exps", "ffn_down_exps"))
    right = NoPEGPT.from_pretrained(model).decoder.layers[1].feed_forward.down.weight.detach()
    error = (found["decoder.layers.1.stage2.linear2.weight"] - right).abs().max()
    assert 0 < error <= largest * right.abs().max()
    norm = found["token_classifier.norm.weight"]
    dtype = torch.float32 if kind == "q8_0" else getattr(torch, kind)
    expected = NoPEGPT.from_pretrained(model).norm.weight.to(dtype).float()
    assert torch.equal(norm, expected.detach()), "norms are never rounded further"


def test_several_quantizations_make_a_file_each_and_none_other(model: Path, tmp_path: Path) -> None:
    place = exported(model, "gguf", tmp_path / "out", quantize="q8_0")
    names = sorted(path.name for path in place.iterdir())
    assert names == ["Modelfile", "README.md", "model-q8_0.gguf", "parity.json"]


def test_ollama_is_told_the_template_and_where_to_stop(model: Path, tmp_path: Path) -> None:
    text = (exported(model, "gguf", tmp_path / "out") / "Modelfile").read_text()
    assert text.startswith(
        'FROM ./model-f32.gguf\nPARAMETER num_ctx 8192\nPARAMETER stop "<|im_end|>"'
    )
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}\n<|im_end|>\n" in text


def swapped(path: Path) -> None:
    from gguf import GGUFReader

    file = GGUFReader(path, "r+")
    first, second = (
        next(tensor for tensor in file.tensors if tensor.name == f"blk.{layer}.attn_q.weight")
        for layer in (0, 1)
    )
    kept = first.data.copy()
    first.data[:] = second.data
    second.data[:] = kept


def turning(path: Path) -> None:
    from gguf import GGUFReader

    file = GGUFReader(path, "r+")
    next(tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight").data[:] = 1.0


def gated(path: Path) -> None:
    from gguf import GGUFReader

    file = GGUFReader(path, "r+")
    next(tensor for tensor in file.tensors if "ffn_gate_inp" in tensor.name).data[0, 3] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "the export is not what its source is"),
        (turning, "rope_freqs.weight of this GGUF file does something"),
        (gated, "ffn_gate_inp.weight of this GGUF file does something"),
    ],
)
def test_the_gate_refuses_a_wrong_file(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    message: str,
) -> None:
    write = FORMATS["gguf"].write

    def write_wrongly(directory: Path, source: Source, config: ExportConfig) -> formats.Readers:
        readers = write(directory, source, config)
        change(next(directory.glob("*.gguf")))
        return readers

    monkeypatch.setitem(FORMATS, "gguf", FORMATS["gguf"]._replace(write=write_wrongly))
    with pytest.raises(NopeError, match=message):
        exported(model, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantization_of_llama_cpps_asks_for_it(model: Path, nope: Nope) -> None:
    done = nope(
        "export", "--model", model, "--format", "gguf", "--quantize", "q4_k_m", env={"PATH": ""}
    )
    if LlamaCppReader.is_there():
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert "error: --quantize q4_k_m needs llama.cpp's own quantizer\n" in done.stderr
        assert "  next:  pip install llama-cpp-python, or put llama.cpp's" in done.stderr


def test_a_quantizer_on_the_path_is_used_and_its_refusal_is_told(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    if LlamaCppReader.is_there():
        return
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho cannot do $3 >&2\nexit 3\n")
    program.chmod(0o755)
    done = nope(
        "export", "--model", model, "--format", "gguf", "--quantize", "q5_k_m",
        env={"PATH": f"{program.parent}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: llama-quantize failed: cannot do Q5_K_M\n" in done.stderr
    assert not (tmp_path / "exports" / "model").exists()


@pytest.mark.llama
@pytest.mark.parametrize("dense", [False, True])
def test_llama_cpp_computes_what_the_source_computes(
    model: Path, tmp_path: Path, dense: bool
) -> None:
    settings = ExportConfig(
        model=str(model), format="gguf", output=str(tmp_path / "out"), dense=dense
    )
    _, report = export(settings)[0].record.reports
    assert report.read_by.startswith("llama.cpp (llama-cpp-python")
    assert report.largest_error <= 1e-4 * report.largest_logit
    assert (report.continued, report.likeliest) == (24, 1.0)
    assert report.texts == report.num_texts


@pytest.mark.llama
@pytest.mark.parametrize(
    ("changes", "divergence"),
    [
        ({"dtype": "float16"}, 1e-3),
        ({"dtype": "bfloat16"}, 1e-3),
        ({"quantize": "q8_0"}, 1e-2),
        ({"quantize": "q8_0", "dense": True}, 1e-2),
    ],
)
def test_llama_cpp_is_near_where_it_rounds(
    model: Path, tmp_path: Path, changes: dict[str, Any], divergence: float
) -> None:
    settings = ExportConfig(
        model=str(model), format="gguf", output=str(tmp_path / "out"), **changes
    )
    _, report = export(settings)[0].record.reports
    assert 0 < report.divergence < divergence
    assert report.texts == report.num_texts


@pytest.mark.llama
def test_llama_cpps_own_quantizer_is_used(tmp_path: Path) -> None:
    shape = SHAPE | {"embedding_dimensions": 256}
    path = sharp(tmp_path / "model", vocabulary_size=261, tokenizer="bytes", **shape)
    place = exported(path, "gguf", tmp_path / "out", quantize="q6_k,q4_k_m", dtype="float16")
    sizes = {path.name: path.stat().st_size for path in place.glob("*.gguf")}
    assert sizes.keys() == {"model-q6_k.gguf", "model-q4_k_m.gguf"}
    assert sizes["model-q4_k_m.gguf"] < sizes["model-q6_k.gguf"]
    record = json.loads((place / "parity.json").read_text())
    assert len(record["reports"]) == 4


@pytest.mark.llama
@pytest.mark.parametrize("name", ENCODINGS[:-1])
def test_ten_thousand_texts_have_the_same_tokens_in_llama_cpp(name: str, tmp_path: Path) -> None:
    ours, _ = both_tokenizers(name)
    model = sharp(tmp_path / "model", vocabulary_size=ours.vocabulary_size, num_decoder_layers=1)
    ours.save(model)
    path = tmp_path / "x.gguf"
    gguf_files.write_gguf(path, source_of(model), "f32", dense=False)
    reader = LlamaCppReader(path, "f32")
    for text in [*parity.texts(10_000, seed=1), "<tool_call>", "<|im_end|>", "<|endoftext|>"]:
        tokens = reader.tokenize(text)
        assert tokens == ours.tokenize(text), repr(text)
        assert text_of(reader, tokens) == ours.decode_tokens(tokens)


def text_of(reader: LlamaCppReader, tokens: list[int]) -> str:
    """Piece by piece, as a stream; llama-cpp-python itself has room for 32 bytes of a token."""
    import llama_cpp

    buffer, text = bytes(256), b""
    for token in tokens:
        vocabulary = reader.llama._model.vocab
        size = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, len(buffer), 0, True)
        text += buffer[:size]
    return text.decode()


@pytest.mark.ranks
def test_a_tokenizer_that_llama_cpp_cuts_otherwise_is_refused(tmp_path: Path) -> None:
    model = sharp(tmp_path / "model", vocabulary_size=200019, tokenizer="o200k_base")
    with pytest.raises(UsageError, match="no way to cut text into words as o200k_base does"):
        exported(model, "gguf", tmp_path / "out")


@pytest.mark.llama
def test_llama_cpp_shows_every_wrong_file(model: Path, tmp_path: Path) -> None:
    source = source_of(model)
    for change in (swapped, turning):
        path = file_of(model, tmp_path / change.__name__)
        change(path)
        assert parity.compare(source, LlamaCppReader(path, "f32")).complaints, change.__name__


def test_the_own_reader_is_of_the_file_and_not_of_the_source(model: Path, tmp_path: Path) -> None:
    path = file_of(model, tmp_path / "out")
    swapped(path)
    assert parity.compare(source_of(model), GgufReader(path, "f32")).complaints
