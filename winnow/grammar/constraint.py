"""What a grammar allows next: compiled grammars, and the constraint of each sequence."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from winnow.errors import GrammarFailed, Overloaded, WinnowError
from winnow.grammar.matcher import reason_of
from winnow.grammar.threads import Job
from winnow.grammar.vocabulary import Vocabulary

_RENEWAL_S = 0.5  # the batch waits for it


class CompiledGrammar:
    """A grammar that is ready for any number of sequences.  Thread-safe.

    prototype: a matcher at the beginning of an answer.  new_prototype: begins to compile another.
    control_token_ids: those that may be sampled where the grammar names them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prototype: LLMatcher,
        new_prototype: Callable[..., Job[LLMatcher]],
        control_token_ids: frozenset[int],
    ) -> None:
        self.vocabulary = vocabulary
        self.allowed = vocabulary.text_bits | vocabulary.bits(control_token_ids)
        self._prototype = prototype
        self._new_prototype = new_prototype
        self._spare: Job[LLMatcher] | None = None
        self._lock = threading.Lock()

    def constraint(self, stop_token_ids: frozenset[int] = frozenset()) -> "Constraint":
        """The constraint of a sequence that may also end with one of `stop_token_ids`."""
        self._keep_spare()
        return Constraint(self, stop_token_ids)

    def matcher(self) -> LLMatcher:
        """A matcher at the beginning of an answer.

        All of them share the states of one lexer, and the limit of their number.
        """
        with self._lock:
            return self._prototype.deep_copy()

    def renewed_matcher(self) -> LLMatcher:
        """A matcher with a new lexer, as those that follow.  Raises a WinnowError if that fails.

        The spare was compiled before, unless others have just taken one.
        """
        with self._lock:
            spare, self._spare = self._spare, None
        spare = self._new_prototype() if spare is None else spare
        prototype = spare.result(time.monotonic() + _RENEWAL_S)
        with self._lock:
            self._prototype = prototype
        self._keep_spare()
        return prototype.deep_copy()

    def _keep_spare(self) -> None:
        """Begin to compile another prototype, unless there is one, or no thread has time."""
        with self._lock, contextlib.suppress(Overloaded):
            if self._spare is None:
                self._spare = self._new_prototype(max_waiting=0)


class Constraint:
    """What a sequence may generate next: a function of its tokens so far, and of nothing else.

    failure: set once the grammar cannot tell what may come.
    """

    def __init__(self, grammar: CompiledGrammar, stop_token_ids: frozenset[int]) -> None:
        vocabulary = grammar.vocabulary
        ends = {one for one in stop_token_ids if vocabulary.is_control(one)}
        self.failure: GrammarFailed | None = None
        self._grammar = grammar
        self._matcher = grammar.matcher()
        self._consumed: list[int] = []
        self._is_finished = False
        self._end_token_ids = vocabulary.eos_token_ids | ends
        self._end_bits = vocabulary.bits(self._end_token_ids)
        self._other_stops = vocabulary.bits(stop_token_ids - ends)

    def advance(self, tokens: Sequence[int]) -> None:
        """Take note of the sequence's tokens, of which the first may be known already."""
        new = tokens[len(self._consumed) :]
        if not new or self._is_over:
            return
        if new[-1] in self._end_token_ids:
            self._is_finished = True
            new = new[:-1]
        self._consumed += new
        if not self._matcher.consume_tokens(list(new)):
            self._begin_anew()

    def fill(self, bits: NDArray[np.int32], *, may_end: bool) -> None:
        """Write the mask of the tokens that may come: all of them after the end or a failure.

        bits: [num_words] of the vocabulary.  may_end: whether the answer may end here, if it need
        not.
        """
        if self._is_over or not self._fill_text(bits):
            bits[:] = -1
            return
        if not may_end:
            going_on = bits & ~self._other_stops
            if going_on.any():
                bits[:] = going_on
                return
        if self._matcher.is_accepting():
            bits |= self._end_bits
        elif not bits.any():
            self._fail("no token of the model goes on with it")
            bits[:] = -1

    @property
    def _is_over(self) -> bool:
        return self._is_finished or self.failure is not None

    def _fill_text(self, bits: NDArray[np.int32]) -> bool:
        """Write the mask of the tokens that go on with the text; False if that failed."""
        fill_next_token_bitmask(self._matcher, bits[None])
        if self._matcher.is_error():
            if not self._begin_anew():
                return False
            fill_next_token_bitmask(self._matcher, bits[None])
            if (reason := reason_of(self._matcher)) is not None:
                self._fail(reason)
                return False
        bits &= self._grammar.allowed
        return True

    def _begin_anew(self) -> bool:
        """Take a matcher that shares nothing with earlier ones up to here; False if that fails.

        So what other sequences generated cannot make this one fail.
        """
        try:
            self._matcher = self._grammar.renewed_matcher()
        except WinnowError as error:
            self._fail(error.message)
            return False
        if not self._matcher.consume_tokens(self._consumed):
            self._fail(reason_of(self._matcher) or "a token is not allowed")
        return self.failure is None

    def _fail(self, reason: str) -> None:
        num_tokens = len(self._consumed)
        self.failure = GrammarFailed(
            f"the grammar cannot go on after {num_tokens} tokens of the answer: {reason}"
        )
