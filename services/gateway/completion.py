"""One request's prompts run together, and their answers as one stream of deltas."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from services.common.tasks import end, is_cancelled
from services.gateway.ask import Ask
from services.gateway.choices import Choice, Delta, EndTokens
from services.gateway.generation import PromptRequest
from services.gateway.lifecycle import PromptRun, Service
from services.gateway.metrics import GatewayMetrics
from services.gateway.served_model import ServedModel
from services.gateway.usage import Usage, winnow_usage
from winnow.text_stream import TextStream

# Deltas that wait for a slow client before decode is made to wait.
_MAX_WAITING_DELTAS = 256


class Completion:
    """Made with `Gateway.open`, which admits and frees the runs."""

    def __init__(
        self, ask: Ask, runs: Sequence[PromptRun], model: ServedModel, metrics: GatewayMetrics
    ) -> None:
        self.ask = ask
        self.runs = runs
        self.choices = [
            Choice(
                prompt_idx * ask.num_choices + sequence_idx,
                _text_stream(ask, model),
                prompt.echo,
                EndTokens.of(ask.sampling, model.description.eos_token_ids),
                metrics,
            )
            for prompt_idx, prompt in enumerate(ask.prompts)
            for sequence_idx in range(ask.num_choices)
        ]

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Every choice's deltas as they come; raises the first error of any prompt."""
        waiting: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_MAX_WAITING_DELTAS)
        pumps = [
            asyncio.create_task(self._pump(prompt_idx, waiting))
            for prompt_idx in range(len(self.runs))
        ]
        try:
            running = len(pumps)
            while running:
                item = await waiting.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            await end(*pumps)

    def choices_of(self, prompt_idx: int) -> list[Choice]:
        first = prompt_idx * self.ask.num_choices
        return self.choices[first : first + self.ask.num_choices]

    def usage(self) -> Usage:
        """What was used, once every delta was read."""
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.ask.prompts),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            prompts=tuple(winnow_usage(run.figures) for run in self.runs),
        )

    async def _pump(
        self, prompt_idx: int, waiting: asyncio.Queue[Delta | Exception | None]
    ) -> None:
        """Puts one prompt's deltas, then None, or the exception that ended it.

        A cancel that comes from within is one too: nobody else would tell the reader.
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
        """One prompt's deltas; ends its run as soon as all its choices have ended."""
        run, choices = self.runs[prompt_idx], self.choices_of(prompt_idx)
        async with aclosing(run.tokens()) as steps:
            async for tokens in steps:
                for token in tokens:
                    delta = choices[token.sequence_idx].take(token)
                    if delta is not None:
                        yield delta
                if all(choice.finish_reason for choice in choices):
                    break
            await run.finish()


def _text_stream(ask: Ask, model: ServedModel) -> TextStream:
    return TextStream(
        model.tokenizer,
        ask.stop,
        include_stop_str_in_output=ask.include_stop_str_in_output,
        skip_special_tokens=ask.skip_special_tokens,
        min_tokens=ask.sampling.min_tokens,
    )


def prompt_runs(
    ask: Ask, service: Service, timeout_s: float, trace_context: str = ""
) -> list[PromptRun]:
    """A run per prompt; all end within `timeout_s` seconds."""
    deadline_s = time.monotonic() + timeout_s
    return [
        PromptRun(
            PromptRequest(
                request_id=f"{ask.request_id}-{prompt_idx}",
                token_ids=prompt.token_ids,
                num_sequences=ask.num_choices,
                sampling=replace(ask.sampling, max_tokens=prompt.max_tokens),
                pruning=ask.pruning,
                trace_context=trace_context,
            ),
            service,
            deadline_s,
        )
        for prompt_idx, prompt in enumerate(ask.prompts)
    ]
