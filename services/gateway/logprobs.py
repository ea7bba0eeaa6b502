"""Log-probabilities of tokens in the completion and chat formats of OpenAI's API."""

from collections.abc import Iterable, Sequence
from typing import Any

from winnow.text_stream import IncrementalDetokenizer
from winnow.tokenizer import Tokenizer
from winnow.tokens import Token


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; `bytes:\\xe2\\x82` for part of a character, as in OpenAI's API.

    An ID that the model has but the vocabulary does not becomes `token_id:` and the number.
    """
    raw = tokenizer.token_bytes(token_id)
    if not raw:
        return f"token_id:{token_id}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """`logprobs` of one choice of a text completion: parallel lists, offsets in characters.

    echo: the text at the beginning of the choice. prompt_offsets: where each prompt token begins in
    it, if prompt tokens are listed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        echo: str,
        prompt_offsets: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens
        )
        self._prompt_offsets = prompt_offsets
        self._offset = len(echo)

    def take(self, prompt: Sequence[Token], tokens: Iterable[Token]) -> dict[str, list[Any]]:
        """Lists for the prompt's tokens (the first has no log-probability) and the next tokens."""
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if prompt:
            for token, offset in zip(prompt, self._prompt_offsets, strict=True):
                self._list(lists, token, offset)
        for token in tokens:
            self._list(lists, token, self._offset)
            self._offset += len(self._detokenizer.feed(token.token_id))
        return lists

    def _list(self, lists: dict[str, list[Any]], token: Token, offset: int) -> None:
        logprobs = token.logprobs
        lists["tokens"].append(token_text(self._tokenizer, token.token_id))
        lists["token_logprobs"].append(None if logprobs is None else logprobs.logprob)
        lists["top_logprobs"].append(None if logprobs is None else self._top(logprobs.top))
        lists["text_offset"].append(offset)

    def _top(self, top: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by text; of two tokens with the same text the likelier one counts."""
        by_text: dict[str, float] = {}
        for token_id, logprob in top:
            by_text.setdefault(token_text(self._tokenizer, token_id), logprob)
        return by_text


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token]) -> dict[str, Any]:
    """`logprobs` of a chat choice: one object per token, with its bytes."""
    content = []
    for token in tokens:
        assert token.logprobs is not None
        entry = _chat_entry(tokenizer, token.token_id, token.logprobs.logprob)
        top = [_chat_entry(tokenizer, *likely) for likely in token.logprobs.top]
        content.append({**entry, "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
