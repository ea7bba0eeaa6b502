"""A model's vocabulary as llguidance takes it: the bytes of every token."""

from collections.abc import Iterable

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from winnow.errors import InvalidGrammar
from winnow.tokenizer import Tokenizer

_WORD = 32  # tokens of a word of a mask
_LONGEST_FORCED = 512  # bytes; only the first token of them is used


class Vocabulary:
    """The tokens of a model of `vocab_size` tokens.

    Raises InvalidGrammar if none of `eos_token_ids` is among them: no answer could end.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        ends = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
        if not ends:
            raise InvalidGrammar("cannot be enforced: the model has no end token")
        self.size = vocab_size
        self.eos_token_ids = frozenset(ends)
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self._control = {
            token_id
            for token_id, text in tokenizer.added_token_ids.items()
            if token_id < vocab_size and _is_control(tokenizer, token_id, text)
        }.union(ends)
        self.text_bits = self.bits(
            idx for idx, text in enumerate(tokens) if text and idx not in self._control
        )
        source = _TokenSource(tokenizer, tokens, self._control, ends[0])
        self.llguidance = LLTokenizer(TokenizerWrapper(source), n_vocab=vocab_size)

    @property
    def num_words(self) -> int:
        """Words of 32 bits of a mask."""
        return -(-self.size // _WORD)

    def is_control(self, token_id: int) -> bool:
        """Whether it is no text, so that it may end an answer."""
        return token_id in self._control

    def bits(self, token_ids: Iterable[int]) -> NDArray[np.int32]:
        """A mask of these tokens: bit i % 32 of word i // 32 is of token i."""
        flags = np.zeros(self.num_words * _WORD, np.uint8)
        flags[np.fromiter(token_ids, np.int64)] = 1
        return np.packbits(flags, bitorder="little").view(np.int32)


def _is_control(tokenizer: Tokenizer, token_id: int, text: str) -> bool:
    """Whether an added token is a mark, not text such as a run of spaces or a letter."""
    return tokenizer.is_special(token_id) or any(char in text for char in "<[|")


class _TokenSource:
    """What TokenizerWrapper asks for.  Called with text that a grammar forces, it tokenizes it."""

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], control: set[int], eos_token_id: int
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted(control)
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self._tokenizer = tokenizer
        self._control = control
        self._ids = {
            text: idx for idx, text in reversed([*enumerate(tokens)]) if idx not in control
        }
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """As the model's tokenizer does it where that keeps the bytes, or else greedily."""
        text = text[:_LONGEST_FORCED]
        ids = self._tokenizer.encode(text.decode(errors="ignore"), add_special_tokens=False)
        spelled = b"".join(self.tokens[idx] for idx in ids if idx < len(self.tokens))
        if spelled == text and self._control.isdisjoint(ids):
            return ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """The longest token each time; ends before bytes that no token begins with."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[at:end]])
            at = end
        return ids
