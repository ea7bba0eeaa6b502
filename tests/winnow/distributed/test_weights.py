"""A rank's part of the LM head."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models_in_code import tiny_config
from winnow.distributed.heads import Split
from winnow.distributed.weights import split_head


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("vocab_size", "num_ranks"), [(320, 2), (321, 2), (321, 4), (5, 4)])
def test_the_parts_of_a_head_give_its_logits_one_after_another(
    vocab_size: int, num_ranks: int, is_tied: bool
) -> None:
    config = tiny_config("llama", vocab_size=vocab_size, tie_word_embeddings=is_tied)
    network = AutoModelForCausalLM.from_config(config)
    whole, hidden = network.lm_head, torch.randn(3, 64)
    parts = []
    for rank in range(num_ranks):
        network.lm_head = whole
        split_head(network, Split(rank, num_ranks))
        parts.append(network.lm_head(hidden))
        shares = network.lm_head.weight.data_ptr() == whole.weight.data_ptr()
        assert shares is (is_tied and rank == 0)
    assert {part.shape for part in parts} == {(3, -(-vocab_size // num_ranks))}
    logits = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits[:, :vocab_size], whole(hidden))
    assert logits[:, vocab_size:].eq(0).all()


def test_a_bias_is_shared_out_like_its_rows() -> None:
    network = AutoModelForCausalLM.from_config(tiny_config("llama"))
    network.lm_head = whole = torch.nn.Linear(64, 320)
    hidden = torch.randn(3, 64)
    split_head(network, Split(1, 2))
    torch.testing.assert_close(network.lm_head(hidden), whole(hidden)[:, 160:])
