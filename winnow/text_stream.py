"""The text of an answer while its tokens are generated.

It never shows half a character and ends at a stop string, wherever token boundaries fall.
"""

import codecs
from collections.abc import Iterator, Sequence

from winnow.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Token ids to text as they come; an incomplete character waits for its other bytes."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; a control token that is skipped gives none.

        Bytes that can never become UTF-8 give U+FFFD as soon as that is certain.
        """
        if self.skips(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def skips(self, token_id: int) -> bool:
        """Whether it is a control token that the text does not show."""
        return self._skips and self._tokenizer.is_special(token_id)


class StopMatcher:
    """Cuts text at the stop string that is complete first, however the text is split.

    A text may be hidden: of a control token that the answer does not show. A stop string is looked
    for in what is shown, and in the text with what is hidden. Of several that end at the same
    character the one that begins first cuts.

    include_stop: the stop string itself is still shown.
    matched: the stop string that was met; None as long as there is none.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._hidden: list[bool] = []  # of each held character
        self.matched: str | None = None

    def feed(self, text: str, *, hidden: bool = False, may_stop: bool = True) -> str:
        """What is certainly before any stop string; the rest is held back, or dropped at a stop.

        may_stop: whether stop strings that this text completes count.
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
        """What is still held back, when no more text will come."""
        return "" if self.matched is not None else self._take(len(self._held))

    def _take(self, end: int) -> str:
        """What is shown of the held text before `end`, which is held no more."""
        hidden = self._hidden[:end]
        taken = self._held[:end]
        self._held, self._hidden = self._held[end:], self._hidden[end:]
        if any(hidden):
            return "".join(char for char, hides in zip(taken, hidden, strict=True) if not hides)
        return taken

    def _views(self) -> Iterator[tuple[str, Sequence[int]]]:
        """The texts in which stop strings are looked for, and where their characters are held."""
        yield self._held, range(len(self._held))
        if any(self._hidden):
            shown = [idx for idx, hides in enumerate(self._hidden) if not hides]
            yield "".join(self._held[idx] for idx in shown), shown

    def _first_match(self, num_held: int) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first, after `num_held` characters."""
        matches = []
        for view, places in self._views():
            num_old = sum(place < num_held for place in places)
            for stop in self._stop:
                start = view.find(stop, max(0, num_old - len(stop) + 1))
                if start >= 0:
                    matches.append((places[start + len(stop) - 1], places[start], stop))
        return min(matches)[1:] if matches else None

    def _possible_start(self) -> int:
        """Where the longest end of the held text begins that may become a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        starts = [len(self._held)]
        for view, places in self._views():
            for start in range(max(0, len(view) - longest), len(view)):
                if any(stop.startswith(view[start:]) for stop in self._stop):
                    starts.append(places[start])
                    break
        return min(starts)


class TextStream:
    """The text of one answer while its tokens are generated.

    stop: strings before which the text ends, or with which under include_stop_str_in_output;
    none ends it before more than `min_tokens` tokens have come.
    skip_special_tokens: control tokens are no part of the text, but can be part of a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens
        )
        self._matcher = StopMatcher(stop, include_stop=include_stop_str_in_output)
        self._shows_end = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0

    @property
    def stopped(self) -> bool:
        """True once a stop string was met; what comes after it is not part of the answer."""
        return self._matcher.matched is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met, if one was."""
        return self._matcher.matched

    def feed(self, token_id: int, *, is_end: bool = False) -> str:
        """The text that is certain after this token; may be empty.

        is_end: the answer ends with this token, which is no part of its text then.
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
        """The rest of the text when no more tokens come; an incomplete character is left out."""
        return self._matcher.finish()
