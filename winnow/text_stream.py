"""Incremental detokenization and stop strings.

Streamed text never has a partial character and ends at a stop string, at any token boundary.
"""

import codecs
from collections.abc import Iterator, Sequence, Set

from winnow.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Converts token ids to text one by one; an incomplete character is held back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown_token_ids: Set[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown_token_ids
        self._skips = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; none for a skipped control token.

        Invalid UTF-8 becomes U+FFFD as soon as it is known to be invalid.
        """
        if self.skips(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def skips(self, token_id: int) -> bool:
        """Whether the token is a control token that is left out of the text."""
        skipped = self._skips and token_id not in self._shown
        return skipped and self._tokenizer.is_special(token_id)


class StopMatcher:
    """Cuts text at the stop string that is complete first, however the text is split.

    Text of skipped control tokens is hidden. Stop strings are matched both against the shown text
    and against shown and hidden text together. If several end at the same character, the one that
    starts first wins.

    include_stop: keep the stop string itself in the text.
    matched: the stop string that was found; None so far.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._hidden: list[bool] = []  # of each held character
        self.matched: str | None = None

    def feed(self, text: str, *, hidden: bool = False, may_stop: bool = True) -> str:
        """The text that is certainly before any stop string; the rest is held back, or dropped.

        may_stop: whether a stop string that this text completes counts.
        """
        if self.matched is not None:
            return ""
        num_held = len(self._held)
        self._held += text
        self._hidden += [hidden] * len(text)
        match = self._first_match(num_held) if may_stop else None
        if match is None:
            return self._take(self._possible_start())
        start, self.matched = match
        return self._take(start) + (self.matched if self._include_stop else "")

    def finish(self) -> str:
        """The text still held back, once no more will come."""
        return "" if self.matched is not None else self._take(len(self._held))

    def _take(self, end: int) -> str:
        """Remove the held text before `end`; returns the part of it that is shown."""
        hidden = self._hidden[:end]
        taken = self._held[:end]
        self._held, self._hidden = self._held[end:], self._hidden[end:]
        if any(hidden):
            return "".join(char for char, hides in zip(taken, hidden, strict=True) if not hides)
        return taken

    def _views(self) -> Iterator[tuple[str, Sequence[int]]]:
        """The texts to search for stop strings, with the index of each character in `_held`."""
        yield self._held, range(len(self._held))
        if any(self._hidden):
            shown = [idx for idx, hides in enumerate(self._hidden) if not hides]
            yield "".join(self._held[idx] for idx in shown), shown

    def _first_match(self, num_held: int) -> tuple[int, str] | None:
        """Start of the stop string that is complete first, ending after `num_held` characters."""
        matches = []
        for view, places in self._views():
            num_old = sum(place < num_held for place in places)
            for stop in self._stop:
                start = view.find(stop, max(0, num_old - len(stop) + 1))
                if start >= 0:
                    matches.append((places[start + len(stop) - 1], places[start], stop))
        return min(matches)[1:] if matches else None

    def _possible_start(self) -> int:
        """Start of the longest suffix of the held text that may become a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        starts = [len(self._held)]
        for view, places in self._views():
            for start in range(max(0, len(view) - longest), len(view)):
                if any(stop.startswith(view[start:]) for stop in self._stop):
                    starts.append(places[start])
                    break
        return min(starts)


class TextStream:
    """The text of one completion while its tokens are generated.

    stop: strings that end the text, included in it only with include_stop_str_in_output; ignored
    for the first `min_tokens` tokens.
    skip_special_tokens: leave control tokens out of the text, except those of `shown_token_ids`;
    they can be part of a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        shown_token_ids: Set[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=skip_special_tokens,
            shown_token_ids=shown_token_ids,
        )
        self._matcher = StopMatcher(stop, include_stop=include_stop_str_in_output)
        self._shows_end = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; any later text is not part of the completion."""
        return self._matcher.matched is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, if any."""
        return self._matcher.matched

    def feed(self, token_id: int, *, is_end: bool = False) -> str:
        """The text that is certain after this token; may be empty.

        is_end: the token ends the completion; its text needs include_stop_str_in_output.
        """
        self._num_tokens += 1
        if is_end and not self._shows_end:
            return ""
        may_stop = self._num_tokens > self._min_tokens
        if self._detokenizer.skips(token_id):
            hidden = self._tokenizer.token_bytes(token_id).decode(errors="replace")
            return self._matcher.feed(hidden, hidden=True, may_stop=may_stop)
        return self._matcher.feed(self._detokenizer.feed(token_id), may_stop=may_stop)

    def finish(self) -> str:
        """The rest of the text after the last token; an incomplete character is left out."""
        return self._matcher.finish()
