"""Many prompts at once are each prompt alone, and a file of them survives what ends it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import RECIPE, byte_dataset, small_model
from test_chat import TOKENIZER

from nope_gpt.config import PretrainConfig, SamplingConfig
from nope_gpt.errors import CapacityError, NopeError, UsageError
from nope_gpt.generation.batching import Request, answers
from nope_gpt.generation.continuation import continuation
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.pretraining import pretrain

Nope = Callable[..., subprocess.CompletedProcess[str]]

BYTES = BaseTokenizer.of_bytes()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_text_does_not_depend_on_its_neighbours(batch_size: int) -> None:
    """Prompts of unequal length, some longer than the context, more of them than rows."""
    model = small_model(vocabulary_size=257)
    requests = [Request(list(range(1, 3 + 5 * (i % 6))), seed=i) for i in range(11)]
    sampling = SamplingConfig(max_tokens=9, context_length=20, pin_tokens=2, compile="off")
    got = list(answers(model, BYTES, requests, sampling, batch_size))
    assert [answer.index for answer in got] == list(range(11))
    for answer, request in zip(got, requests, strict=True):
        generator = torch.Generator().manual_seed(request.seed)
        tokens = []
        for choice in continuation(model, request.prompt, sampling, generator):
            tokens.append(int(choice.token))
            if tokens[-1] in BYTES.stop_tokens:
                break
        assert answer.new_tokens == len(tokens)
        assert answer.text == BYTES.decode_tokens([t for t in tokens if t not in BYTES.stop_tokens])
        assert answer.reason == ("stop" if tokens[-1] in BYTES.stop_tokens else "length")


def test_answers_come_in_the_order_of_their_requests_whenever_they_are_done() -> None:
    model = small_model(vocabulary_size=257)
    sampling = SamplingConfig(max_tokens=30, stop=tuple("abcdefghijklm"), compile="off")
    got = list(answers(model, BYTES, [Request([1], seed) for seed in range(12)], sampling, 4))
    assert len({answer.new_tokens for answer in got}) > 3
    assert [answer.index for answer in got] == list(range(12))


def test_no_requests_have_no_answers() -> None:
    assert list(answers(small_model(), BYTES, [], SamplingConfig(), 4)) == []


def test_too_many_contexts_for_the_memory_are_refused() -> None:
    requests = [Request([1], seed=0)] * 4096
    sampling = SamplingConfig(context_length=1 << 30, max_tokens=1 << 30)
    with pytest.raises(CapacityError, match=r"a cache of 4096 x 1,073,741,824 tokens takes"):
        next(answers(small_model(), BYTES, requests, sampling, 4096))
    with pytest.raises(UsageError, match="holds token 61"):
        next(answers(small_model(), BYTES, [Request([61], 0)], SamplingConfig(), 1))


@pytest.fixture
def model(corpus: Path, tmp_path: Path) -> Path:
    dataset = byte_dataset(corpus, tmp_path / "datasets")
    settings = RECIPE | {"dataset_path": str(dataset), "run_dir_path": str(tmp_path / "runs")}
    return pretrain(PretrainConfig(**settings | {"max_steps": 1}), [])


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_in(path: Path, count: int) -> list[dict[str, object]]:
    lines = [{"prompt": f"The {'list ' * (i % 4)}", "id": i} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


@pytest.mark.slow
def test_a_file_of_prompts_becomes_a_file_of_texts_whatever_ends_it(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    """Killed, torn in a line, or answered in other batches: the file is the same."""
    source = tmp_path / "prompts.jsonl"
    prompts = prompts_in(source, 40)
    flags = ["--model", model, "--max-tokens=120", "--seed=3", "--device=cpu", "--dtype=float32"]
    flags += ["--compile=off", "--input", source]
    whole = nope("generate", *flags, "--output", "whole.jsonl", "--json")
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout) == {"output": "whole.jsonl", "lines": 40}
    done = lines_of(tmp_path / "whole.jsonl")
    assert [{"prompt": line["prompt"], "id": line["id"]} for line in done] == prompts
    assert {line["reason"] for line in done} <= {"stop", "length"}
    assert len({line["text"] for line in done}) > 30, "each has a randomness of its own"

    target = tmp_path / "parts.jsonl"
    command = [sys.executable, "-m", "nope_gpt.cli", "generate", *map(str, flags)]
    process = subprocess.Popen(
        [*command, "--output", str(target), "--batch-size=3"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not target.exists() or target.read_bytes().count(b"\n") < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with target.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "The li')
    rest = nope("generate", *flags, "--output", target, "--batch-size=7")
    assert rest.returncode == 0, rest.stderr
    assert "of 40 lines are there already" in rest.stderr
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    again = nope("generate", *flags, "--output", target)
    assert "40 of 40 lines are there already" in again.stderr
    other = nope("generate", *flags, "--output", target, "--num-samples=2")
    assert other.returncode == 2, "one text a line is not two samples a line"
    prompts_in(source, 3)
    refused = nope("generate", *flags, "--output", target)
    assert refused.returncode == 2
    assert "line 4 of the output is not of line 4 of the input" in refused.stderr


def test_a_key_of_the_input_that_is_generated_does_not_stop_a_resume(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    """And a prompt that is longer than the context is said to be cut."""
    source = tmp_path / "p.jsonl"
    lines = [{"prompt": "The list " * 5, "text": "gold"}, {"prompt": "a"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--model", model, "--max-tokens=4", "--context-length=20", "--input", source]
    first = nope("generate", *flags, "--output", "o.jsonl")
    assert first.returncode == 0, first.stderr
    assert "note: 1 prompts are longer than the context" in first.stderr
    again = nope("generate", *flags, "--output", "o.jsonl")
    assert again.returncode == 0, again.stderr
    assert "2 of 2 lines are there already" in again.stderr


def test_several_samples_of_each_prompt_come_together(
    model: Path, tmp_path: Path, nope: Nope
) -> None:
    source = tmp_path / "prompts.jsonl"
    prompts_in(source, 3)
    flags = ["--model", model, "--max-tokens=8", "--seed=3", "--num-samples=4", "--device=cpu"]
    done = nope("generate", *flags, "--input", source, "--output", "out.jsonl")
    assert done.returncode == 0, done.stderr
    samples = [line["samples"] for line in lines_of(tmp_path / "out.jsonl")]
    assert [len(each) for each in samples] == [4, 4, 4]  # type: ignore[arg-type]
    one = nope("generate", "The ", *flags, "--json")
    assert [sample["text"] for sample in json.loads(one.stdout)["samples"]] == [
        sample["text"]
        for sample in samples[0]  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize(
    ("content", "said", "where"),
    [
        ('{"prompt": "a"}\nnot json\n', "this line is not JSON", "p.jsonl:2"),
        ("[1]\n", "this line is not a JSON object", "p.jsonl:1"),
        ('{"prompt": 3}\n', 'neither a "prompt", a text, nor "messages"', "p.jsonl:1"),
        ('{"messages": []}\n', "this is a base model", "p.jsonl:1"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_anything_is_written(
    model: Path, tmp_path: Path, nope: Nope, content: str, said: str, where: str
) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    flags = ["--model", model, "--device=cpu", "--input", "p.jsonl", "--output", "o.jsonl"]
    done = nope("generate", *flags)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert where in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input=p.jsonl"], "--input needs --output"),
        (["--output=o.jsonl"], "--output needs --input"),
        (["x", "--input=p.jsonl", "--output=o.jsonl"], "there is a prompt and --input"),
        (["--input=p.jsonl", "--output=./p.jsonl"], "are the same file"),
        (["x", "--pin-tokens=9", "--context-length=9"], "must be less than --context-length"),
        (["x", "--log-probabilities=3"], "are printed with --json alone"),
        (["x", "--num-beams=2", "--num-samples=2"], "are for one continuation"),
        (["x", "--logit-bias=a"], "--logit-bias is 'a', and must be ID:BIAS pairs"),
        (["x", "--stop="], "--stop is an empty text"),
    ],
)
def test_flags_that_contradict_each_other_are_named(
    nope: Nope, words: list[str], said: str
) -> None:
    done = nope("generate", "--model=m", *words)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.slow
def test_beams_bias_and_stops_are_asked_for_on_the_command_line(model: Path, nope: Nope) -> None:
    flags = ["--model", model, "--max-tokens=12", "--device=cpu", "--dtype=float32"]
    beams = json.loads(nope("generate", "The ", *flags, "--num-beams=3", "--json").stdout)
    assert len(beams["hypotheses"]) == 3
    assert beams["text"] == beams["hypotheses"][0]["text"]
    forced = nope("generate", "The ", *flags, f"--logit-bias={ord('q')}:1000,{ord('z')}:-5")
    assert forced.stdout == "q" * 12 + "\n"
    stopped = nope("generate", "The ", *flags, "--logit-bias=113:1000", "--stop=qqq", "--stop=x")
    assert stopped.stdout == "\n"
    assert "· stop\n" in stopped.stderr
    endless = [f"--logit-bias={token}:-1000" for token in BYTES.stop_tokens]
    scores = nope("generate", "The ", *flags, *endless, "--json", "--log-probabilities=2")
    assert [len(token["likeliest"]) for token in json.loads(scores.stdout)["tokens"]] == [2] * 12


def test_conversations_are_answered_by_a_chat_model() -> None:
    from nope_gpt.cli.many import tokens_of

    messages = [{"role": "user", "content": "Hi. <|im_end|>"}]
    tokens = tokens_of({"messages": messages}, TOKENIZER, "here")
    assert tokens == TOKENIZER.tokenize_prompt(messages)
    assert tokens.count(TOKENIZER.im_end_index) == 1, "what is typed is no control token"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "wizard", "content": "x"}, "this line has a role that is none of system, user"),
        ({"role": "user", "content": 3}, "this line has a message without text in `content`"),
        ("x", "this line has a role that is none of"),
    ],
)
def test_what_is_no_message_to_tune_on_is_none_to_answer(message: object, said: str) -> None:
    from nope_gpt.cli.many import tokens_of

    with pytest.raises(NopeError, match=re.escape(said)) as caught:
        tokens_of({"messages": [message]}, TOKENIZER, "prompts.jsonl:1")
    assert caught.value.where == "prompts.jsonl:1"
