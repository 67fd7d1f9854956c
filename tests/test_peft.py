"""An adapter loads into PEFT, on the same network in transformers, and computes the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_chats import base_run, dataset_of, questions, tuned

from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate, newest_checkpoint
from nope_gpt.model import NoPEGPT

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("embeddings", ["new", "all", "none"])
def test_peft_computes_what_the_tuned_model_computes(
    corpus: Path, tmp_path: Path, embeddings: str
) -> None:
    from peft import PeftModel
    from train import arcee

    base = base_run(corpus, tmp_path)
    chats = dataset_of(questions(12), base, tmp_path)
    changes = {"rank": 4, "alpha": 0.7, "embeddings": embeddings}
    run, _ = tuned(base, chats, tmp_path / "runs", **changes)
    merged = NoPEGPT.from_pretrained(run)
    saved = storage.load(locate(base))
    rows = merged.token_embeddings.weight.detach() if embeddings == "none" else torch.zeros(261, 32)
    start = torch.cat([saved.state["token_embeddings.weight"], rows[257:]])
    source = replace(
        saved,
        config=merged.config,
        state=saved.state | {"token_embeddings.weight": start},
    )
    theirs = arcee(NoPEGPT.from_saved(source), 64)
    tokens = torch.randint(0, 261, (2, 40), generator=torch.Generator().manual_seed(0))
    before = theirs(tokens).logits.detach()
    peft = PeftModel.from_pretrained(theirs, newest_checkpoint(run / "checkpoints")).eval()
    expected = merged(tokens).detach()
    with torch.no_grad():
        logits = peft(tokens).logits
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
