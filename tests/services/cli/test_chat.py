"""`winnow chat`: questions from standard input, answers with their figures."""

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from evals.rest_client import RestClient
from services.cli.answers import Service
from services.cli.conversation import Conversation, Figures, Message, Piece, as_messages, as_prompt
from services.cli.main import main
from services.cli.signals import FirstInterrupt
from services.common.settings import Settings
from tests.deadlines import SOON_S
from tests.e2e.winnow_process import ROOT, environment
from winnow.answers.parts import ReasoningPart, TextPart
from winnow.errors import EngineFailed
from winnow.sampling_params import SamplingParams

FIGURES = re.compile(
    r"winnow: [\d,]+ tokens(, (?P<cached>[\d,]+) cached)?; layer (none|\d+), [\d,]+ went on; "
    r"KV [\d.]+ of [\d.]+ MiB; first token [\d.]+ s, \d+ tokens/s"
)
TURNS = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "the fox"},
    {"role": "user", "content": "when?"},
]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return path


def asked(
    document: Path, model: Path, questions: str, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    return main(["chat", str(document), "--model", str(model), "--num-threads", "1", *flags])


def test_each_turn_tells_its_figures_and_later_ones_begin_with_what_is_cached(
    tiny_models: dict[str, Path],
    document: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions = "who jumps?\nover what?\n\nnever asked\n"
    assert asked(document, tiny_models["llama"], questions, monkeypatch, "--max-tokens", "4") == 0
    told = [
        match for match in map(FIGURES.fullmatch, capsys.readouterr().err.splitlines()) if match
    ]
    assert len(told) == 2
    assert told[0]["cached"] is None
    assert int(told[1]["cached"].replace(",", "")) > 100


def test_a_question_that_cannot_be_answered_is_told_and_the_conversation_goes_on(
    tiny_models: dict[str, Path],
    document: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions = "fox " * 1000 + "\nwho jumps?\n"
    short = ("--max-tokens", "4", "--max-model-len", "1000")
    assert asked(document, tiny_models["llama"], questions, monkeypatch, *short) == 0
    errors = capsys.readouterr().err
    assert "; the limit is 999\n" in errors
    assert FIGURES.search(errors)


def test_standard_input_is_for_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-"]) == 2
    assert "standard input has the questions" in capsys.readouterr().err


def test_a_service_that_is_not_there_is_told(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(document), "--endpoint", "http://127.0.0.1:9"]) == 2
    assert "no service answers there" in capsys.readouterr().err


def test_the_text_comes_before_the_first_question_alone() -> None:
    asked = as_messages("TEXT", TURNS)
    assert [one["content"] for one in asked] == ["be short", "TEXT\n\nwho?", "the fox", "when?"]


def test_without_a_chat_template_the_conversation_is_text_to_continue() -> None:
    assert as_prompt("TEXT", TURNS) == (
        "TEXT\n\nbe short\nQuestion: who?\nAnswer: the fox\nQuestion: when?\nAnswer:"
    )


class Played:
    """A source, and a client of a service, whose answers are given."""

    figures: Figures | None = None

    def __init__(self, *pieces: Any) -> None:
        self.pieces = pieces
        self.asked: list[Any] = []

    def answer(self, text: str, messages: list[Message]) -> Generator[Piece | None]:
        self.asked.append(messages)
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def model_card(self, name: str | None) -> dict[str, Any]:
        return {"id": "another"}

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any] | None]:
        self.asked.append((path, body))
        yield from self.pieces


@pytest.mark.parametrize(
    ("pieces", "num_read", "stays"),
    [
        ((TextPart("the "), EngineFailed("it broke")), 2, None),
        ((None, TextPart("the fox")), 1, None),
        ((TextPart("the "), TextPart("fox")), 1, "the "),
        ((ReasoningPart("hm"), TextPart("fox")), 2, "fox"),
    ],
)
def test_an_answer_stays_in_the_conversation_unless_it_failed_or_had_no_text(
    pieces: tuple[Any, ...], num_read: int, stays: str | None
) -> None:
    source = Played(*pieces)
    conversation = Conversation(source, "TEXT")
    with suppress(EngineFailed), closing(conversation.ask("who?")) as answer:
        for _ in range(num_read):
            next(answer)
    source.pieces = ()
    list(conversation.ask("when?"))
    said = [one["content"] for one in source.asked[1] if one["role"] == "assistant"]
    assert said == ([] if stays is None else [stays])


def test_a_service_gets_what_was_asked_for_and_may_tell_no_figures_of_pruning() -> None:
    usage = {"prompt_tokens": 1200, "completion_tokens": 3, "prompt_tokens_details": None}
    client = Played(
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"content": "fox"}}]},
        {"choices": [], "usage": usage},
    )
    settings = Settings(pruning={"kv_budget": 64}, chat_template_kwargs={"enable_thinking": False})
    service = Service(cast(RestClient, client), SamplingParams(max_tokens=3), settings)
    assert list(service.answer("TEXT", TURNS[:2])) == [ReasoningPart("hm"), TextPart("fox"), None]
    ((path, body),) = client.asked
    assert path == "/v1/chat/completions"
    assert body["winnow"] == {"kv_budget": 64}
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert re.fullmatch(r"1,200 tokens; first token [\d.]+ s, \d+ tokens/s", str(service.figures))


def test_flags_of_a_model_in_this_process_are_refused_with_an_endpoint(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--endpoint", "http://127.0.0.1:9", "--max-model-len", "1000")
    assert main(["chat", str(document), *flags]) == 2
    assert "--max-model-len is for a model in this process" in capsys.readouterr().err


def test_a_question_that_is_not_utf_8_is_told_and_the_next_one_answered(
    tiny_models: dict[str, Path],
    document: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"wh\xff?\nwho jumps?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    model = ("--model", str(tiny_models["llama"]), "--num-threads", "1")
    assert main(["chat", str(document), *model, "--max-tokens", "2"]) == 0
    errors = capsys.readouterr().err
    assert "winnow: the question is not UTF-8\n" in errors
    assert FIGURES.search(errors)


def test_only_the_first_interrupt_is_noted() -> None:
    with FirstInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.arrived
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.e2e
def test_ctrl_c_stops_an_answer_and_the_next_question_is_answered(document: Path) -> None:
    command = [sys.executable, "-m", "winnow_serve", "chat", str(document), "--max-tokens", "2000"]
    process = subprocess.Popen(
        [*command, "--temperature", "2"],
        cwd=ROOT,
        env=environment(HF_HUB_OFFLINE="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"tell me everything\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(b"\n", timeout=SOON_S)
    assert process.returncode == 0
    assert len(FIGURES.findall(errors.decode())) == 1
