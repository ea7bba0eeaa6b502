"""GrammarCompiler: grammars made ready for decode; those used last are kept."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from winnow.errors import InvalidGrammar, Overloaded
from winnow.grammar import Grammar
from winnow.grammar.constraint import CompiledGrammar
from winnow.grammar.matcher import new_matcher
from winnow.grammar.threads import MAX_WAITING, TIMEOUT_S, CompileThreads, Job, TooSlow
from winnow.grammar.vocabulary import Vocabulary
from winnow.tokenizer import Tokenizer

_MAX_WAITERS = 2 * MAX_WAITING
_MAX_KEPT = 512
_MAX_KEPT_CHARS = 1 << 20  # of their sources: what is compiled takes up to 1 kB for each

_T = TypeVar("_T")


class GrammarCompiler:
    """Compiles grammars for a model.  Thread-safe; `close` ends its threads.

    eos_token_ids: of the model.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._new_vocabulary = partial(Vocabulary, tokenizer, vocab_size, eos_token_ids)
        self._vocabulary: Vocabulary | None = None
        self._threads = CompileThreads()
        self._jobs: OrderedDict[tuple[Grammar, str], Job[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._may_wait = threading.BoundedSemaphore(_MAX_WAITERS)

    def prepare(self) -> Vocabulary:
        """The vocabulary; reading a large one takes half a second, once.

        Raises InvalidGrammar if the model has no end token.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._new_vocabulary()
            return self._vocabulary

    def check(self, grammar: Grammar, param: str = "grammar", end_s: float | None = None) -> None:
        """Raise InvalidGrammar if it cannot be enforced, Overloaded if too many are waiting.

        param: what the request calls it; the error adds the place in it.
        end_s: of time.monotonic(), by which it must be known; None: in TIMEOUT_S.
        """
        try:
            self._result(self._check, grammar, param, end_s)
        except TooSlow as error:
            raise InvalidGrammar(error.message, param=error.param) from None

    def compile(self, grammar: Grammar, param: str = "grammar") -> CompiledGrammar:
        """The compiled grammar.  Raises as `check`, but Overloaded also if it takes too long.

        Others have checked it already, so this machine is busy.
        """
        try:
            return self._result(self._compile, grammar, param)
        except TooSlow as error:
            raise Overloaded(error.message) from error

    def close(self) -> None:
        """End the threads; those at work end by themselves."""
        self._threads.close()

    def _result(
        self,
        work: Callable[[Grammar], _T],
        grammar: Grammar,
        param: str,
        end_s: float | None = None,
    ) -> _T:
        end_s = time.monotonic() + TIMEOUT_S if end_s is None else end_s
        try:
            self.prepare()
            job = self._begun(work, grammar)
            with self._waiting(job):
                return job.result(end_s)
        except InvalidGrammar as error:
            where = param + (error.param or "")
            raise type(error)(f"{where} {error.message}", param=where) from error

    @contextmanager
    def _waiting(self, job: Job[Any]) -> Iterator[None]:
        """Context manager: wait for the job.  Raises Overloaded if too many wait already."""
        if job.is_done:
            yield
            return
        if not self._may_wait.acquire(blocking=False):
            raise Overloaded(f"{_MAX_WAITERS} requests are waiting for grammars to be compiled")
        try:
            yield
        finally:
            self._may_wait.release()

    def _begun(self, work: Callable[[Grammar], _T], grammar: Grammar) -> Job[_T]:
        """The job, which is begun unless it is among those that are kept."""
        key = (grammar, work.__name__)
        with self._lock:
            if key not in self._jobs:
                self._jobs[key] = self._threads.submit(partial(work, grammar))
            self._jobs.move_to_end(key)
            while len(self._jobs) > _MAX_KEPT or self._num_chars > _MAX_KEPT_CHARS:
                self._jobs.popitem(last=False)
            return self._jobs[key]

    @property
    def _num_chars(self) -> int:
        return sum(len(grammar.source) for grammar, _ in self._jobs)

    def _check(self, grammar: Grammar) -> None:
        new_matcher(self.prepare(), grammar)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        prototype = partial(new_matcher, self.prepare(), grammar)
        return CompiledGrammar(
            self.prepare(),
            prototype(),
            partial(self._threads.submit, prototype),
            grammar.control_token_ids,
        )
