"""Answers that a test writes, in the place of a model's."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest

from services.gateway.request.generation_run import PromptRun
from services.gateway.rest import requests
from tests.services.gateway.service import MODEL_NAME, TestService
from winnow.tokens import FinishReason, Token

Say = Callable[..., dict[str, Any]]
QUESTION: Any = [{"role": "user", "content": "Rain or sun?"}]


def saying(service: TestService, monkeypatch: pytest.MonkeyPatch, tools: list[Any]) -> Say:
    """Makes the model's answer a text; returns parameters of a request for it.

    The tokens of the real answer, which no grammar ends early, are replaced on their way through
    the gateway. The last one is `end`, unless the answer is cut off.
    """
    real, tokenizer = PromptRun.tokens, service.gateway.model.tokenizer

    def say(
        text: str, finish: FinishReason = FinishReason.STOP, end: int = 0, **more: Any
    ) -> dict[str, Any]:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if finish is FinishReason.STOP:
            token_ids.append(end)

        async def tokens(run: PromptRun) -> AsyncGenerator[list[Token]]:
            idx = 0
            async for step in real(run):
                reason = finish if idx == len(token_ids) - 1 else None
                yield [
                    replace(token, token_id=token_ids[idx], finish_reason=reason) for token in step
                ]
                idx += 1

        monkeypatch.setattr(PromptRun, "tokens", tokens)
        monkeypatch.setattr(requests, "enforced", lambda *_, **__: None)
        extra = {"ignore_eos": True, **more.pop("extra_body", {})}
        given = {"model": MODEL_NAME, "messages": QUESTION, "tools": tools} | more
        return given | {"max_tokens": len(token_ids), "extra_body": extra}

    return say


async def chunks_of(service: TestService, given: dict[str, Any]) -> list[Any]:
    """The chunks of the answer to these parameters."""
    stream = await service.openai.chat.completions.create(**given, stream=True)
    return [chunk async for chunk in stream]
