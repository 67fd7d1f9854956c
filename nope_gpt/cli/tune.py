"""`nope tune`."""

from __future__ import annotations

from pathlib import Path

from nope_gpt.cli.launching import GPUS, launch
from nope_gpt.cli.options import JSON, RESUME, configured
from nope_gpt.cli.terminal import result_of_ranks
from nope_gpt.config import TuneConfig


@configured(TuneConfig, RESUME, GPUS, JSON)
def command(config: TuneConfig, resume: bool | Path, gpus: int | None, json: bool) -> None:
    """Teach a base model to answer, by LoRA on a prepared data set of conversations.

    Trains low-rank adapters and the token embedding on the answers alone. The base model
    stays as it is; the checkpoints of the new run have the adapters folded in.

    Examples:

    - `nope tune --model runs/pretrain`

    - `nope tune --model andrewdalpino/NoPE-GPT-400M-Base --dataset my-chats-r50k_base --rank 16`
    """
    from nope_gpt.cli.watching import Watcher
    from nope_gpt.training.tuning import tune

    if gpus is not None:
        launch(config, gpus)
        return
    path = tune(config, [Watcher("tune")], resume=resume)
    result_of_ranks(str(path), {"run": str(path)}, json)
