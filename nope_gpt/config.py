"""Every setting of every command, once: name, type, default, range and help.

The names are the flags of the command line. Where the published weights use
another word (`num_decoder_layers`, `hidden_ratio`), the field has theirs, because
a field is also a key of config.json, and the knob names its flag.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from nope_gpt.errors import UsageError
from nope_gpt.knobs import Knobs, knob

ENCODINGS = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")

LEARNING_RATES = {"muon": 2e-2, "adamw": 1e-3, "adafactor": 1e-2}

MODEL = "Model"
DATA = "Data"
HUB = "The Hub"
CONVERSATIONS = "Conversations"
OPTIMIZATION = "Optimization"
EVALUATION = "Evaluation and checkpoints"
SAMPLING = "Sampling"
LORA = "LoRA"
RUN = "Run"
RANKS = "Several ranks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape(Knobs):
    """The shape of the network without its vocabulary.

    Raises:
        UsageError: The heads do not divide the embedding, or each other.
    """

    embedding_dimensions: int = knob(
        1024, "Dimensionality of the token embeddings.", panel=MODEL, minimum=1, maximum=1 << 17
    )
    num_q_heads: int = knob(
        16, "Query heads in every attention layer.", panel=MODEL, minimum=1, maximum=1 << 12
    )
    num_kv_heads: int = knob(
        4, "Key and value heads in every attention layer.", panel=MODEL, minimum=1, maximum=1 << 12
    )
    num_decoder_layers: int = knob(
        16,
        "Attention and MLP blocks in the body of the network.",
        panel=MODEL,
        flag="num-hidden-layers",
        minimum=1,
        maximum=1 << 12,
    )
    hidden_ratio: int = knob(
        4,
        "Ratio of hidden neurons to embedding dimensions in the MLP layers, usually 1, 2 or 4.",
        panel=MODEL,
        flag="feed-forward-ratio",
        minimum=1,
        maximum=64,
    )
    dropout: float = knob(
        0.0,
        "Proportion of signals set to zero during training.",
        panel=MODEL,
        minimum=0.0,
        below=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_dimensions % self.num_q_heads:
            raise UsageError(
                f"--embedding-dimensions is {self.embedding_dimensions}, and must be a multiple "
                f"of --num-q-heads, which is {self.num_q_heads}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise UsageError(
                f"--num-q-heads is {self.num_q_heads}, and must be a multiple of "
                f"--num-kv-heads, which is {self.num_kv_heads}"
            )

    @property
    def head_dimensions(self) -> int:
        return self.embedding_dimensions // self.num_q_heads

    @property
    def kv_dimensions(self) -> int:
        return self.head_dimensions * self.num_kv_heads

    @property
    def hidden_dimensions(self) -> int:
        return self.embedding_dimensions * self.hidden_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelShape):
    """The whole network: exactly the keys of a published config.json."""

    vocabulary_size: int = knob(
        50257, "Rows of the token embedding.", panel=MODEL, minimum=1, maximum=1 << 24
    )


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
        "r50k_base, p50k_base, cl100k_base or o200k_base (tiktoken's); `bpe:4096` to train a "
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Knobs):
    """What pretraining and tuning share: one loop, one set of knobs."""

    command: ClassVar[str]

    dataset_path: str = knob(
        "./datasets", "Root directory of the data sets, or one data set's directory.", panel=DATA
    )
    dataset: str | None = knob(
        None, "Name of the data set in the root.", panel=DATA, shown_default="the only one there"
    )
    batch_size: int = knob(
        2, "Samples that pass through the network at a time.", panel=OPTIMIZATION, minimum=1
    )
    gradient_accumulation_steps: int = knob(
        128,
        "Batches for each update of the weights, over all ranks.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    optimizer: str = knob(
        "adamw",
        "adamw; adafactor, with hardly any memory; or muon for the matrices, adamw for the rest.",
        panel=OPTIMIZATION,
        choices=("adamw", "adafactor", "muon"),
    )
    learning_rate: float | None = knob(
        None,
        "Peak learning rate.",
        panel=OPTIMIZATION,
        above=0.0,
        shown_default="adamw 1e-3, adafactor 1e-2, muon 2e-2",
    )
    schedule: str = knob(
        "linear",
        "Learning rate after the warm-up: constant, linear to zero, cosine to a tenth, or wsd: "
        "constant, then linear to zero.",
        panel=OPTIMIZATION,
        choices=("constant", "linear", "cosine", "wsd"),
    )
    decay_fraction: float = knob(
        0.2,
        "Fraction of the steps over which --schedule wsd falls to zero.",
        panel=OPTIMIZATION,
        above=0.0,
        maximum=1.0,
    )
    warmup_fraction: float = knob(
        0.02,
        "Fraction of the steps over which the learning rate rises from zero.",
        panel=OPTIMIZATION,
        minimum=0.0,
        maximum=1.0,
    )
    weight_decay: float = knob(
        0.1, "Decoupled weight decay of the matrices.", panel=OPTIMIZATION, minimum=0.0
    )
    low_memory_optimizer: bool = knob(
        False,
        "Update one tensor at a time: less memory, slightly slower.",
        panel=OPTIMIZATION,
    )
    max_gradient_norm: float = knob(
        10.0, "Clip the global gradient norm above this.", panel=OPTIMIZATION, above=0.0
    )
    activation_checkpointing: bool = knob(
        False,
        "Recompute activations in the backward pass: far less memory, about a third more time.",
        panel=OPTIMIZATION,
    )
    checkpointed_fraction: float = knob(
        1.0,
        "Fraction of the blocks that --activation-checkpointing recomputes.",
        panel=OPTIMIZATION,
        above=0.0,
        maximum=1.0,
    )
    max_non_finite_steps: int = knob(
        3,
        "End after so many steps in a row whose loss or gradient is no finite number; none of "
        "them changes the weights.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    loss_spike: str = knob(
        "warn",
        "When the loss jumps far out of its recent range: warn; skip the update; or rewind to "
        "the last checkpoint and leave out the samples since.",
        panel=OPTIMIZATION,
        choices=("ignore", "warn", "skip", "rewind"),
    )
    eval_interval: int = knob(
        100, "Evaluate on the hold-out every this many steps.", panel=EVALUATION, minimum=1
    )
    num_eval_samples: int = knob(
        2048, "Hold-out samples to evaluate on, at most.", panel=EVALUATION, minimum=1
    )
    checkpoint_interval: int = knob(
        100, "Save a checkpoint every this many steps.", panel=EVALUATION, minimum=1
    )
    checkpoint_path: str | None = knob(
        None,
        "Directory of the checkpoints. A name that ends in .pt means the directory of that "
        "name without the suffix.",
        panel=EVALUATION,
        shown_default="checkpoints in the run",
    )
    keep_checkpoints: int = knob(
        3, "Checkpoints to keep, the newest ones.", panel=EVALUATION, minimum=2
    )
    keep_every: int | None = knob(
        None,
        "Keep those of every so many steps for good, too.",
        panel=EVALUATION,
        minimum=1,
        shown_default="none",
    )
    run_dir_path: str = knob("./runs", "Root directory of the runs.", panel=RUN)
    run_name: str = knob("pretrain", "Name of the run in the root.", panel=RUN)
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps.", panel=RUN)
    precision: str = knob(
        "auto",
        "float32, or bfloat16 autocast; auto takes bfloat16 where the hardware has it.",
        panel=RUN,
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = knob(
        "auto",
        "Fuse what the blocks do between matrix products, by torch.compile. auto does so for a "
        "run that is long enough, where there is a compiler.",
        panel=RUN,
        choices=("auto", "on", "off"),
    )
    ddp_sharding_level: int | None = knob(
        None,
        "With more than one rank: 0 gives each a whole copy of the model (DDP), 2 shards "
        "gradients and optimizer, 3 the weights too (FSDP2).",
        panel=RANKS,
        choices=(0, 2, 3),
        shown_default="2 with more than one rank",
    )
    hybrid_sharding: bool = knob(
        False, "Shard within each node, and replicate across nodes.", panel=RANKS
    )
    rank_timeout: float = knob(
        600.0,
        "End the run when a rank has stood still for so many seconds, and say which.",
        panel=RANKS,
        above=0.0,
    )
    seed: int | None = knob(
        None,
        "Seed of every random choice.",
        panel=RUN,
        minimum=0,
        maximum=(1 << 63) - 1,
        shown_default="drawn and recorded",
    )

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or LEARNING_RATES[self.optimizer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(ModelShape, TrainingConfig):
    """Text to a base model."""

    command: ClassVar[str] = "pretrain"

    dataset_subset: str | None = knob(
        None,
        "FineWeb subset whose data set to train on, `none` for the full 15T tokens.",
        panel=DATA,
        choices=("sample-10BT", "sample-100BT", "sample-350BT", "none"),
        shown_default="sample-10BT if it is prepared",
    )
    token_encoding: str | None = knob(
        None,
        "Encoding of that FineWeb data set.",
        panel=DATA,
        choices=ENCODINGS,
        shown_default="r50k_base if it is prepared",
    )
    tokens_per_sample: int = knob(
        4096,
        "Tokens in a training sequence: the context length that the model is trained on.",
        panel=DATA,
        minimum=1,
    )
    max_steps: int = knob(10000, "Updates of the weights.", panel=OPTIMIZATION, minimum=1)
    initialization: str = knob(
        "scaled",
        "scaled starts near the loss of a uniform guess at any width; seed is torch's default, "
        "which starts near 1,000 nats.",
        panel=MODEL,
        choices=("scaled", "seed"),
    )
    tokens_per_step: int | None = knob(
        None,
        "Tokens for each update of the weights, over all ranks: the accumulation follows.",
        panel=OPTIMIZATION,
        minimum=1,
        shown_default="batch size x accumulation x tokens per sample",
    )
    document_masking: bool = knob(
        False, "Let no token see those of another document in its sample.", panel=DATA
    )
    sample_interval: int = knob(
        1000,
        "Continue a held-out text every this many steps, for TensorBoard; 0 for never.",
        panel=EVALUATION,
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_step is None:
            return
        tokens = self.batch_size * self.tokens_per_sample
        if self.tokens_per_step % tokens:
            below = self.tokens_per_step // tokens * tokens
            near = [str(count) for count in (below, below + tokens) if count]
            raise UsageError(
                f"--tokens-per-step is {self.tokens_per_step:,}, which batches of "
                f"{self.batch_size} samples of {self.tokens_per_sample} tokens, {tokens:,} in "
                f"each, do not divide",
                hint=f"--tokens-per-step {' or '.join(near)}",
            )
        steps = self.tokens_per_step // tokens
        object.__setattr__(self, "gradient_accumulation_steps", steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainingConfig):
    """Conversations to an assistant."""

    command: ClassVar[str] = "tune"

    model: str | None = knob(
        None,
        "Base model: a run, checkpoint or export directory, or a Hub id.",
        panel=MODEL,
        shown_default="required",
    )
    dataset_subset: str = knob(
        "all",
        "Comma-separated subsets of the data set (a source file's name without its suffix).",
        panel=DATA,
    )
    max_tokens_per_sample: int = knob(
        4096,
        "Tokens of a conversation, at most; a longer one loses its last turns.",
        panel=DATA,
        minimum=2,
    )
    filter_long_samples: bool = knob(
        False, "Leave longer conversations out instead of cutting them.", panel=DATA
    )
    num_dataset_processes: int = knob(
        8,
        "Accepted for old command lines: prepared data needs no processing.",
        panel=DATA,
        minimum=1,
    )
    gradient_accumulation_steps: int = knob(
        64,
        "Batches for each update of the weights, over all ranks.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    num_epochs: int = knob(2, "Passes over the data.", panel=OPTIMIZATION, minimum=1)
    max_steps: int | None = knob(
        None,
        "Updates of the weights, at most.",
        panel=OPTIMIZATION,
        minimum=1,
        shown_default="all passes",
    )
    weight_decay: float = knob(
        0.0, "Decoupled weight decay of the matrices.", panel=OPTIMIZATION, minimum=0.0
    )
    max_gradient_norm: float = knob(
        1.0, "Clip the global gradient norm above this.", panel=OPTIMIZATION, above=0.0
    )
    rank: int = knob(
        8, "Rank of the decomposition matrices.", panel=LORA, minimum=1, maximum=1 << 16
    )
    alpha: float = knob(1.0, "Strength of the LoRA signal: W + alpha * B * A.", panel=LORA)
    eval_interval: int = knob(
        1, "Evaluate on the hold-out every this many epochs.", panel=EVALUATION, minimum=1
    )
    checkpoint_interval: int = knob(
        1, "Save a checkpoint every this many epochs.", panel=EVALUATION, minimum=1
    )
    run_name: str = knob("tune", "Name of the run in the root.", panel=RUN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Knobs):
    """How the next token is drawn: penalty, then top-k, then temperature, then top-p."""

    model: str | None = knob(
        None,
        "A run, checkpoint or export directory, or a Hub id.",
        panel=MODEL,
        shown_default="required",
    )
    max_tokens: int = knob(2000, "Tokens to generate, at most.", panel=SAMPLING, minimum=1)
    context_length: int = knob(
        4096, "Tokens that the model may look back on.", panel=SAMPLING, minimum=1
    )
    temperature: float = knob(
        0.9,
        "Spread of the distribution; 0 always takes the likeliest token.",
        panel=SAMPLING,
        minimum=0.0,
    )
    top_k: int = knob(
        500, "Draw from the k likeliest tokens, 0 for all.", panel=SAMPLING, minimum=0
    )
    top_p: float = knob(
        0.9,
        "Draw from the likeliest tokens whose probabilities sum to p.",
        panel=SAMPLING,
        above=0.0,
        maximum=1.0,
    )
    repeat_penalty: float = knob(
        0.1,
        "Share of its logit that a token loses for each recent use.",
        panel=SAMPLING,
        minimum=0.0,
        maximum=1.0,
    )
    repeat_window: int = knob(
        50, "Generated tokens that count as recent.", panel=SAMPLING, minimum=1
    )
    colorize_tokens: bool = knob(
        False, "Colour each token by its probability, green to red.", panel=SAMPLING
    )
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps.", panel=RUN)
    seed: int | None = knob(
        None,
        "Seed of the draws.",
        panel=RUN,
        minimum=0,
        maximum=(1 << 63) - 1,
        shown_default="drawn",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """A prompt to its continuation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """A conversation in the terminal."""

    temperature: float = knob(
        0.7,
        "Spread of the distribution; 0 always takes the likeliest token.",
        panel=SAMPLING,
        minimum=0.0,
    )
    max_message_history: int = knob(
        4, "Messages of the conversation that the model sees.", panel=SAMPLING, minimum=1
    )
    system_message: str = knob(
        "You are a friendly AI assistant.", "What the model is told before you speak.", panel=MODEL
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Knobs):
    """A trained model to a directory that other programs read."""

    model: str | None = knob(
        None,
        "A run, checkpoint or export directory, a Hub id, or a .pt file of the old scripts.",
        panel=MODEL,
        shown_default="required",
    )
    output: str | None = knob(
        None,
        "Directory to make.",
        panel=RUN,
        shown_default="exports/ and the model's name",
    )
    format: str = knob("hub", "hub: the published layout.", panel=RUN, choices=("hub",))
    overwrite: bool = knob(False, "Replace a directory that is already there.", panel=RUN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConfig(ModelConfig):
    """A shape to its parameters, memory and time."""

    tokens_per_sample: int = knob(4096, "Tokens in a training sequence.", panel=DATA, minimum=1)
    batch_size: int = knob(
        1, "Samples that pass through the network at a time.", panel=OPTIMIZATION, minimum=1
    )
    optimizer: str = knob(
        "adamw",
        "adamw, adafactor or muon.",
        panel=OPTIMIZATION,
        choices=("adamw", "adafactor", "muon"),
    )
    precision: str = knob(
        "bfloat16",
        "float32, or bfloat16 autocast.",
        panel=RUN,
        choices=("float32", "bfloat16"),
    )
    activation_checkpointing: bool = knob(
        False, "Recompute activations in the backward pass.", panel=OPTIMIZATION
    )
    memory: str | None = knob(
        None,
        "Memory to train in, such as 24GB or 24GiB: answers with the largest published shape "
        "that trains in it.",
        panel=RUN,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Knobs):
    """The whole family in a row."""

    directory: str = knob("./quickstart", "Where everything goes.", panel=RUN)
    pretrain_steps: int = knob(
        700, "Updates of the base model's weights.", panel=OPTIMIZATION, minimum=1
    )
    tune_steps: int = knob(
        250, "Updates of the assistant's adapters.", panel=OPTIMIZATION, minimum=1
    )
    seed: int = knob(0, "Seed of every random choice.", panel=RUN, minimum=0, maximum=(1 << 63) - 1)


SHAPE_TINY: dict[str, Any] = {
    "embedding_dimensions": 128,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "num_decoder_layers": 4,
}

SHAPE_SMALL: dict[str, Any] = {
    "embedding_dimensions": 384,
    "num_q_heads": 6,
    "num_kv_heads": 2,
    "num_decoder_layers": 6,
}

SHAPE_125M: dict[str, Any] = {
    "embedding_dimensions": 768,
    "num_q_heads": 12,
    "num_kv_heads": 4,
    "num_decoder_layers": 14,
}

SHAPE_1B: dict[str, Any] = {
    "embedding_dimensions": 2048,
    "num_q_heads": 32,
    "num_kv_heads": 8,
    "num_decoder_layers": 20,
}

SHAPE_400M: dict[str, Any] = {
    "embedding_dimensions": 1280,
    "num_q_heads": 20,
    "num_kv_heads": 5,
    "num_decoder_layers": 20,
}

SEED_RECIPE: dict[str, Any] = {
    "optimizer": "adafactor",
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "weight_decay": 0.0,
}

PRESETS: dict[type[Knobs], dict[str, dict[str, Any]]] = {
    PretrainConfig: {
        "tiny": {
            **SHAPE_TINY,
            "tokens_per_sample": 256,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "optimizer": "muon",
            "max_steps": 800,
        },
        "small": {
            **SHAPE_SMALL,
            "tokens_per_sample": 512,
            "batch_size": 16,
            "gradient_accumulation_steps": 2,
            "max_steps": 5000,
        },
        "125m": {
            **SHAPE_125M,
            "tokens_per_sample": 2048,
            "batch_size": 8,
            "gradient_accumulation_steps": 32,
        },
        "400m": SHAPE_400M,
        "1b": {**SHAPE_1B, "activation_checkpointing": True},
        "seed": {**SEED_RECIPE, "initialization": "seed"},
    },
    TuneConfig: {
        "tiny": {
            "max_tokens_per_sample": 256,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 2e-3,
            "num_epochs": 1,
        },
        "seed": SEED_RECIPE,
    },
}
