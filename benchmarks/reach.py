"""How far a model reads beyond the contexts that it was trained on, and what helps it.

    python benchmarks/reach.py TEXT [--length 128] [--steps 1500] [--encoding bpe:1024]

TEXT is as for `learn.py`. Two networks of the same shape learn from it, one without positions and
one with rotary embeddings throughout. Into their text a pass key is put now and then, with the
question for it later on, so that a small model learns to look back: what it finds in contexts of
1, 2 and 4 times the trained length is then a matter of reach. Where it does not find it in half
of the texts of the trained length, the others are n/a.

The model without positions is read as it is; with what `nope eval --calibrate` finds on held-out
text; and after `nope tune --extend 2x` and `4x`. The rotary one as it is, and with YaRN (Peng et
al. 2023), its frequencies interpolated by parts and its scores scaled. Perplexities are of the
same held-out tokens at every length, in text that neither saw, without pass keys.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from learn import SHAPE, encode, texts_of, trained
from torch import Tensor
from train import hardware

from nope_gpt.adaptation.reach import sharpened
from nope_gpt.config import TuneConfig
from nope_gpt.config.tuning import EXTENSION
from nope_gpt.evaluation.calibration import calibrate
from nope_gpt.evaluation.lengths import by_length, spans_of, windowed_losses
from nope_gpt.evaluation.passkey import ANSWER, DIGITS, NEEDLE, QUESTION, found_by_depth
from nope_gpt.evaluation.scorers import OwnScorer
from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.network import rotary
from nope_gpt.network.sharpening import Sharpening
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.extending import extend

TIMES = (1, 2, 4)

DEPTHS, KEYS = 5, 10

TURNS_KEPT, TURNS_STRETCHED = 32, 1
"""YaRN's beta and alpha: pairs that turn more often in a trained context stay, those that turn
less often are slowed down by the whole factor."""


def with_keys(texts: list[str], characters: int, seed: int) -> list[str]:
    """Put a pass key into every piece of some texts, somewhere, and the question at its end."""
    draw = random.Random(seed)
    result = []
    for text in texts:
        parts = []
        for start in range(0, len(text), characters):
            piece = text[start : start + draw.randrange(characters // 4, characters)]
            key = "".join(draw.choices("0123456789", k=DIGITS))
            place = draw.randrange(len(piece))
            parts += [piece[:place], NEEDLE.format(key=key), piece[place:]]
            parts += [QUESTION, ANSWER.format(key=key), ".\n"]
        result.append("".join(parts))
    return result


@contextmanager
def yarn(model: NoPEGPT, factor: float, length: int) -> Iterator[None]:
    """Rotary embeddings for contexts that are some times as long (Peng et al. 2023, section 3)."""
    plain = rotary.turns

    def turns(count: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
        speeds = rotary.BASE ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
        times = length * speeds / (2 * math.pi)
        kept = ((times - TURNS_STRETCHED) / (TURNS_KEPT - TURNS_STRETCHED)).clamp(0.0, 1.0)
        speeds = speeds * (kept + (1.0 - kept) / factor)
        angles = torch.arange(count, device=device, dtype=torch.float32)[:, None] * speeds
        return angles.cos(), angles.sin()

    rotary.turns = turns
    try:
        with sharpened(model, Sharpening((0.1 * math.log(factor) + 1.0) ** 2), length):
            yield
    finally:
        rotary.turns = plain


Helped = Callable[[int], AbstractContextManager[Any]]
"""What a model is given for contexts so many times as long as was trained."""


def line(
    name: str,
    models: dict[int, NoPEGPT],
    tokenizer: BaseTokenizer,
    text: Tensor,
    length: int,
    helped: Helped,
) -> str:
    """Read the same text at every length, with the model of each.

    Args:
        name: Of what helps.
        models: For the contexts of each of `TIMES`.
        tokenizer: Of all of them.
        text: Held-out tokens [.].
        length: That was trained on.
        helped: What is done for each of them.
    """
    spans = spans_of(text, length * max(TIMES), 10**9)
    losses, keys, filler = {}, [], text.tolist()
    for times, model in models.items():
        scorer = OwnScorer(model)
        with helped(times):
            losses[times * length] = windowed_losses(scorer, spans, times * length)
            depths = found_by_depth(
                scorer, tokenizer, filler, [times * length], num_depths=DEPTHS, num_keys=KEYS
            )
        keys.append(statistics.fmean(found.share for found in depths))
    cells = [f"{cell.perplexity:.2f} ({cell.ratio:.3f}x)" for cell in by_length(losses)]
    found = [
        f"{share:.0%}" if keys[0] >= 0.5 or not place else "n/a" for place, share in enumerate(keys)
    ]
    return f"| {name} | {' | '.join(cells)} | {' | '.join(found)} |"


def extended(directory: Path, times: int, seed: int) -> NoPEGPT:
    """`nope tune --extend`, on the text that the model was trained on."""
    config = TuneConfig(
        **EXTENSION
        | {
            "model": str(directory / "runs" / "cell"),
            "extend": f"{times}x",
            "dataset_path": str(directory / "datasets"),
            "run_dir_path": str(directory / "runs"),
            "run_name": f"extend-{times}x",
            "device": "cpu",
            "seed": seed,
            "num_eval_samples": 1,
        },
    )
    return NoPEGPT.from_saved(storage.load(locate(str(extend(config, [])))))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--encoding", default="bpe:1024")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.device, options.threads = "cpu", torch.get_num_threads()
    train, held_out = texts_of(options.text)
    cell = SHAPE | {"tokens_per_sample": options.length, "batch_size": options.batch}
    cell |= {"max_steps": options.steps, "seed": options.seed}
    print(hardware(options), f"\n{cell}, {options.encoding}\n")
    names = [f"{times}x" for times in TIMES]
    print(f"| model | {' | '.join(names)} | {' | '.join('pass keys ' + x for x in names)} |")
    print("|---" * (1 + 2 * len(TIMES)) + "|", flush=True)
    for kind in ("without positions", "rotary"):
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            encode(with_keys(train, options.length * 2, options.seed), options.encoding, directory)
            model, tokenizer, _ = trained(cell | {"rotary": kind == "rotary"}, directory)
            searched, text = torch.tensor(tokenizer.tokenize(held_out)).chunk(2)
            ways = (rotary_ways if kind == "rotary" else own_ways)(model, searched, options.length)
            same = dict.fromkeys(TIMES, model)
            for name, helped in ways.items():
                told = line(f"{kind}{name}", same, tokenizer, text, options.length, helped)
                print(told, flush=True)
            if kind != "rotary":
                longer = {times: extended(directory, times, options.seed) for times in TIMES[1:]}
                models = {1: model} | longer
                name = f"{kind}, `tune --extend`"
                print(line(name, models, tokenizer, text, options.length, nothing), flush=True)


def nothing(_: int) -> AbstractContextManager[None]:
    """No help."""
    return nullcontext()


def rotary_ways(model: NoPEGPT, _: Tensor, length: int) -> dict[str, Helped]:
    """A rotary model as it is, and with YaRN."""

    def stretched(times: int) -> AbstractContextManager[None]:
        return yarn(model, times, length) if times > 1 else nullcontext()

    return {"": nothing, ", YaRN": stretched}


def own_ways(model: NoPEGPT, text: Tensor, length: int) -> dict[str, Helped]:
    """A model of ours as it is, and with what is found for it on a text."""
    spans = spans_of(text, length * max(TIMES), 10**9)
    lengths = [times * length for times in TIMES[1:]]
    found = {choice.length: choice for choice in calibrate(model, spans, length, lengths)}

    def calibrated(times: int) -> AbstractContextManager[None]:
        choice = found.get(times * length)
        how = choice.best if choice and choice.helps else Sharpening()
        return sharpened(model, how, length)

    told = ", ".join(c.best.told if c.helps else "nothing" for c in found.values())
    return {"": nothing, f", `eval --calibrate` ({told})": calibrated}


if __name__ == "__main__":
    main()
