"""Every kind of rotary tables that transformers makes, beyond a model's original length."""

from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models_in_code import save_tiny_model
from tests.winnow import reference
from tests.winnow.drive import GREEDY, UNPRUNED, admit, decode_all, ids, make_engine, prompt, spec
from winnow.errors import UnusableModel
from winnow.models import load_model

ORIGINAL = 64
PROMPT_TOKENS = 150
KINDS = sorted(ROPE_INIT_FUNCTIONS.keys() - {"dynamic"})
_LENGTH = {"original_max_position_embeddings": ORIGINAL}
_OWN: dict[str, dict[str, Any]] = {
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | _LENGTH,
    "longrope": {"short_factor": [1.5] * 8, "long_factor": [4.0] * 8} | _LENGTH,
    "proportional": {"partial_rotary_factor": 0.5},
    "yarn": {"beta_fast": 16.0, "mscale": 0.8, "mscale_all_dim": 0.4} | _LENGTH,
}


def save(folder: Path, family: str, kind: str, **own: Any) -> Path:
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0} | own
    return save_tiny_model(folder, family, rope_parameters=rope, max_position_embeddings=ORIGINAL)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_beyond_the_original_length_is_answered_as_transformers_does(
    tmp_path: Path, family: str, kind: str
) -> None:
    path = save(tmp_path, family, kind, **_OWN[kind])
    model, token_ids = load_model(path), prompt(PROMPT_TOKENS)
    assert model.max_positions == 4 * ORIGINAL
    engine = make_engine(model)
    admit(engine, spec("a", PROMPT_TOKENS, GREEDY), token_ids, UNPRUNED)
    expected = reference.greedy(reference.load(path), token_ids, GREEDY.max_tokens)
    assert ids(decode_all(engine)["a"]) == expected


def test_tables_that_change_with_the_length_are_refused_with_what_works(tmp_path: Path) -> None:
    path = save(tmp_path, "llama", "dynamic")
    message = r"dynamic rotary embeddings, which change .*\. max_model_len 64 avoids that$"
    with pytest.raises(UnusableModel, match=message) as refused:
        load_model(path)
    assert "\n" not in str(refused.value)
    assert load_model(path, max_model_len=ORIGINAL).max_positions == ORIGINAL
