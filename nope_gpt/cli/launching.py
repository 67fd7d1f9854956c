"""Starting a command again as several ranks, as torchrun would."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from nope_gpt.cli.options import option
from nope_gpt.cli.terminal import say
from nope_gpt.config import TrainingConfig
from nope_gpt.errors import UsageError

GPUS = option(
    "gpus",
    int,
    "Train on so many GPUs of this machine, one process for each; with --device cpu, so many "
    "processes on its CPU.",
    default=None,
    metavar="N",
    minimum=1,
)


def launch(config: TrainingConfig, count: int, more: Sequence[str] = ()) -> None:
    """Run this very command line as several ranks, and end as they end.

    Args:
        config: Its settings.
        count: Ranks.
        more: To put behind the command line.

    Raises:
        UsageError: There are too few GPUs, the ranks could not do what is asked, or torchrun
            has started ranks already.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from nope_gpt.device import Ranks, refuse_missing_gpus
    from nope_gpt.signals import ENDING, exit_code_of
    from nope_gpt.training.distribution import refuse_impossible

    if "WORLD_SIZE" in os.environ:
        raise UsageError("--gpus starts ranks, and torchrun has started some already")
    refuse_missing_gpus(count, config.device)
    refuse_impossible(config, Ranks(rank=0, local_rank=0, world_size=count))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    # Ranks that are asked to end save a checkpoint first, however large it is.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    ranks = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="nope",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in ENDING),
    )
    command = [sys.executable, "-u", "-m", "nope_gpt.cli", *without_gpus(sys.argv[1:]), *more]
    try:
        elastic_launch(ranks, entrypoint=command[0])(*command[1:])
    except SignalException as error:
        sys.exit(exit_code_of(error.sigval))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            say(f"rank {rank} of {count} was ended by {name}, and with it the run")
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)


def without_gpus(arguments: list[str]) -> list[str]:
    """A command line without its --gpus."""
    result: list[str] = []
    skip = False
    for word in arguments:
        if skip or word.startswith("--gpus="):
            skip = False
        elif word == "--gpus":
            skip = True
        else:
            result.append(word)
    return result
