"""The order of training is a pure function, and every token is trained on as often as said."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nope_gpt.data.batches import Batch, TextBatches
from nope_gpt.data.chats import ChatBatches, end_to_end, packed, padded
from nope_gpt.data.encoding import EncodedDocument, token_dtype
from nope_gpt.data.finding import find_dataset
from nope_gpt.data.ordering import shuffled
from nope_gpt.data.shards import Dataset, TokenStream
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.files.artefacts import FORMAT_VERSION, MANIFEST, describe

IGNORED = -100
START, STOP = 7, 8
"""The control tokens around a message."""

SEEDS = st.integers(0, (1 << 63) - 1)
Documents = list[EncodedDocument]


def write(
    path: Path,
    shards: list[tuple[Documents, Documents]],
    *,
    vocabulary: int = 1 << 20,
    content: str = "text",
    sources: list[str] | None = None,
) -> Dataset:
    """A data set of shards, each of documents to train on and documents held out."""
    manifest: dict[str, Any] = {
        "kind": "dataset",
        "format_version": FORMAT_VERSION,
        "content": content,
        "tokenizer": {"name": "none", "fingerprint": "", "vocabulary_size": vocabulary},
        "token_dtype": token_dtype(vocabulary).name,
        "shards": [],
    }
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for number, (train, held_out) in enumerate(shards):
        name = f"shard-{number:05d}"
        counts = write_arrays(path / name, train + held_out, token_dtype(vocabulary))
        first = len(train)
        manifest["shards"].append(
            {
                "name": name,
                "source": sources[number] if sources else "source",
                "train_documents": first,
                "train_tokens": sum(counts[:first]),
                "holdout_documents": len(held_out),
                "holdout_tokens": sum(counts[first:]),
            }
        )
    # Like `publish`, without waiting for the disk.
    manifest["files"] = {file.name: describe(file) for file in path.iterdir()}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return Dataset.open(path)


def write_arrays(path: Path, documents: Documents, dtype: np.dtype[Any]) -> list[int]:
    """The files of a shard; returns how long each document is."""
    counts = [document.tokens.size for document in documents]
    tokens = np.concatenate([document.tokens for document in documents]).astype(dtype)
    np.save(f"{path}.tokens.npy", tokens)
    np.save(f"{path}.ends.npy", np.cumsum(counts, dtype=np.int64))
    masks = [document.mask for document in documents if document.mask is not None]
    if masks:
        np.save(f"{path}.mask.npy", np.concatenate(masks))
    return counts


def text(*tokens: int) -> EncodedDocument:
    return EncodedDocument(np.array(tokens, dtype=np.int64))


def counting(path: Path, train: int, held_out: int = 0) -> Dataset:
    """Text whose tokens count up from 0, and a hold-out that goes on counting."""
    parts = [text(*range(train))], [text(*range(train, train + held_out))] if held_out else []
    return write(path, [parts])


def text_batches(dataset: Dataset, **changes: Any) -> TextBatches:
    options = {"tokens_per_sample": 4, "batch_size": 3, "micro_batches_per_step": 4, "seed": 0}
    return TextBatches(dataset, **(options | changes))


def in_order(batches: Any, step: int, world_size: int) -> list[Batch]:
    """The micro-batches of a step, gathered from all ranks in the order of one."""
    shares = [batches.micro_batches(step, rank, world_size) for rank in range(world_size)]
    return [batch for place in zip(*shares, strict=True) for batch in place]


def equal(first: list[Batch], second: list[Batch]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) for a, b in pairs
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), SEEDS, st.integers(0, 1 << 30))
def test_shuffling_visits_every_sample_once(size: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**k + d for k in range(1, 12) for d in (-1, 0, 1)])
def test_shuffling_visits_every_sample_once_around_powers_of_two(size: int) -> None:
    assert np.array_equal(np.sort(shuffled(np.arange(size), size, 1, 0)), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1 << 40), SEEDS, st.data())
def test_the_place_of_a_sample_does_not_depend_on_what_else_is_asked(
    size: int, seed: int, data: st.DataObject
) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    together = shuffled(index, size, seed, 3)
    alone = [int(shuffled(index[i : i + 1], size, seed, 3)[0]) for i in range(len(index))]
    assert together.tolist() == alone
    assert (together >= 0).all()
    assert (together < size).all()


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    size = 1000
    choices = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), ((1 << 63) - 1, 0)]
    orders = [shuffled(np.arange(size), size, *choice) for choice in choices]
    for one, other in itertools.combinations([np.arange(size), *orders], 2):
        assert (one == other).mean() < 0.02
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_the_order_is_the_same_in_every_version() -> None:
    # A run that is resumed after an upgrade goes on in the order that it began.
    assert shuffled(np.arange(10), 10, 0, 0).tolist() == [1, 9, 6, 4, 7, 0, 8, 3, 5, 2]
    assert shuffled(np.arange(5), 1 << 33, 42, 7).tolist() == [
        3904468020,
        1509077976,
        2835107417,
        8236754423,
        523677060,
    ]


def test_an_anchor_is_written_into_a_copy() -> None:
    batch = Batch(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))
    assert batch.beginning_with(7).tokens.tolist() == [[7, 1, 1]] * 2
    assert batch.tokens.tolist() == [[1, 1, 1]] * 2


def test_targets_are_the_tokens_one_later(tmp_path: Path) -> None:
    batches = text_batches(counting(tmp_path / "data", 100))
    for batch in batches.micro_batches(0, 0, 1):
        assert batch.tokens.shape == batch.targets.shape == (3, 4)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert torch.equal(batch.tokens[:, 0] % 4, torch.zeros(3, dtype=torch.int64))
        assert batch.num_trained == 12


@pytest.mark.parametrize(("tokens", "per_step"), [(101, 1), (101, 4), (101, 25), (101, 40), (9, 5)])
def test_every_sample_of_an_epoch_is_trained_on_once(
    tmp_path: Path, tokens: int, per_step: int
) -> None:
    dataset = counting(tmp_path / "data", tokens)
    batches = text_batches(dataset, batch_size=1, micro_batches_per_step=per_step, seed=9)
    num_samples = (tokens - 1) // 4
    assert batches.num_samples == num_samples
    assert batches.steps_per_epoch == -(-num_samples // per_step)
    steps = -(-3 * num_samples // per_step)
    drawn = [
        int(batch.tokens[0, 0]) // 4
        for step in range(steps)
        for batch in batches.micro_batches(step, 0, 1)
    ]
    epochs = [drawn[i * num_samples : (i + 1) * num_samples] for i in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_samples))] * 3
    if num_samples > 10:
        assert len(set(map(tuple, epochs))) == 3


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 80), length=st.integers(1, 20))
def test_the_last_sample_is_whole_for_every_number_of_tokens(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int
) -> None:
    dataset = counting(tmp_path_factory.getbasetemp() / "lengths", tokens, held_out=1)
    options = {"tokens_per_sample": length, "batch_size": 1, "micro_batches_per_step": 1}
    if tokens <= length:
        with pytest.raises(NopeError, match=f"{tokens} tokens to train on.*needs {length + 1}"):
            text_batches(dataset, **options)
        return
    batches = text_batches(dataset, **options)
    assert batches.num_samples == (tokens - 1) // length
    seen = Counter[int]()
    for step in range(batches.num_samples):
        (batch,) = batches.micro_batches(step, 0, 1)
        assert batch.targets.shape == (1, length)
        seen.update(batch.targets[0].tolist())
    assert seen == Counter(range(1, batches.num_samples * length + 1))


def test_a_sample_too_long_for_the_text_is_refused_with_a_length_that_fits(tmp_path: Path) -> None:
    dataset = counting(tmp_path / "data", 100)
    with pytest.raises(NopeError, match="100 tokens .* needs 4,097") as caught:
        text_batches(dataset, tokens_per_sample=4096)
    assert caught.value.where == str(dataset.path)
    flag, length = str(caught.value.hint).split(",")[0].split()
    assert flag == "--tokens-per-sample"
    assert text_batches(dataset, tokens_per_sample=int(length)).num_samples >= 8


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_trains_on_the_same_micro_batches(
    tmp_path: Path, world_size: int
) -> None:
    batches = text_batches(counting(tmp_path / "data", 200))
    for step in (0, 3, 4, 5, 100):
        alone = batches.micro_batches(step, 0, 1)
        assert len(alone) == 4
        assert equal(in_order(batches, step, world_size), alone)


def test_a_step_does_not_depend_on_the_steps_before(tmp_path: Path) -> None:
    dataset = counting(tmp_path / "data", 200)
    first, second = text_batches(dataset, seed=5), text_batches(dataset, seed=5)
    forward = [first.micro_batches(step, 0, 1) for step in range(9)]
    backward = [second.micro_batches(step, 0, 1) for step in reversed(range(9))]
    assert all(map(equal, forward, reversed(backward)))
    other = text_batches(dataset, seed=6)
    assert not equal(other.micro_batches(0, 0, 1), forward[0])


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(
        st.tuples(*[st.lists(st.integers(1, 5), max_size=3)] * 2).filter(any),
        min_size=1,
        max_size=4,
    ),
    start=st.integers(0, 40),
    count=st.integers(0, 40),
)
def test_a_stream_is_its_shards_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[tuple[list[int], list[int]]],
    start: int,
    count: int,
) -> None:
    counter = itertools.count()
    written = [
        tuple([text(*itertools.islice(counter, size)) for size in sizes] for sizes in shard)
        for shard in shards
    ]
    dataset = write(tmp_path_factory.getbasetemp() / "stream", written)
    for holdout in (False, True):
        documents = [document for shard in written for document in shard[holdout]]
        whole = [token for document in documents for token in document.tokens.tolist()]
        stream = TokenStream(dataset, holdout=holdout)
        assert len(stream) == len(whole)
        assert stream.read(start, count).tolist() == whole[start : start + count]


@settings(max_examples=40, deadline=None)
@given(
    held_out=st.integers(0, 40),
    length=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 4),
    limit=st.integers(1, 12),
)
def test_each_held_out_token_is_evaluated_once_and_never_trained_on(
    tmp_path_factory: pytest.TempPathFactory,
    held_out: int,
    length: int,
    batch_size: int,
    world_size: int,
    limit: int,
) -> None:
    dataset = counting(tmp_path_factory.getbasetemp() / "holdout", 20, held_out)
    batches = text_batches(dataset, tokens_per_sample=length, batch_size=batch_size)
    shares = [list(batches.holdout(limit, rank, world_size)) for rank in range(world_size)]
    assert len(set(map(len, shares))) == 1, "every rank has as many batches"
    seen: list[int] = []
    for batch in itertools.chain(*shares):
        counts = batch.targets != IGNORED
        assert torch.equal(batch.targets[counts], batch.tokens[counts] + 1)
        seen += batch.targets[counts].tolist()
    assert sorted(seen) == list(range(21, 20 + held_out))[: limit * length]
    train = {int(t) for batch in batches.micro_batches(0, 0, 1) for t in batch.targets.flatten()}
    assert max(train) < 20


def test_a_token_outside_the_vocabulary_is_refused_and_its_shard_is_named(tmp_path: Path) -> None:
    shards = [([text(*range(20))], []), ([text(30, *range(9))], [])]
    dataset = write(tmp_path / "data", shards, vocabulary=30)
    batches = text_batches(dataset, batch_size=1, micro_batches_per_step=1)
    with pytest.raises(NopeError, match="token 30 is outside the vocabulary of 30") as caught:
        for step in range(batches.num_samples):
            batches.micro_batches(step, 0, 1)
    assert caught.value.where == str(tmp_path / "data" / "shard-00001.tokens.npy")


def chat(*messages: tuple[str, int], first: int = 100) -> EncodedDocument:
    """A conversation: the content of each message is as many tokens, counting from `first`."""
    tokens: list[int] = []
    mask: list[int] = []
    counter = itertools.count(first)
    for role, size in messages:
        content = list(itertools.islice(counter, size))
        written = int(role == "assistant")
        tokens += [START, *content, STOP]
        mask += [0, *[written] * size, written]
    return EncodedDocument(np.array(tokens), np.array(mask, dtype=np.uint8))


USER, ANSWER = ("user", 3), ("assistant", 2)
MESSAGES = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.integers(0, 6)),
    min_size=1,
    max_size=6,
)


def chats(path: Path, train: Documents, held_out: Documents | None = None) -> Dataset:
    return write(path, [(train, held_out or [])], content="chat")


def chat_batches(dataset: Dataset, **changes: Any) -> ChatBatches:
    options: dict[str, Any] = {
        "subsets": "all",
        "max_tokens_per_sample": 100,
        "filter_long_samples": False,
        "message_start": START,
        "batch_size": 2,
        "micro_batches_per_step": 2,
        "seed": 0,
        "packed": False,
    }
    return ChatBatches(dataset, **(options | changes))


def sizes(*lengths: int) -> Documents:
    """Conversations of one answer each, told apart by their tokens."""
    return [
        chat(USER, ("assistant", length), first=100 * (number + 1))
        for number, length in enumerate(lengths)
    ]


def test_padding_and_what_others_wrote_is_ignored(tmp_path: Path) -> None:
    documents = sizes(2, 9)
    batches = chat_batches(chats(tmp_path / "data", documents), micro_batches_per_step=1)
    (batch,) = batches.micro_batches(0, 0, 1)
    longest = max(document.tokens.size for document in documents) - 1
    assert batch.tokens.shape == batch.targets.shape == (2, longest)
    assert batch.num_trained == 2 + 9 + 2, "the answers and what ends them"
    for row, targets in zip(batch.tokens, batch.targets, strict=True):
        (document,) = (d for d in documents if d.tokens[1] == row[1])
        assert document.mask is not None
        size = document.tokens.size - 1
        assert row[:size].tolist() == document.tokens[:-1].tolist()
        expected = np.where(document.mask[1:] == 1, document.tokens[1:], IGNORED).tolist()
        assert targets.tolist() == expected + [IGNORED] * (longest - size)


@settings(max_examples=100, deadline=None)
@given(messages=MESSAGES, limit=st.integers(2, 30))
def test_a_long_conversation_loses_whole_messages_from_its_end(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[str, int]], limit: int
) -> None:
    # As much as fits is kept: the network sees all tokens but the last.
    kept = [end for end in range(1, len(messages) + 1)
            if chat(*messages[:end]).tokens.size <= limit + 1]  # fmt: skip
    expected = chat(*messages[: max(kept, default=0)])
    document = chat(*messages)
    companion = chat(USER, ("assistant", 0), first=500)  # Always fits, but for the smallest limit.
    dataset = chats(tmp_path_factory.getbasetemp() / "cut", [document, companion])
    is_long = document.tokens.size > limit + 1
    usable = expected.mask is not None and expected.mask[1:].any()
    for filter_long in (False, True):
        try:
            batches = chat_batches(
                dataset, max_tokens_per_sample=limit, filter_long_samples=filter_long
            )
        except NopeError:
            assert limit < companion.tokens.size - 1
            continue
        found = [d for (d,) in batches.train if d.tokens[1:2] != [500]]
        wanted = bool(usable) and not (is_long and filter_long)
        assert len(found) == wanted
        if wanted:
            assert found[0].tokens.tolist() == expected.tokens.tolist()
            assert found[0].mask is not None
            assert expected.mask is not None
            assert found[0].mask.tolist() == expected.mask.tolist()


def test_cut_and_refused_conversations_are_counted(tmp_path: Path) -> None:
    short, long = chat(USER, ANSWER), chat(USER, ANSWER, USER, ANSWER)
    too_long, mute = chat(("user", 50), ANSWER), chat(USER)
    dataset = chats(tmp_path / "data", [short, long, too_long, mute], [long, too_long])
    cutting = chat_batches(dataset, max_tokens_per_sample=12)
    assert (cutting.num_samples, len(cutting.held_out)) == (2, 1)
    assert (cutting.num_cut, len(cutting.refused)) == (2, 3)
    filtering = chat_batches(dataset, max_tokens_per_sample=12, filter_long_samples=True)
    assert (filtering.num_samples, len(filtering.held_out)) == (1, 0)
    assert (filtering.num_cut, len(filtering.refused)) == (0, 5)


@pytest.mark.parametrize("filter_long", [False, True])
def test_conversations_that_all_are_too_long_are_refused(tmp_path: Path, filter_long: bool) -> None:
    dataset = chats(tmp_path / "data", [chat(("user", 50), ANSWER)] * 3)
    with pytest.raises(
        NopeError,
        match="no conversation can be trained on: 3 have.*shard-00000:0, shard-00000:1, shard-000",
    ) as caught:
        chat_batches(dataset, max_tokens_per_sample=20, filter_long_samples=filter_long)
    assert caught.value.where == str(dataset.path)
    assert "--max-tokens-per-sample" in str(caught.value.hint)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 4, 7, 9, 13])
def test_no_step_mixes_passes_and_each_conversation_is_trained_on_once_in_each(
    tmp_path: Path, count: int, world_size: int
) -> None:
    documents = sizes(*[1 + number % 5 for number in range(count)])
    batches = chat_batches(
        chats(tmp_path / "data", documents), batch_size=2, micro_batches_per_step=4
    )
    assert batches.steps_per_epoch == -(-count // 8)
    orders = []
    for epoch in range(2):
        seen: list[int] = []
        for place in range(batches.steps_per_epoch):
            step = epoch * batches.steps_per_epoch + place
            shares = [batches.micro_batches(step, rank, world_size) for rank in range(world_size)]
            assert len(set(map(len, shares))) == 1, "every rank has as many micro-batches"
            for batch in in_order(batches, step, world_size):
                seen += [first for first in batch.tokens[:, 1:2].flatten().tolist() if first]
        assert sorted(seen) == [100 * (number + 1) for number in range(count)]
        orders.append(seen)
    if count > 4:
        assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_trains_on_the_same_conversations(
    tmp_path: Path, world_size: int
) -> None:
    dataset = chats(tmp_path / "data", sizes(*range(1, 12)), sizes(3, 4, 5))
    batches = chat_batches(dataset, micro_batches_per_step=4)
    for step in range(4):
        alone, together = batches.micro_batches(step, 0, 1), in_order(batches, step, world_size)
        assert equal(together[: len(alone)], alone)
        assert all(batch.num_trained == 0 for batch in together[len(alone) :])
    shares = [list(batches.holdout(3, rank, world_size)) for rank in range(world_size)]
    assert len(set(map(len, shares))) == 1
    assert sum(batch.num_trained for share in shares for batch in share) == 4 + 5 + 6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), max_size=30), st.integers(40, 90))
def test_packs_hold_every_conversation_once_and_no_more_than_they_may(
    lengths: list[int], capacity: int
) -> None:
    samples = [(text(*range(length)),) for length in lengths]
    packs = packed(samples, capacity)
    assert Counter(id(sample) for pack in packs for sample in pack) == Counter(map(id, samples))
    taken = [sum(document.tokens.size - 1 for (document,) in pack) for pack in packs]
    assert all(0 < tokens <= capacity for tokens in taken)
    assert all(one + other > capacity for one, other in itertools.pairwise(taken)), "too many"


def test_a_pack_trains_what_rows_of_their_own_train() -> None:
    documents = [chat(USER, ANSWER, first=first) for first in (100, 200, 300)]
    samples = [(document,) for document in documents]
    pack, rows = end_to_end(samples), padded(samples)
    assert pack.targets[0].tolist() == rows.targets.flatten().tolist()
    assert 0 < pack.num_trained == rows.num_trained < pack.targets.numel()


def test_a_limit_on_the_hold_out_counts_conversations(tmp_path: Path) -> None:
    batches = chat_batches(chats(tmp_path / "data", sizes(1), sizes(1, 2, 3, 4, 5)))
    assert [batch.tokens.shape[0] for batch in batches.holdout(3, 0, 1)] == [2, 1]
    assert sum(batch.num_trained for batch in batches.holdout(99, 0, 1)) == 15 + 5


def test_subsets_are_chosen_by_name(tmp_path: Path) -> None:
    shards: list[tuple[Documents, Documents]] = [
        ([chat(USER, ANSWER, first=first)], [chat(USER, ANSWER, first=first + 50)])
        for first in (100, 200, 300)
    ]
    dataset = write(tmp_path / "data", shards, content="chat", sources=["a", "b", "a"])

    def firsts(subsets: str) -> tuple[list[int], list[int]]:
        batches = chat_batches(dataset, subsets=subsets)
        train, held_out = (
            [int(document.tokens[1]) for (document,) in split]
            for split in (batches.train, batches.held_out)
        )
        return train, held_out

    assert firsts("all") == firsts("a,b") == firsts("b, all") == ([100, 300, 200], [150, 350, 250])
    assert firsts("a") == ([100, 300], [150, 350])
    assert firsts(" b ") == ([200], [250])
    with pytest.raises(MissingError, match="there is no subset 'c'; there are a, b") as caught:
        firsts("a,c")
    assert "--dataset-subset" in str(caught.value.hint)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root of data sets with one of text and one of conversations."""
    path = tmp_path / "root"
    write(path / "prose", [([text(1, 2)], [])])
    chats(path / "talk", sizes(1))
    (path / "unrelated").mkdir()
    return path


def test_the_only_data_set_that_fits_is_meant(root: Path) -> None:
    assert find_dataset(root, None) == root / "prose"
    assert find_dataset(root, None, content="chat") == root / "talk"


def test_a_data_set_is_meant_by_its_name_or_its_directory(root: Path) -> None:
    assert find_dataset(root, "talk") == root / "talk"
    assert find_dataset(root / "talk", None) == root / "talk"


@pytest.mark.parametrize("named", ["prose", None])
def test_a_data_set_that_is_named_has_the_tokens_it_has(root: Path, named: str | None) -> None:
    """A subset or an encoding beside it would have no effect."""
    place = root if named else root / "prose"
    for fineweb in (("sample-10BT", None), (None, "cl100k_base")):
        with pytest.raises(UsageError, match="choose among data sets of FineWeb, and one is named"):
            find_dataset(place, named, fineweb=fineweb)


def test_one_of_several_data_sets_must_be_named(root: Path) -> None:
    write(root / "more", [([text(1, 2)], [])])
    with pytest.raises(UsageError, match="several data sets: more, prose") as caught:
        find_dataset(root, None)
    assert caught.value.hint == "choose one: --dataset more"
    assert find_dataset(root, None, content="chat") == root / "talk"


def test_what_a_killed_program_left_is_no_data_set(root: Path) -> None:
    for leftover in ("prose.tmp-4711", "prose.old-4711"):
        write(root / leftover, [([text(1, 2)], [])])
    assert find_dataset(root, None) == root / "prose"


@pytest.mark.parametrize("name", ["other", "../root/talk", "unrelated", "talk/"])
def test_a_name_that_is_not_there_lists_those_that_are(root: Path, name: str) -> None:
    with pytest.raises(MissingError, match="no data set .*; there are prose, talk") as caught:
        find_dataset(root, name)
    assert caught.value.where == str(root)
    assert "nope prepare" in str(caught.value.hint)


@pytest.mark.parametrize(("content", "held"), [("text", "text"), ("chat", "conversations")])
def test_a_root_without_a_data_set_says_how_to_make_one(
    tmp_path: Path, content: str, held: str
) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(MissingError, match=f"no data set of {held}") as caught:
            find_dataset(path, None, content=content)
        assert caught.value.where == str(path)
        assert str(caught.value.hint).startswith("nope prepare python-docs")
    with pytest.raises(MissingError, match="no data set 'x'; nor any other"):
        find_dataset(tmp_path, "x", content=content)


@pytest.mark.parametrize(
    ("fineweb", "expected"),
    [
        (("sample-10BT", None), "fineweb-sample-10BT-r50k_base"),
        ((None, "r50k_base"), "fineweb-sample-10BT-r50k_base"),
        (("sample-100BT", "cl100k_base"), "fineweb-sample-100BT-cl100k_base"),
        (("none", None), "fineweb-r50k_base"),
        ((None, None), "fineweb-sample-10BT-r50k_base"),  # The default, where it is prepared.
    ],
)
def test_a_subset_and_an_encoding_name_a_fineweb_data_set(
    root: Path, fineweb: tuple[str | None, str | None], expected: str
) -> None:
    if fineweb != (None, None):
        with pytest.raises(MissingError, match=f"no data set '{expected}'"):
            find_dataset(root, None, fineweb)
    write(root / expected, [([text(1, 2)], [])])
    assert find_dataset(root, None, fineweb) == root / expected
    assert find_dataset(root, "prose") == root / "prose"


def test_a_damaged_data_set_in_the_root_is_named(root: Path) -> None:
    (root / "prose" / MANIFEST).write_text("{")
    with pytest.raises(NopeError, match="manifest is damaged") as caught:
        find_dataset(root, None)
    assert caught.value.where == str(root / "prose" / MANIFEST)
