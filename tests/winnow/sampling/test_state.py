from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from winnow.sampling import SamplingState
from winnow.sampling_params import SamplingParams

TOKENS = st.lists(st.integers(0, 300), max_size=400)
PENALIZED = SamplingParams(repetition_penalty=1.1)


@given(prompt=TOKENS, generated=TOKENS)
def test_counts_are_of_generated_tokens_and_ids_of_all(
    prompt: list[int], generated: list[int]
) -> None:
    state = SamplingState(PENALIZED, 0, len(prompt), prompt)
    state.extend(generated[:5])
    state.extend(generated[5:])
    assert state.counts is not None
    counts = Counter(generated)
    found = dict(zip(state.counts.ids.tolist(), state.counts.counts.tolist(), strict=True))
    assert found == {token: counts[token] for token in {*prompt, *generated}}
    assert len(state.counts.ids) == len(found)
    assert state.position == len(prompt) + len(generated)


def test_without_penalties_nothing_is_counted() -> None:
    state = SamplingState(SamplingParams(min_tokens=2), 0, 5)
    state.extend([1, 2])
    assert state.counts is None
    assert state.may_end
    assert state.generated == [1, 2]
