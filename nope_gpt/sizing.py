"""Parameters, floating-point operations and bytes of a network, in closed form.

Nothing here builds a network or imports torch, so `nope size` answers at once. In formulas,
P is the parameters, V the vocabulary, L the layers, d the embedding dimensions, kv the key (or
value) dimensions, H the query heads, r the hidden ratio, T the tokens in a sample and w the
bytes of an activation in a matrix product. Memory is bytes of live tensors; what a device
needs on top is what `usable_memory` holds back.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Iterable, Iterator

from nope_gpt.config import MODEL, SHAPE_400M, SHAPE_TINY, ModelConfig, PretrainConfig, SizeConfig
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.knobs import flag_of

PUBLISHED_SHAPES: dict[str, ModelConfig] = {
    "NoPE-GPT-400M": ModelConfig(**SHAPE_400M),
    "NoPE-GPT default (228M)": ModelConfig(),
    "tiny": ModelConfig(**SHAPE_TINY),
}

# In both precisions: weights, gradients, optimizer, residual stream, norms and loss.
FLOAT32 = 4
MATMUL_BYTES = {"float32": 4, "bfloat16": 2}

# Tokens whose logits exist at a time: `nope_gpt.cross_entropy.CHUNK`, which imports torch.
LOSS_CHUNK = 1024

BYTE_UNITS: dict[str, int] = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_memory(text: str) -> int:
    """Read an amount of memory such as 24GB, 1.5 TiB or 24g as whole bytes.

    KB, MB, GB and TB, or the letter alone, are powers of 1000; KiB to TiB of 1024.

    Raises:
        UsageError: The text is not a number with a unit, or is less than one byte.
    """
    match = re.fullmatch(r"([0-9]{0,15}\.?[0-9]{1,15})\s*([a-z]+)", text.strip().lower())
    amount = round(float(match[1]) * BYTE_UNITS.get(match[2], 0)) if match else 0
    if amount < 1:
        raise UsageError(
            f"{text!r} is not an amount of memory",
            where="--memory",
            hint="write a number above zero and a unit, such as --memory 24GB or --memory 24GiB",
        )
    return amount


def format_bytes(amount: int) -> str:
    """An amount of memory in decimal units, such as 24.0 GB."""
    return _shortened(amount, (" B", " KB", " MB", " GB", " TB"))


def format_count(amount: int) -> str:
    """A number of parameters, tokens or operations, such as 408.4M."""
    return _shortened(amount, ("", "K", "M", "B", "T"))


def _shortened(amount: int, units: tuple[str, ...]) -> str:
    """The number to one decimal in the first unit that leaves it below 1000."""
    if amount < 1000:
        return f"{amount}{units[0]}"
    value, unit = float(amount), 0
    while round(value, 1) >= 1000 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f}{units[unit]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Named amounts that add up to a total."""

    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @property
    def total(self) -> int:
        return sum(self.as_dict().values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount(Parts):
    """Parameters by part; the embedding is also the head, and counts once."""

    embedding: int
    attention: int
    mlp: int
    norms: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceMemory(Parts):
    """Bytes that a model holds while it generates one sequence."""

    weights: int
    cache: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan(Parts):
    """Bytes alive at one moment of a training step; `transient` at that moment only."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0
    logits: int = 0
    autocast_copies: int = 0
    transient: int = 0

    @property
    def peak(self) -> int:
        return self.total


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters exactly: P = V d + L (2 d² + 2 d kv + 2 r d² + 2 d) + d."""
    d, layers = config.embedding_dimensions, config.num_decoder_layers
    return ParameterCount(
        embedding=config.vocabulary_size * d,
        attention=layers * 2 * d * (d + config.kv_dimensions),
        mlp=layers * 2 * d * config.hidden_dimensions,
        norms=(2 * layers + 1) * d,
    )


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """Floating-point operations of the forward pass over one sequence, exactly.

    A multiplication and an addition are two, and the half of the scores that the causal mask
    hides is counted, as torch's flop counter does with the math backend of attention.
    """
    count = count_parameters(config)
    scores = 4 * tokens * tokens * config.embedding_dimensions * config.num_decoder_layers
    return 2 * tokens * (count.total - count.norms) + scores


def training_flops_per_token(config: ModelConfig, tokens: int, causal: bool) -> int:
    """Floating-point operations to train on one token of a sample of `tokens` tokens.

    Causal counts the scores that the mask leaves, 6 P + 6 L d T. Otherwise all are counted,
    6 P + 12 L d T, the convention of PaLM (Chowdhery et al. 2022, appendix B). Neither counts
    what checkpointing recomputes.
    """
    scores = config.num_decoder_layers * config.embedding_dimensions * tokens
    return 6 * count_parameters(config).total + (6 if causal else 12) * scores


def compute_optimal_tokens(config: ModelConfig, tokens_per_parameter: float = 20.0) -> int:
    """Tokens for the lowest loss that the compute can buy, after Hoffmann et al. 2022."""
    return round(count_parameters(config).total * tokens_per_parameter)


def training_flops(config: ModelConfig, tokens: int, total_tokens: int, causal: bool) -> int:
    """Floating-point operations of a run; the arguments of `training_flops_per_token`."""
    return total_tokens * training_flops_per_token(config, tokens, causal)


def inference_memory(
    config: ModelConfig, context_length: int, bytes_per_value: int
) -> InferenceMemory:
    """Bytes of the weights and of a full key/value cache, all of them `bytes_per_value` wide."""
    weights = count_parameters(config).total
    cache = 2 * config.num_decoder_layers * config.kv_dimensions * context_length
    return InferenceMemory(weights=weights * bytes_per_value, cache=cache * bytes_per_value)


def training_memory(config: SizeConfig) -> MemoryPlan:
    """The bytes at the fullest moment of a training step; `peak` is their sum.

    The step is eager, without dropout, on one device that has the whole model. Attention
    neither keeps the T x T scores nor repeats keys and values, and the loss is computed in
    chunks of tokens.
    """
    return max(training_moments(config).values(), key=lambda moment: moment.peak)


def training_moments(config: SizeConfig) -> dict[str, MemoryPlan]:
    """The bytes at each moment of a training step that can be the fullest, by name."""
    count = count_parameters(config)
    d, weights = config.embedding_dimensions, FLOAT32 * count.total
    tokens = config.batch_size * config.tokens_per_sample
    # From the second batch of an update on, the gradients are there all the time.
    step = MemoryPlan(weights=weights, gradients=weights, optimizer=_optimizer_bytes(config))
    # A checkpointed block keeps its input alone.
    kept = FLOAT32 * d if config.activation_checkpointing else _block_bytes_per_token(config)
    blocks = tokens * config.num_decoder_layers * kept
    busy = dataclasses.replace(step, activations=blocks, autocast_copies=_autocast_bytes(config))
    width = MATMUL_BYTES[config.precision]
    # The final norm's input and output, and the gradient of the latter, known with the loss.
    head = blocks + tokens * (FLOAT32 * (2 * d + 1) + 2 * width * d)
    logits = min(tokens, LOSS_CHUNK) * config.vocabulary_size * (width + FLOAT32)
    cast = 0 if config.precision == "float32" else width * count.embedding
    # The head's gradient waits for that of the embedding, which is the same matrix.
    in_flight = FLOAT32 * count.embedding + tokens * _backward_bytes_per_token(config)
    if config.activation_checkpointing:
        in_flight += _copied_bytes(config) // config.num_decoder_layers
    return {
        "loss": dataclasses.replace(
            busy, activations=head, logits=logits, transient=FLOAT32 * count.embedding + cast
        ),
        "head": dataclasses.replace(
            busy, activations=head, transient=2 * FLOAT32 * count.embedding + width * tokens * d
        ),
        "backward": dataclasses.replace(busy, transient=in_flight),
        "step": dataclasses.replace(step, transient=_update_bytes(config)),
    }


def _update_bytes(config: SizeConfig) -> int:
    """AdamW is fused. The others write a matrix's update several times before applying it."""
    count = count_parameters(config)
    d, hidden = config.embedding_dimensions, config.hidden_dimensions
    if config.optimizer == "adamw":
        return 0
    if config.optimizer == "adafactor":
        return 3 * FLOAT32 * max(count.embedding, d * hidden)
    return 4 * FLOAT32 * d * hidden


def _optimizer_bytes(config: SizeConfig) -> int:
    """AdamW: two averages for each parameter; Muon: one for those of the blocks' matrices.
    Adafactor: a row and a column for each matrix.
    """
    count = count_parameters(config)
    if config.optimizer == "adamw":
        return 2 * FLOAT32 * count.total
    if config.optimizer == "muon":
        matrices = count.attention + count.mlp
        return FLOAT32 * (matrices + 2 * (count.total - matrices))
    d = config.embedding_dimensions
    # The sides of q and out, of k and v, and of the two matrices of the MLP.
    block = 2 * (d + d) + 2 * (d + config.kv_dimensions) + 2 * (d + config.hidden_dimensions)
    matrices = config.vocabulary_size + d + config.num_decoder_layers * block
    return FLOAT32 * (matrices + count.norms)


def _autocast_bytes(config: SizeConfig) -> int:
    """Copies of the matrices that are kept for the backward pass; checkpointed blocks make
    theirs again when they are recomputed.
    """
    return 0 if config.activation_checkpointing else _copied_bytes(config)


def _copied_bytes(config: SizeConfig) -> int:
    """Copies of the blocks' matrices: the three of attention's input are joined into one, and
    autocast copies all in bfloat16.
    """
    count = count_parameters(config)
    d = config.embedding_dimensions
    if config.precision == "float32":
        return FLOAT32 * config.num_decoder_layers * d * (d + 2 * config.kv_dimensions)
    return MATMUL_BYTES[config.precision] * (count.attention + count.mlp)


def _block_bytes_per_token(config: SizeConfig) -> int:
    """What autograd saves of a block: 16 d + 8 + 4 H + w (4 d + 2 kv + 2 r d) for each token.

    Each norm saves its input, one over its root mean square, and their product: 8 d + 4.
    In w bytes the products save the norms' outputs, q, k, v and attention's output, which
    also has the log-sum-exp of each head, and both sides of the MLP's SiLU.
    """
    d, heads = config.embedding_dimensions, config.num_q_heads
    values = 4 * d + 2 * config.kv_dimensions + 2 * config.hidden_dimensions
    return FLOAT32 * (4 * d + 2 + heads) + MATMUL_BYTES[config.precision] * values


def _backward_bytes_per_token(config: SizeConfig) -> int:
    """What the backward pass of a block adds at its fullest, in the second matrix of the MLP.

    The gradient of the residual stream, its cast under autocast and the gradient of the
    hidden neurons; with checkpointing also the recomputed block, but for its input.
    """
    d = config.embedding_dimensions
    cast = 0 if config.precision == "float32" else d
    gradients = FLOAT32 * d + MATMUL_BYTES[config.precision] * (cast + config.hidden_dimensions)
    recomputed = _block_bytes_per_token(config) - FLOAT32 * d
    return gradients + (recomputed if config.activation_checkpointing else 0)


def usable_memory(memory: int) -> int:
    """The bytes of a device that live tensors can fill.

    A twentieth is the allocator's slack; 1 GB, or a tenth below 4 GB, is for the device's
    context. Just above 4 GB the answer stays level, so that more memory never holds less.
    """
    return int(max(0.95 * memory - 1e9, 0.85 * min(memory, 4e9)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A published shape and the settings to train it with."""

    name: str
    config: SizeConfig
    gradient_accumulation_steps: int

    @property
    def memory(self) -> MemoryPlan:
        return training_memory(self.config)

    @property
    def command(self) -> str:
        """The line to type: the flags that differ from their defaults, the shape first."""
        values = self.config.as_dict()
        values["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        fields = dataclasses.fields(PretrainConfig)
        words = ["nope", "pretrain"]
        for field in sorted(fields, key=lambda field: field.metadata["panel"] != MODEL):
            value = values.get(field.name, field.default)
            if value != field.default:
                words += [flag_of(field)] if value is True else [flag_of(field), str(value)]
        return shlex.join(words)


def largest_that_trains(memory: int, config: SizeConfig) -> Plan:
    """Find the largest published shape that trains in `memory` bytes, and its largest batch.

    Samples, vocabulary, optimizer and precision are the config's. The samples in an update
    are as many as `nope pretrain` takes by default.

    Raises:
        CapacityError: Not even the smallest shape fits; names the largest part of what it
            needs, and the command with the least change that fits.
    """
    usable = usable_memory(memory)
    if plan := _first_that_fits(usable, [config]):
        return plan
    *_, smallest = _plans(config)
    needed = smallest.memory
    part, amount = max(needed.as_dict().items(), key=lambda item: item[1])
    reduced = _first_that_fits(usable, _reductions(config))
    raise CapacityError(
        f"{smallest.name}, the smallest shape, needs {format_bytes(needed.peak)} to train even "
        f"with activation checkpointing, and {format_bytes(usable)} are usable; the largest part "
        f"is {part.replace('_', ' ')}, {format_bytes(amount)}",
        where=f"--memory {config.memory or format_bytes(memory)}",
        hint=reduced.command if reduced else "train on a device with more memory",
    )


def _first_that_fits(usable: int, configs: Iterable[SizeConfig]) -> Plan | None:
    plans = (plan for config in configs for plan in _plans(config))
    return next((plan for plan in plans if plan.memory.peak <= usable), None)


def _plans(config: SizeConfig) -> Iterator[Plan]:
    """The plans to try: large shapes first, then without recomputation, then large batches."""
    default = PretrainConfig()
    samples = default.batch_size * default.gradient_accumulation_steps
    batches = [1 << power for power in reversed(range(samples.bit_length()))]
    recomputing = sorted({config.activation_checkpointing, True})
    shapes = sorted(PUBLISHED_SHAPES.items(), key=lambda item: -count_parameters(item[1]).total)
    for (name, shape), recompute, batch in itertools.product(shapes, recomputing, batches):
        values = {**shape.as_dict(), "vocabulary_size": config.vocabulary_size}
        values |= {"activation_checkpointing": recompute, "batch_size": batch}
        yield Plan(name, config.changed(**values), samples // batch)


def _reductions(config: SizeConfig) -> Iterator[SizeConfig]:
    """Settings that need less memory, from the least change to the greatest."""
    tokens = config.tokens_per_sample
    while tokens >= 64:  # a shorter context has hardly anything to attend to
        for optimizer in (config.optimizer, "adafactor"):
            yield config.changed(tokens_per_sample=tokens, optimizer=optimizer)
        tokens //= 2
