"""A prompt's own log-probabilities beside those that transformers computes."""

from pathlib import Path

import pytest
import torch

from tests.models_in_code import FAMILIES, VOCAB_SIZE
from tests.winnow import reference
from tests.winnow.drive import UNPRUNED, all_layers, prompt
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.engine.prompt_logprobs import PromptLogprobsRun
from winnow.errors import NotFinite
from winnow.models import load_model
from winnow.tokens import PromptLogprobs

NUM_TOKENS = 50


def score(
    model: DecoderModel, token_ids: list[int], num_top: int, block_size: int
) -> tuple[PromptLogprobs, int]:
    """The log-probabilities, and in how many blocks they were computed."""
    prefill = PrefillRun(model, token_ids, UNPRUNED, is_long=False)
    all_layers(prefill)
    hidden = prefill.result(keep_hidden=True).hidden
    assert hidden is not None
    max_logits = block_size * VOCAB_SIZE
    run = PromptLogprobsRun(model, hidden, token_ids, num_top, max_logits)
    num_blocks = 0
    while not run.finished:
        run.compute_block()
        num_blocks += 1
    return run.result(), num_blocks


@pytest.mark.parametrize("block_size", [1, 7, 49, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_models_own_log_softmax(
    tiny_models: dict[str, Path], family: str, block_size: int
) -> None:
    token_ids = prompt(NUM_TOKENS)
    with torch.no_grad():
        logits = reference.load(tiny_models[family])(torch.tensor([token_ids])).logits[0]
    rows = logits.log_softmax(-1)[:-1]
    logprobs, num_blocks = score(load_model(tiny_models[family]), token_ids, 5, block_size)
    assert num_blocks == -(-(NUM_TOKENS - 1) // block_size)
    expected = rows.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    assert logprobs.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    top = rows.topk(5)
    assert torch.tensor(logprobs.top_logprobs).allclose(top.values, atol=1e-4)
    assert logprobs.top_ids == top.indices.tolist()


def test_the_first_token_has_none_and_each_other_its_own(tiny_models: dict[str, Path]) -> None:
    token_ids = prompt(4)
    logprobs, _ = score(load_model(tiny_models["llama"]), token_ids, 2, 100)
    first, *others = logprobs.of_each()
    assert first is None
    assert [one.logprob for one in others if one] == logprobs.logprobs
    for one in others:
        assert one is not None and len(one.top) == 2
        assert one.logprob <= one.top[0][1]


def test_a_prompt_of_one_token_has_none_at_all(tiny_models: dict[str, Path]) -> None:
    logprobs, num_blocks = score(load_model(tiny_models["llama"]), [5], 3, 100)
    assert (list(logprobs.of_each()), num_blocks) == ([None], 0)


def test_without_likely_tokens_there_are_still_the_prompts_own(
    tiny_models: dict[str, Path],
) -> None:
    logprobs, _ = score(load_model(tiny_models["llama"]), prompt(9), 0, 100)
    assert [one.top for one in logprobs.of_each() if one] == [()] * 8


def test_broken_numbers_are_an_error(tiny_models: dict[str, Path]) -> None:
    model = load_model(tiny_models["llama"])
    hidden = torch.full((3, model.shape.hidden_size), float("nan"))
    with pytest.raises(NotFinite):
        PromptLogprobsRun(model, hidden, [1, 2, 3], 0).compute_block()
