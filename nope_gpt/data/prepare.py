"""The verb `prepare`: sources to data sets of token shards.

    names ──opening──▶ files ──corpus──▶ units ──schedule──▶ shards ──commit──▶ NAME/

Everything lies in NAME.partial until it is whole, so that the same command goes on after
any interruption; `staging` tells what is there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from nope_gpt import tokenization
from nope_gpt.config import PrepareConfig
from nope_gpt.data.commit import Prepared
from nope_gpt.data.documents import Refused
from nope_gpt.data.encoding import encode
from nope_gpt.data.planning import (
    Estimate,
    estimate,
    recipe_of,
    refuse_small_disks,
)
from nope_gpt.data.preparation import Preparation, Tell
from nope_gpt.data.samples import Sample
from nope_gpt.errors import CapacityError, NetworkError
from nope_gpt.tokenization import ChatTokenizer


def prepare(
    names: list[str],
    config: PrepareConfig,
    tell: Tell = lambda _: None,
    *,
    merge: bool = False,
) -> list[Prepared]:
    """Encode sources into a data set for each kind of content in them.

    Args:
        names: Files, directories, `-` for standard input, `python-docs`, or data sets of
            the Hub: `fineweb`, `smoltalk`, `ultrafeedback`, or an id.
        config: Where to, how, and with which tokenizer.
        tell: Called several times a second with how far it is.
        merge: Only join the parts that `--shard` made.

    Returns:
        The data sets; none if this was one of several parts.

    Raises:
        NopeError: A source is missing, empty or damaged.
        Interrupted: A signal ended it; what is finished is kept.
    """
    job = Preparation(names, config, tell, merge=merge)
    try:
        with job.staging.locked(job.part, job.note):
            try:
                return job.run()
            finally:
                job.clear_up()
    except KeyboardInterrupt:
        raise job.interrupted(130) from None
    except (NetworkError, CapacityError) as error:
        raise job.with_what_is_kept(error) from None


def dry_run(names: list[str], config: PrepareConfig) -> Estimate:
    """What `prepare` would take, and whether the disk has room for it; nothing is written.

    Raises:
        CapacityError: The disk is too small.
    """
    job = Preparation(names, config, lambda _: None)
    with tempfile.TemporaryDirectory() as spool:
        job.open(Path(spool))
        index, count = job.part
        plan = job.staging.plan() or {}
        is_begun = plan.get("recipe") == recipe_of(job.corpus.sources, config)
        mine = job.corpus.groups[index::count]
        todo = [each for each in mine if not (is_begun and job.staging.has_group(each.name))]
        needed = estimate(todo, config, job.downloads)
    refuse_small_disks(needed, job.root, job.downloads.directory)
    return needed


def preview(names: list[str], config: PrepareConfig, count: int, tell: Tell) -> list[Sample]:
    """The first documents of each source, encoded; nothing is written but downloads."""
    job = Preparation(names, config, tell)
    samples = []
    with tempfile.TemporaryDirectory() as spool:
        job.open(Path(spool))
        base = tokenization.resolve(config.token_encoding, job.training_texts())
        for source in job.corpus.sources:
            left = count
            for document in job.corpus.documents(source):
                tokenizer = base if isinstance(document, str) else ChatTokenizer(base.encoding)
                try:
                    streams, _ = encode(document, tokenizer, job.limit)
                except Refused:
                    continue
                samples.append(Sample(source.name, tokenizer, streams))
                left -= 1
                if left == 0:
                    break
    if any(job.downloads.directory.glob("*")):
        job.note(f"what was downloaded is kept in {job.downloads.directory} for `nope prepare`")
    return samples
