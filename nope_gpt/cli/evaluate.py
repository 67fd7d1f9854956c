"""`nope eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nope_gpt.cli.findings import columns, estimate, shown
from nope_gpt.cli.options import JSON, configured, option
from nope_gpt.cli.reading import read_text
from nope_gpt.cli.terminal import progress_bar, result, say, talk, waiting
from nope_gpt.config import EvaluateConfig
from nope_gpt.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from nope_gpt.evaluation.evaluating import Evaluation
    from nope_gpt.model import NoPEGPT
    from nope_gpt.tokenization import BaseTokenizer

PLOT = option("plot", Path | None, "Draw all of it, as PNG or SVG.", metavar="FILE")


CALIBRATE = option(
    "calibrate",
    bool,
    "Only search what attention should be scaled by in longer contexts, on one half of the text, "
    "and write it into the model's config.json if it helps on the other. n is the tokens that one "
    "sees, T what was trained.",
    default=False,
)


KEEP = option(
    "record",
    bool,
    "Keep what is found with the model: evaluation.json in its run, or in its export, with the "
    "picture, which TensorBoard and the cards of its exports show.",
    default=False,
)


@configured(EvaluateConfig, CALIBRATE, PLOT, KEEP, JSON)
def command(
    config: EvaluateConfig, calibrate: bool, plot: Path | None, record: bool, json: bool
) -> None:
    """Measure what a model knows of a text, and how far beyond its training it reaches.

    Every token is predicted in contexts of the trained length and of multiples of it, so that the
    lengths differ in nothing else. A hidden number is asked for, and attention is looked at.

    Examples:

    - `nope eval --model runs/pretrain`

    - `nope eval --model runs/pretrain --text book.txt --lengths 1,2 --plot reach.png`

    - `nope eval --model exports/my-model --calibrate --lengths 2,4`

    - `nope eval --model andrewdalpino/NoPE-GPT-400M-Base --dataset my-texts --context-length 1024`

    - `nope eval --library transformers --model openai-community/gpt2 --text book.txt --lengths 1`
    """
    from nope_gpt.cli.loading import find_model, load_model
    from nope_gpt.cli.plotting import WIDE, figure_for, picture_of
    from nope_gpt.evaluation.evaluating import evaluate
    from nope_gpt.evaluation.record import RECORD, keep, place_for
    from nope_gpt.evaluation.scorers import OwnScorer

    refuse_contradictions(config, calibrate=calibrate, record=record, plot=plot)
    figure = figure_for(plot, *WIDE) if plot else None
    if config.library == "transformers":
        compare(config, figure, plot, as_json=json)
        return
    directory = find_model(config, "eval")
    place = place_for(str(config.model), directory) if record else None
    with waiting(f"loading {config.model}"):
        model, tokenizer = load_model(directory, config)
    length = trained_length_of(config, model.trained_context_length)
    tokens = text_of(config, tokenizer)
    if calibrate:
        write_calibration(model, directory, tokens, length, config, as_json=json)
        return
    with counting() as started:
        found = evaluate(OwnScorer(model), tokenizer, tokens, length, config, started)
    if place:
        keep(place, directory, found, picture_of(found))
        say(f"kept in {place / RECORD}")
    tell(found, figure, plot, as_json=json)


def refuse_contradictions(
    config: EvaluateConfig, *, calibrate: bool, record: bool, plot: Path | None
) -> None:
    """Refuse flags that ask for different things.

    Raises:
        UsageError: Names them.
    """
    if calibrate and (record or plot):
        other = "--record" if record else "--plot"
        raise UsageError(
            f"--calibrate only searches, and {other} is of what is measured",
            hint="do one after the other",
        )
    for flag, given in (("--calibrate", calibrate), ("--record", record)):
        if given and config.library != "nope":
            raise UsageError(f"{flag} is for models of nope's own", hint="leave it out")
        if given and (config.adapter or config.dtype != "float32"):
            other = "--adapter" if config.adapter else f"--dtype {config.dtype}"
            raise UsageError(
                f"{flag} writes beside the stored weights, and {other} changes them",
                hint="leave it out, or export the model that you mean first",
            )


def compare(
    config: EvaluateConfig,
    figure: Figure | None,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """The same of a model of the transformers library."""
    import torch

    from nope_gpt.evaluation.evaluating import evaluate
    from nope_gpt.evaluation.foreign import open_foreign

    with waiting(f"loading {config.model}"):
        scorer, tokenizer, known = open_foreign(config)
    length = trained_length_of(config, known)
    tokens = torch.tensor(tokenizer.tokenize(read_text(str(config.text))))
    with counting() as started:
        found = evaluate(scorer, tokenizer, tokens, length, config, started)
    tell(found, figure, plot, as_json=as_json)


def trained_length_of(config: EvaluateConfig, known: int | None) -> int:
    """Tokens of the context that a model was trained on, as it is told or as it is known.

    Raises:
        UsageError: It is neither.
    """
    length = config.context_length or known
    if length is None:
        raise UsageError(
            "it is not known on how long contexts this model was trained",
            where=str(config.model),
            hint="say it: --context-length 4096",
        )
    return length


def tell(found: Evaluation, figure: Figure | None, plot: Path | None, *, as_json: bool) -> None:
    """Draw what was found, if that is asked for, and print it."""
    from nope_gpt.cli.plotting import draw_evaluation, save

    if figure and plot:
        draw_evaluation(found, figure)
        save(figure, plot)
        say(f"drawn in {plot}")
    result(shown(found), found.as_dict(), as_json)


def write_calibration(
    model: NoPEGPT,
    directory: Path,
    tokens: Tensor,
    trained_length: int,
    config: EvaluateConfig,
    *,
    as_json: bool,
) -> None:
    """Search scales of attention, and keep those that help."""
    from nope_gpt.evaluation.calibration import calibrate_model
    from nope_gpt.network.sharpening import as_setting

    with counting() as started:
        choices = calibrate_model(model, directory, tokens, trained_length, config, started)
    found = {choice.length: choice.best for choice in choices if choice.helps}
    rows = [
        [
            f"{choice.length:,}",
            choice.best.told,
            estimate(choice.gain),
            estimate(choice.cost),
            "written" if choice.helps else "no gain beyond chance: off",
        ]
        for choice in choices
    ]
    table = columns(
        ["context", "scale", "loss falls by", f"rises by at {trained_length:,}", ""], rows
    )
    value = {
        "calibration": [choice.as_dict() for choice in choices],
        "attention_scales": as_setting(found),
    }
    result(table, value, as_json)


def text_of(config: EvaluateConfig, tokenizer: BaseTokenizer) -> Tensor:
    """The tokens to predict: of a file, or of the hold-out of a data set.

    Raises:
        NopeError: There is no such file or data set, or it has other tokens.
    """
    import torch

    from nope_gpt.data.finding import find_dataset
    from nope_gpt.data.shards import Dataset, TokenStream

    if config.text is not None:
        return torch.tensor(tokenizer.tokenize(read_text(config.text)))
    dataset = Dataset.open(find_dataset(Path(config.dataset_path).expanduser(), config.dataset))
    dataset.require_tokenizer(tokenizer.name, tokenizer.fingerprint, str(config.model))
    stream = TokenStream(dataset, holdout=True)
    return torch.from_numpy(stream.read(0, len(stream)))


@contextmanager
def counting() -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar of the tokens that are read."""
    with progress_bar(talk()) as bar:

        def started(total: int) -> Callable[[int], None]:
            task = bar.add_task("reading", total=total, figures="")
            return lambda count: bar.advance(task, count)

        yield started
