"""The prompts of one request run together, with their answers as one stream of deltas."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from services.common.tasks import end, is_cancelled
from services.gateway.metrics import GatewayMetrics
from services.gateway.request.choices import Choice, Delta, EndTokens
from services.gateway.request.explaining import explain
from services.gateway.request.generate_call import PromptRequest
from services.gateway.request.generation_run import PromptRun
from services.gateway.request.request import CheckedPrompt, GenerationRequest
from services.gateway.request.run import Run, Service
from services.gateway.request.scoring_run import PromptScoring
from services.gateway.request.verification import Comparison
from services.gateway.served_model import ServedModel
from services.gateway.usage import Explanation, RequestUsage, winnow_usage
from winnow.text_stream import TextStream
from winnow.tokens import PromptLogprobs, Token

# Deltas buffered for a slow client before decode has to wait.
_MAX_WAITING_DELTAS = 256


class RunningRequest:
    """Created by `Gateway.open`, which admits and frees the runs."""

    def __init__(
        self,
        request: GenerationRequest,
        runs: Sequence[Run],
        model: ServedModel,
        metrics: GatewayMetrics,
    ) -> None:
        self.request = request
        self.runs = runs
        self._model = model
        self.choices = [
            Choice(
                prompt_idx * request.num_choices + sequence_idx,
                _text_stream(request, model),
                prompt.echo,
                EndTokens.of(request.sampling, model.description.eos_token_ids),
                request.sampling.num_logprobs,
                metrics,
                request.answer,
            )
            for prompt_idx, (prompt, _) in enumerate(request.runs)
            for sequence_idx in range(request.num_choices)
        ]
        self._comparison = Comparison() if request.verified_by is not None else None

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Deltas of all choices as they arrive; raises the first error of any prompt."""
        async with aclosing(self.paced_deltas(lambda: None)) as deltas:
            async for delta in deltas:
                assert delta is not None
                yield delta

    async def paced_deltas(
        self, patience_s: Callable[[], float | None]
    ) -> AsyncGenerator[Delta | None]:
        """`deltas`, with None whenever no delta has arrived for `patience_s()` seconds."""
        waiting: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_MAX_WAITING_DELTAS)
        pumps = [
            asyncio.create_task(self._pump(prompt_idx, waiting))
            for prompt_idx in range(len(self.runs))
        ]
        try:
            running = len(pumps)
            while running:
                try:
                    async with asyncio.timeout(patience_s()):
                        item = await waiting.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                elif self._comparison is None or self._comparison.take(item):
                    yield item
        finally:
            await end(*pumps)

    def choices_of(self, prompt_idx: int) -> list[Choice]:
        first = prompt_idx * self.request.num_choices
        return self.choices[first : first + self.request.num_choices]

    def usage(self) -> RequestUsage:
        """The request's usage; call it after reading all deltas.  Slow if it is to explain."""
        request, comparison = self.request, self._comparison
        num_generated = sum(c.num_tokens for c in self.choices[: request.num_answers])
        shape, own_runs = self._model.description.shape, self.runs[: len(request.prompts)]
        return RequestUsage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in request.prompts),
            completion_tokens=num_generated,
            prompts=tuple(winnow_usage(run.stats, shape) for run in own_runs),
            verify=None if comparison is None else comparison.result(self.runs),
            explains=request.explains,
            explain=self._explanation(num_generated) if request.explains else None,
        )

    def _explanation(self, num_generated: int) -> Explanation | None:
        run = self.runs[0]
        return explain(run.request, run.stats, self._model, num_generated)

    async def _pump(
        self, prompt_idx: int, waiting: asyncio.Queue[Delta | Exception | None]
    ) -> None:
        """Put one prompt's deltas into the queue, then None, or the exception that ended it.

        That includes a CancelledError from inside, of which the reader would not learn otherwise.
        """
        try:
            async with aclosing(self._prompt_deltas(prompt_idx)) as deltas:
                async for delta in deltas:
                    await waiting.put(delta)
        except Exception as error:  # handed to the reader, who raises it
            await waiting.put(error)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            await waiting.put(RuntimeError(f"the prompt was given up from within: {error!r}"))
        else:
            await waiting.put(None)

    async def _prompt_deltas(self, prompt_idx: int) -> AsyncGenerator[Delta]:
        """One prompt's deltas; finishes its run as soon as all its choices have ended."""
        run, choices = self.runs[prompt_idx], self.choices_of(prompt_idx)
        num_steps = 0
        async with aclosing(run.tokens()) as steps:
            async for tokens in steps:
                num_steps += 1
                if num_steps == 1:
                    await self._tell_prompt(prompt_idx)
                for token in tokens:
                    delta = choices[token.sequence_idx].take(token)
                    if delta is not None:
                        yield delta
                if self.request.runs[prompt_idx][0].max_tokens == 0:
                    for choice in choices:
                        yield choice.end_at_once()
                if all(choice.finish_reason for choice in choices):
                    break
            await run.finish()

    async def _tell_prompt(self, prompt_idx: int) -> None:
        """Begin every choice with the prompt's log-probabilities, if they are requested."""
        if self.request.num_prompt_logprobs is None:
            return
        logprobs = await self.runs[prompt_idx].prompt_logprobs()
        token_ids = self.request.prompts[prompt_idx].token_ids
        tokens = await asyncio.to_thread(_scored_tokens, token_ids, logprobs)
        for choice in self.choices_of(prompt_idx):
            choice.begin(tokens)


def _text_stream(request: GenerationRequest, model: ServedModel) -> TextStream:
    return TextStream(
        model.tokenizer,
        request.stop,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        min_tokens=request.sampling.min_tokens,
        shown_token_ids=request.answer.shown_token_ids if request.answer else frozenset(),
    )


def _scored_tokens(token_ids: Sequence[int], logprobs: PromptLogprobs) -> tuple[Token, ...]:
    """The prompt's tokens with log-probabilities; slow for a long prompt."""
    scored = zip(token_ids, logprobs.of_each(), strict=True)
    return tuple(Token(0, token_id, of_token) for token_id, of_token in scored)


def prompt_runs(
    request: GenerationRequest,
    service: Service,
    timeout_s: float,
    trace_context: str = "",
    cache_salt: str = "",
) -> list[Run]:
    """One run for each of `request.runs`; all end within `timeout_s` seconds.

    cache_salt: as in PrefillJob.
    """
    deadline_s = time.monotonic() + timeout_s
    return [
        _run_of(prompt)(
            PromptRequest(
                request_id=f"{request.request_id}-{prompt_idx}",
                token_ids=prompt.token_ids,
                num_sequences=request.num_choices,
                # SamplingParams require at least one token; a run with 0 generates none.
                sampling=replace(
                    request.sampling,
                    max_tokens=max(1, prompt.max_tokens),
                    num_logprobs=request.decode_logprobs,
                ),
                pruning=pruning,
                trace_context=trace_context,
                num_prompt_logprobs=request.num_prompt_logprobs,
                cache_salt=cache_salt,
                grammar=request.grammar,
                explains=request.explains and prompt_idx < len(request.prompts),
                adapter=request.adapter,
            ),
            service,
            deadline_s,
        )
        for prompt_idx, (prompt, pruning) in enumerate(request.runs)
    ]


def _run_of(prompt: CheckedPrompt) -> type[PromptRun | PromptScoring]:
    return PromptRun if prompt.max_tokens else PromptScoring
