"""The knobs of `prepare`."""

from __future__ import annotations

import dataclasses

from nope_gpt.config.knobs import Knobs, knob
from nope_gpt.config.panels import CONVERSATIONS, DATA, HUB, RUN

ENCODINGS = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
"""Those of tiktoken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig(Knobs):
    """Text to token shards."""

    dataset_path: str = knob("./datasets", "Root directory of the data sets.", panel=DATA)
    name: str | None = knob(
        None,
        "Name of the data set in the root.",
        panel=DATA,
        shown_default="from the source and the encoding",
    )
    token_encoding: str = knob(
        "r50k_base",
        f"{', '.join(ENCODINGS[:-1])} or {ENCODINGS[-1]} (tiktoken's); `bpe:4096` to train a "
        "byte-pair tokenizer of that size on this corpus; `bytes`; or the directory of a data "
        "set or model, to share its tokenizer.",
        panel=DATA,
    )
    text_column: str = knob(
        "text", "Column or key that holds the text in .parquet and .jsonl files.", panel=DATA
    )
    dataset_subset: str | None = knob(
        None,
        "Comma-separated subsets of a data set on the Hub. fineweb: sample-10BT, sample-100BT, "
        "sample-350BT, a dump such as CC-MAIN-2024-10, or `none` for all 15T tokens. "
        "NAME:0.5 takes half of a subset's rows, NAME@10000 so many at most.",
        panel=HUB,
        shown_default="fineweb: sample-10BT, smoltalk: all, ultrafeedback: sft,prefs",
    )
    dataset_split: str = knob("train", "Split of any other data set on the Hub.", panel=HUB)
    dataset_revision: str | None = knob(
        None,
        "Branch, tag or commit of a data set on the Hub.",
        panel=HUB,
        shown_default="the newest commit, recorded",
    )
    download_path: str | None = knob(
        None,
        "Directory to keep downloaded files in.",
        panel=HUB,
        shown_default="each file is removed when it is encoded",
    )
    max_tokens_per_sample: int | None = knob(
        None,
        "Tokens of a conversation, at most; a longer one loses its last turns.",
        panel=CONVERSATIONS,
        minimum=2,
        shown_default="any length",
    )
    filter_long_samples: bool = knob(
        False, "Leave longer conversations out instead of cutting them.", panel=CONVERSATIONS
    )
    holdout_fraction: float = knob(
        0.01,
        "Fraction of the documents kept for evaluation, chosen by hash of the document.",
        panel=DATA,
        minimum=0.0,
        maximum=0.5,
    )
    deduplicate: bool = knob(
        False,
        "Leave out documents that repeat an earlier one of the data set. Takes 256 MB of memory "
        "at the end, and the disk for the tokens twice.",
        panel=DATA,
    )
    num_dataset_processes: int | None = knob(
        None, "Processes that encode.", panel=RUN, minimum=1, shown_default="one per core"
    )
    shard: str | None = knob(
        None,
        "I/N: encode only the I-th of N parts of the files, counted from 0, for several "
        "machines; `--merge` joins them.",
        panel=RUN,
        shown_default="of SLURM_ARRAY_TASK_ID, or torchrun's RANK, if set",
    )
    overwrite: bool = knob(False, "Replace a data set of the same name.", panel=DATA)
