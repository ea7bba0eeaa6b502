import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.messages import (
    grammar_from_proto,
    grammar_to_proto,
    recompression_from_proto,
    recompression_to_proto,
    sampling_from_proto,
    sampling_to_proto,
    tokens_from_proto,
    tokens_to_proto,
)
from winnow.errors import InvalidGrammar, InvalidSetting
from winnow.grammar import Grammar
from winnow.pruning_settings import PruningSettings, Recompression
from winnow.sampling_params import SamplingParams
from winnow.tokens import FinishReason, Token, TokenLogprobs
from winnow.v1 import decode_pb2 as pb

float32 = st.floats(-2, 2, width=32)


@given(
    st.builds(
        SamplingParams,
        max_tokens=st.integers(5, 2**31 - 1),
        min_tokens=st.integers(0, 5),
        stop_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=5),
        temperature=st.floats(0, 2, width=32),
        top_p=st.floats(0.5, 1, width=32),
        top_k=st.integers(0, 2**31 - 1),
        min_p=st.floats(0, 1, width=32),
        seed=st.integers(0, 2**63 - 1),
        presence_penalty=float32,
        frequency_penalty=float32,
        repetition_penalty=st.floats(0.5, 10, width=32),
        logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), float32, max_size=5),
        num_logprobs=st.none() | st.integers(0, 20),
        ignore_eos=st.booleans(),
    )
)
def test_sampling_comes_back_as_it_was(params: SamplingParams) -> None:
    message = pb.SamplingParams.FromString(sampling_to_proto(params).SerializeToString())
    assert sampling_from_proto(message) == params


def test_sampling_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="temperature is 3"):
        sampling_from_proto(pb.SamplingParams(max_tokens=1, temperature=3, top_p=1))


@pytest.mark.parametrize("decode_budget", [None, 256])
def test_recompression_comes_back_as_it_was(decode_budget: int | None) -> None:
    asked = PruningSettings(
        decode_budget=decode_budget,
        recompress_interval=64,
        recompression="rkv",
        redundancy_weight=0.25,
        window_size=16,
        kernel_size=5,
    ).decode_side
    assert asked == Recompression(decode_budget, None, 64, "rkv", 0.25, 16, 5)
    assert recompression_from_proto(recompression_to_proto(asked)) == asked


def test_a_budget_within_the_window_is_refused() -> None:
    message = pb.Recompression(
        decode_budget=8, window_size=16, kernel_size=5, recompress_interval=1
    )
    with pytest.raises(InvalidSetting, match="decode_budget is 8"):
        recompression_from_proto(message)


def test_tokens_come_back_as_they_were() -> None:
    tokens = [
        Token(0, 17),
        Token(1, 0, TokenLogprobs(-0.5, ()), FinishReason.STOP),
        Token(2, 9, TokenLogprobs(-1.0, ((9, -1.0), (4, -2.5))), FinishReason.LENGTH),
    ]
    message = tokens_to_proto(tokens, recompressed_entries=3)
    assert message.recompressed_entries == 3
    assert tokens_from_proto(pb.Tokens.FromString(message.SerializeToString())) == tokens


@given(
    st.builds(
        Grammar,
        kind=st.sampled_from(["json_schema", "regex", "lark"]),
        source=st.text(),
        control_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=5),
    )
)
def test_grammar_round_trip(grammar: Grammar) -> None:
    assert grammar_from_proto(grammar_to_proto(grammar)) == grammar


def test_a_grammar_of_no_known_kind_is_refused() -> None:
    with pytest.raises(InvalidGrammar):
        grammar_from_proto(pb.Grammar())
