"""`winnow chat`: a conversation about a file, with the figures of each turn in one line."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

from evals.rest_client import RestClient
from services.cli.answers import LocalModel, Service
from services.cli.conversation import Answering, Conversation, Piece
from services.cli.flags import LOCAL_CHAT
from services.cli.generate import load_winnow, read_text
from services.cli.signals import FirstInterrupt
from services.common.settings import Settings
from winnow.answers.parts import ReasoningPart
from winnow.errors import InvalidSetting, WinnowError
from winnow.sampling_params import SamplingParams

_STORE_BYTES = 1 << 30
_DIM, _PLAIN = "\033[2m", "\033[0m"


def chat(args: argparse.Namespace, settings: Settings) -> None:
    """Answer questions from standard input until an empty one or its end.

    Ctrl-C stops an answer; at a question it ends the conversation.
    Raises WinnowError if the file, the model or the service cannot be used.
    """
    if args.file == "-":
        raise InvalidSetting("standard input has the questions; give a file", param="file")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # see _is_text
    text = read_text(args.file)
    with _source(args, settings) as source:
        conversation = Conversation(source, text, args.system)
        while question := _next_question():
            if _is_text(question):
                _answer(conversation, question)
            else:
                sys.stderr.write("winnow: the question is not UTF-8\n")


@contextmanager
def _source(args: argparse.Namespace, settings: Settings) -> Iterator[Answering]:
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)
    if args.endpoint is None:
        given = settings.model_fields_set
        store = settings.prefix_cache_bytes if "prefix_cache_bytes" in given else _STORE_BYTES
        winnow = load_winnow(settings, store, args.adapter)
        yield LocalModel(winnow, sampling, settings, args.adapter)
        return
    _require_no_local_flags(args)
    with RestClient(args.endpoint, 1, os.environ.get("OPENAI_API_KEY")) as client:
        yield Service(client, sampling, settings)


def _require_no_local_flags(args: argparse.Namespace) -> None:
    if args.adapter is not None:
        raise InvalidSetting(
            "--adapter is of a model in this process; with --endpoint name it by --model-name",
            param="adapter",
        )
    for name in LOCAL_CHAT:
        if name in vars(args):
            flag = "--" + name.replace("_", "-")
            raise InvalidSetting(
                f"{flag} is for a model in this process; it has no effect with --endpoint",
                param=name,
            )


def _next_question() -> str:
    """Without surrounding spaces; empty at the end of standard input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().strip()
    try:
        return input("> ").strip()
    except EOFError:
        sys.stdout.write("\n")
        return ""


def _is_text(question: str) -> bool:
    """Whether no byte was replaced by half a surrogate pair, since it is not UTF-8."""
    try:
        question.encode()
    except UnicodeEncodeError:
        return False
    return True


def _answer(conversation: Conversation, question: str) -> None:
    """Show an answer with its figures, or why there is none."""
    screen = _Screen()
    try:
        with FirstInterrupt() as interrupt, closing(conversation.ask(question)) as pieces:
            for piece in pieces:
                screen.show(piece)
                if interrupt.arrived:
                    break
        screen.end()
        sys.stderr.write(f"winnow: {conversation.figures or 'stopped'}\n")
    except WinnowError as error:
        screen.end()
        sys.stderr.write(f"winnow: {error}\n")


class _Screen:
    """Writes one answer to standard output; what the model reasons is dim, on terminals alone."""

    def __init__(self) -> None:
        self._shows_reasoning = sys.stdout.isatty()
        self._reasons = False
        self._begun = False

    def show(self, piece: Piece | None) -> None:
        if piece is None:
            return
        reasons = isinstance(piece, ReasoningPart)
        if reasons and not self._shows_reasoning:
            return
        if reasons != self._reasons:
            sys.stdout.write(_DIM if reasons else f"{_PLAIN}\n")
        self._reasons, self._begun = reasons, True
        sys.stdout.write(piece.text)
        sys.stdout.flush()

    def end(self) -> None:
        """End the line, if there is one."""
        if self._begun:
            sys.stdout.write(f"{_PLAIN}\n" if self._reasons else "\n")
            sys.stdout.flush()
