import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from winnow.engine.prefix.hashes import block_hashes, prefix_salt

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
SALT = prefix_salt("model")


@given(TOKENS, TOKENS, TOKENS)
def test_prompts_share_the_hashes_of_the_blocks_that_they_begin_with(
    beginning: list[int], one: list[int], other: list[int]
) -> None:
    first, second = beginning + one, beginning + other
    equal = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        equal += 1
    hashes, others = (block_hashes(ids, SALT, 8) for ids in (first, second))
    assert (len(hashes), len(others)) == (len(first) // 8, len(second) // 8)
    assert hashes[: equal // 8] == others[: equal // 8]
    assert not set(hashes[equal // 8 :]) & set(others[equal // 8 :])


@given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))
def test_only_equal_models_and_salts_give_equal_hashes(a: str, b: str, c: str, d: str) -> None:
    assert (prefix_salt(a, b) == prefix_salt(c, d)) == ((a, b) == (c, d))


def test_a_salt_may_be_any_text_of_json() -> None:
    assert prefix_salt("model", "\ud800") != prefix_salt("model", "?")


def test_a_block_has_another_hash_behind_other_tokens() -> None:
    same = [7] * 8
    assert len(set(block_hashes(same * 3, SALT, 8))) == 3
    assert block_hashes([1] * 8 + same, SALT, 8)[1] != block_hashes([2] * 8 + same, SALT, 8)[1]


def test_hashes_can_be_computed_without_torch() -> None:
    code = "import sys, winnow.engine.prefix.hashes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
