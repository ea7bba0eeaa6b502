"""EndpointModel: answers from a running Winnow service over its REST API, in parallel requests."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from evals.model import Answer, Instance
from evals.rest_client import RestClient
from evals.tasks.base import Example
from evals.variants import Variant


class EndpointModel:
    """A model served by a Winnow service; prompts are sent as token ids of its tokenizer.

    pruning: sent with every request; the variant's settings override it.
    """

    def __init__(
        self,
        client: RestClient,
        *,
        model: str | None,
        chat: bool,
        pruning: Mapping[str, Any],
    ) -> None:
        """Raises InvalidSetting if there is no Winnow service, or it does not serve the model."""
        self._client = client
        self._chat = chat
        self._pruning = dict(pruning)
        card = client.model_card(model)
        self._model = str(card["id"])
        self._max_positions = int(card["max_model_len"])
        self._frame_tokens = len(self._frame(""))

    @property
    def max_positions(self) -> int:
        return self._max_positions

    @property
    def frame_tokens(self) -> int:
        return self._frame_tokens

    def identity(self) -> dict[str, Any]:
        return {"model": self._model, "endpoint": self._client.url, "pruning": self._pruning}

    def count(self, text: str) -> int:
        return len(self._tokenize(prompt=text, add_special_tokens=False))

    def threshold(self, variant: Variant) -> float | None:
        """Known only if the request sets it."""
        return self._changes(variant).get("threshold")

    def require_runs(
        self, variants: Sequence[Variant], num_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        """Send one prompt of that length per variant, to check the service's own limits."""
        token_ids = self._tokenize(prompt="the " * num_prompt_tokens)[:num_prompt_tokens]
        with ThreadPoolExecutor(self._client.num_parallel) as threads:
            list(threads.map(lambda v: self._complete(token_ids, v, max_new_tokens), variants))

    def answers(self, instances: Iterable[Instance]) -> Iterator[tuple[Instance, Answer]]:
        waiting = iter(instances)
        running: dict[Future[Answer], Instance] = {}
        with ThreadPoolExecutor(self._client.num_parallel) as threads:
            while True:
                for instance in islice(waiting, self._client.num_parallel - len(running)):
                    running[threads.submit(self._answer, instance)] = instance
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()

    def _answer(self, instance: Instance) -> Answer:
        token_ids = self._token_ids(instance.example)
        return self._complete(token_ids, instance.variant, instance.example.max_new_tokens)

    def _complete(self, token_ids: Sequence[int], variant: Variant, max_new_tokens: int) -> Answer:
        body = {
            "model": self._model,
            "prompt": list(token_ids),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "repetition_penalty": 1,  # as in LocalModel, whatever the service's default is
            "winnow": self._changes(variant),
        }
        started_s = time.perf_counter()
        answer = self._client.post("/v1/completions", body)
        seconds = time.perf_counter() - started_s
        try:
            return _read_answer(answer, seconds)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise self._client.no_winnow_service(error) from error

    def _changes(self, variant: Variant) -> dict[str, Any]:
        return self._pruning | variant.changes

    def _token_ids(self, example: Example) -> list[int]:
        if not self._chat:
            return self._frame(example.prompt())
        lead = self._tokenize(prompt=example.lead, add_special_tokens=False)
        return self._frame(example.user_message()) + lead

    def _frame(self, text: str) -> list[int]:
        """Token ids of the text as a whole prompt."""
        if self._chat:
            return self._tokenize(messages=[{"role": "user", "content": text}])
        return self._tokenize(prompt=text)

    def _tokenize(self, **body: object) -> list[int]:
        answer = self._client.post("/tokenize", body)
        try:
            return list(answer["tokens"])
        except (KeyError, TypeError) as error:
            raise self._client.no_winnow_service(error) from error


def _read_answer(body: Mapping[str, Any], seconds: float) -> Answer:
    usage, winnow = body["usage"], body["usage"]["winnow"]
    return Answer(
        text=body["choices"][0]["text"],
        num_prompt_tokens=usage["prompt_tokens"],
        num_answer_tokens=usage["completion_tokens"],
        selection_layer=winnow["selection_layer"],
        no_selection_reason=winnow["no_selection_reason"] or None,
        rho=tuple(sorted((int(layer_idx), rho) for layer_idx, rho in winnow["rho"].items())),
        computed_share=winnow["computed_share"],
        kv_bytes_full=winnow["kv_bytes_full"],
        kv_bytes_kept=winnow["kv_bytes_kept"],
        prefill_s=winnow["prefill_s"],
        seconds=seconds,
    )
