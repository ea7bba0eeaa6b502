from types import MappingProxyType
from typing import Any

import pytest

from winnow.errors import InvalidSetting
from winnow.sampling_params import SamplingParams


def test_settings_out_of_range_name_the_number_and_the_limit() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1}, r"temperature is -1; the allowed range is \[0, 2\]"),
        ({"seed": 2**63}, rf"seed is {2**63}; the allowed range is \[0, {2**63 - 1}\]"),
        ({"top_k": 10**400}, r"top_k is 10{400}; the allowed range is \[0, 2147483647\]"),
        ({"top_p": 2}, r"top_p is 2; the allowed range is \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"num_logprobs": 21}, r"logprobs is 21; the allowed range is \[0, 20\]"),
        ({"logit_bias": MappingProxyType({1: 101.0})}, "logit_bias is 101"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens is 5; the allowed range is \[0, 4\]"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        (
            {"stop_token_ids": frozenset(range(129))},
            r"stop_token_ids is 129; the allowed range is",
        ),
    ]
    for values, message in cases:
        with pytest.raises(InvalidSetting, match=message):
            SamplingParams(**values)
