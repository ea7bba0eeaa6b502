"""A small tokenizer, trained as the real one is."""

import pytest
from transformers import PreTrainedTokenizerFast

from training.samples import SampleMaker
from training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(seed=0, num_texts=400)


@pytest.fixture(scope="session")
def maker(tokenizer: PreTrainedTokenizerFast) -> SampleMaker:
    return SampleMaker(tokenizer)
