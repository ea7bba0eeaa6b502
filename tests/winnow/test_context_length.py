import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models_in_code import save_tiny_model, tiny_config
from tests.winnow import reference
from winnow import SamplingParams, Winnow
from winnow.context_length import constant_length, context_length
from winnow.errors import InvalidSetting, PromptTooLong, UnusableModel
from winnow.model_files import describe_model

STATED = 1024
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Scaling as configurations write it, and the positions that it reaches.
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {
    "yarn": ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}, 4096),
    "yarn-of-a-shorter-one": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 768},
        3072,
    ),
    "yarn-of-the-stated-length": ({"rope_type": "yarn", "factor": 2.0}, 2048),
    "linear": ({"type": "linear", "factor": 4.0}, 4096),
    "linear-by-a-fraction": ({"rope_type": "linear", "factor": 2.5}, 2560),
    "llama3": (
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 1024} | LLAMA3,
        4096,
    ),
    "llama3-scaled-already": (
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 256} | LLAMA3,
        STATED,
    ),
    "default": ({"rope_type": "default"}, STATED),
}


def save(folder: Path, scaling: dict[str, Any], **changes: Any) -> Path:
    rope = {"rope_theta": 10000.0} | scaling
    sizes = {"max_position_embeddings": STATED, "num_hidden_layers": 2} | changes
    return save_tiny_model(folder, "llama", rope_parameters=rope, **sizes)


def prompt(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 300, (num_tokens,), generator=generator).tolist()


def assert_answers_as_transformers(folder: Path, num_tokens: int, **options: Any) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    answer = Winnow.load(folder, method="full", **options).generate(prompt(num_tokens), sampling)
    expected = reference.greedy(reference.load(folder), prompt(num_tokens), 4)
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_window_is_what_the_scaled_tables_reach(tmp_path: Path, kind: str) -> None:
    scaling, expected = SCALINGS[kind]
    assert describe_model(save(tmp_path, scaling)).max_positions == expected


@pytest.mark.parametrize(
    ("sizes", "scaling", "expected"),
    [
        # as Llama 3.1, Llama 3.2, Qwen 2.5 with its card's yarn, Qwen 3 likewise, Vicuna 16k
        ((131072, 8192), {"rope_type": "llama3", "factor": 8.0} | LLAMA3, 131072),
        ((131072, 8192), {"rope_type": "llama3", "factor": 32.0} | LLAMA3, 131072),
        ((32768, 32768), {"type": "yarn", "factor": 4.0}, 131072),
        ((40960, 32768), {"rope_type": "yarn", "factor": 4.0}, 131072),
        ((4096, None), {"type": "linear", "factor": 4.0}, 16384),
    ],
)
def test_known_checkpoints_have_the_window_that_they_promise(
    sizes: tuple[int, int | None], scaling: dict[str, Any], expected: int
) -> None:
    stated, original = sizes
    lengths = {} if original is None else {"original_max_position_embeddings": original}
    rope = {"rope_theta": 10000.0} | scaling | lengths
    config = tiny_config("llama", max_position_embeddings=stated, rope_parameters=rope)
    assert context_length(config) == expected


def test_tables_that_differ_by_layer_count_as_scaled() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = tiny_config("llama", max_position_embeddings=STATED)
    config.rope_parameters = rope
    assert context_length(config) == STATED


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_prompts_beyond_the_stated_length_are_answered_as_transformers_does(
    tmp_path: Path, kind: str
) -> None:
    assert_answers_as_transformers(save(tmp_path, SCALINGS[kind][0]), 2000)


@pytest.mark.parametrize("factor", [0, -2.0, float("inf"), float("nan"), "4"])
def test_a_factor_that_scales_nothing_is_refused(tmp_path: Path, factor: Any) -> None:
    folder = save(tmp_path, {"rope_type": "default"})
    config = (folder / "config.json").read_text()
    rope = f'"rope_type": "linear", "factor": {factor!r}'.replace("'", '"')
    rope = rope.replace("inf", "Infinity").replace("nan", "NaN")
    (folder / "config.json").write_text(config.replace('"rope_type": "default"', rope))
    with pytest.raises(UnusableModel, match=r"the factor of its rotary tables is .* above 0"):
        describe_model(folder)


def test_max_model_len_lowers_the_window(tmp_path: Path) -> None:
    winnow = Winnow.load(save(tmp_path, SCALINGS["yarn"][0]), max_model_len=100)
    assert winnow.model.max_positions == 100
    with pytest.raises(PromptTooLong, match="the prompt has 100 tokens; the limit is 99"):
        winnow.generate(prompt(100))
    answer = winnow.generate(prompt(90), SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(answer.token_ids) == 10


def test_max_model_len_raises_the_window_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, {"rope_type": "default"})
    with caplog.at_level(logging.WARNING, "winnow"):
        assert_answers_as_transformers(folder, 1500, max_model_len=2048)
    assert "max_model_len 2048 is above the 1024 positions" in caplog.text


def test_within_the_window_max_model_len_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    describe_model(save(tmp_path, SCALINGS["yarn"][0]), max_model_len=4096)
    assert caplog.text == ""


def test_max_model_len_has_room_for_a_prompt_and_an_answer(tiny_models: dict[str, Path]) -> None:
    assert describe_model(tiny_models["llama"], max_model_len=2).max_positions == 2
    with pytest.raises(InvalidSetting, match="max_model_len is 1; the allowed range is"):
        describe_model(tiny_models["llama"], max_model_len=1)


def test_processes_with_other_windows_have_other_fingerprints(tmp_path: Path) -> None:
    folder = save(tmp_path, SCALINGS["yarn"][0])
    lengths = (None, 1024, 2048, 4096)
    prints = [describe_model(folder, max_model_len=length).fingerprint for length in lengths]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3


def test_tables_that_change_with_length_are_used_up_to_where_they_do(tmp_path: Path) -> None:
    folder = save(tmp_path, {"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnusableModel, match=f"max_model_len {STATED} avoids that"):
        describe_model(folder, max_model_len=STATED + 1)
    assert_answers_as_transformers(folder, STATED - 10, max_model_len=STATED)


def test_tables_of_one_kind_of_layer_that_change_with_length_are_told_too() -> None:
    rope = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = tiny_config("llama", max_position_embeddings=STATED)
    assert constant_length(config) > STATED
    config.rope_parameters = rope
    assert constant_length(config) == STATED


def test_a_sliding_window_that_spans_max_model_len_is_no_window(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "mistral", sliding_window=512)
    assert not describe_model(folder).shape.layers[0].is_full
    assert describe_model(folder, max_model_len=512).shape.layers[0].is_full
    assert_answers_as_transformers(folder, 500, max_model_len=512)
