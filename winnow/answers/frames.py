"""The ways in which models write reasoning and the answer itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from winnow.answers import channels
from winnow.answers.parts import Split
from winnow.answers.reasoning import END_THINK, THINK, ReasoningSplitter, reasoning_after
from winnow.grammar.compose import Reasoning, Tags


class Splitter(Protocol):
    """Splits the text of one answer."""

    def feed(self, text: str) -> Sequence[Split]:
        """What is certain after this text."""

    def finish(self) -> Sequence[Split]:
        """The rest, once no more text will come."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A way to write reasoning and answer.

    tags: as a grammar has them.  markers: texts for which a vocabulary may have tokens.
    signs: a chat template that has one of them is of this way.  splitter: for an answer that begins
    so.  begins: how the answer to a prompt begins.
    """

    tags: Tags
    markers: tuple[str, ...]
    signs: tuple[str, ...]
    splitter: Callable[[Reasoning], Splitter]
    begins: Callable[[str], Reasoning]


THINKING = Frame(
    Tags((THINK,), END_THINK),
    (THINK, END_THINK),
    (THINK, END_THINK),
    ReasoningSplitter,
    reasoning_after,
)
CHANNELS = Frame(
    Tags(
        before=(channels.CHANNEL, channels.ANALYSIS, channels.MESSAGE),
        after=channels.END,
        between=(channels.START, channels.ROLE),
        final=(channels.CHANNEL, channels.FINAL, channels.MESSAGE),
    ),
    channels.MARKERS,
    (channels.FINAL_HEADER,),
    channels.ChannelSplitter,
    channels.channel_after,
)
# By the setting reasoning_parser that names them; `auto` tries them in this order.
FRAMES = {"harmony": CHANNELS, "think": THINKING}
