"""`nope pretrain`."""

from __future__ import annotations

from nope_gpt.cli.options import JSON, RESUME, configured
from nope_gpt.cli.terminal import result_of_ranks
from nope_gpt.config import PretrainConfig


@configured(PretrainConfig, RESUME, JSON)
def command(config: PretrainConfig, resume: bool, json: bool) -> None:
    """Train a base model on a prepared data set of text.

    Runs alone, or as several ranks under torchrun. Ctrl-C or SIGTERM saves a checkpoint
    first.

    Examples:

    - `nope pretrain --preset tiny`

    - `nope pretrain --preset 400m --batch-size 4 --gradient-accumulation-steps 64`

    - `torchrun --standalone --nproc-per-node=8 -m nope_gpt.cli pretrain`
    """
    from nope_gpt.cli.watching import Watcher
    from nope_gpt.training.pretraining import pretrain

    path = pretrain(config, [Watcher("pretrain")], resume=resume)
    result_of_ranks(str(path), {"run": str(path)}, json)
