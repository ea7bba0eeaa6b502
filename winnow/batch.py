"""Batch generation in one process: prompts are prefilled one by one and decoded together."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from winnow.adapters.slots import LoadedAdapter
from winnow.completion import Completion, CompletionStream, generation_spec, prefill_into
from winnow.engine.decode import DecodeEngine
from winnow.engine.outputs import StepOutput
from winnow.engine.prefill import PrefillResult, require_prompt
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.sequence import Reservation
from winnow.errors import Overloaded
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams
from winnow.text_stream import TextStream
from winnow.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class BatchJob:
    """One prompt with its own pruning and sampling; the text ends before a `stop` string.

    cache_salt: only prompts with the same one share cached beginnings.
    grammar: what the text must match, if it ends before max_tokens.
    adapter: that answers; None: the model alone does.
    """

    token_ids: Sequence[int]
    pruning: PruningSettings
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    cache_salt: str = ""
    grammar: Grammar | None = None
    adapter: LoadedAdapter | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The completion of a job.

    job_idx: index of the job.  prefill_s: prefill time of its prompt.
    seconds: from the start of its prefill to its last token, time spent on other jobs included.
    """

    job_idx: int
    completion: Completion
    prefill_s: float
    seconds: float


@dataclass(slots=True, eq=False)
class _Running:
    job_idx: int
    reservation: Reservation
    stream: CompletionStream
    text: TextStream
    pieces: list[str]
    started_s: float
    prefill_s: float


class BatchRun:
    """Runs jobs on a decode engine, of which it must be the only user.

    store: has the beginnings of prompts; None: each is computed whole.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
        store: PrefixStore | None = None,
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._tokenizer = tokenizer
        self._store = store
        self._running: dict[str, _Running] = {}

    def run(self, jobs: Iterable[BatchJob]) -> Iterator[BatchResult]:
        """Yield each result when it is complete; takes the next job when a batch slot is free.

        Raises as `Winnow.generate` on reaching a job that can never run.
        """
        numbered = enumerate(jobs)
        waiting = next(numbered, None)
        try:
            while waiting is not None or self._running:
                while waiting is not None and self._admit(*waiting):
                    waiting = next(numbered, None)
                for output in self._engine.step():
                    yield from self._take(output)
        finally:
            self._release_all()

    def _admit(self, job_idx: int, job: BatchJob) -> bool:
        """Prefill a job and add it to the batch; False if there is no room for it now."""
        model = self._engine.model
        require_prompt(model, job.token_ids)
        grammar = self._grammars.compile(job.grammar) if job.grammar is not None else None
        spec = generation_spec(
            str(job_idx), model, job.token_ids, job.pruning, job.sampling, grammar, job.adapter
        )
        try:
            reservation = self._engine.reserve(spec)
        except Overloaded:
            if not self._engine.stats().running_sequences:
                raise
            return False
        started_s = time.perf_counter()
        result = self._prefill(reservation, job)
        prefill_s = time.perf_counter() - started_s
        self._running[spec.request_id] = _Running(
            job_idx,
            reservation,
            CompletionStream(result.report),
            TextStream(self._tokenizer, job.stop, min_tokens=job.sampling.min_tokens),
            [],
            started_s,
            prefill_s,
        )
        return True

    def _prefill(self, reservation: Reservation, job: BatchJob) -> PrefillResult:
        try:
            result = prefill_into(
                reservation,
                self._engine.model,
                job.token_ids,
                job.pruning,
                self._store,
                job.cache_salt,
            )
        except BaseException:
            self._engine.release(reservation)
            raise
        self._engine.start(reservation, result.final_hidden, result.report.next_position)
        return result

    def _take(self, output: StepOutput) -> Iterator[BatchResult]:
        """Record a job's token; yield its result if the token is the last one.

        A step that reads two tokens may go past a stop string.
        """
        running = self._running.get(output.request_id)
        if running is None:
            return
        stream = running.stream
        running.pieces.append(stream.take(output, running.text))
        if stream.finish_reason is None:
            return
        del self._running[output.request_id]
        self._engine.release(running.reservation)
        text = "".join(running.pieces) + running.text.finish()
        yield BatchResult(
            running.job_idx,
            Completion(text, tuple(stream.token_ids), stream.finish_reason, stream.report),
            running.prefill_s,
            time.perf_counter() - running.started_s,
        )

    def _release_all(self) -> None:
        """Release the reservations of unfinished jobs."""
        for running in self._running.values():
            self._engine.release(running.reservation)
        self._running.clear()
        while self._engine.stats().running_sequences:
            self._engine.step()  # frees the released pages
