import pickle
from dataclasses import dataclass

from winnow.versions import set_fields


@dataclass(frozen=True, slots=True)
class Message:
    text: str
    count: int
    added: str = "default"

    __setstate__ = set_fields


def received(values: list[object]) -> Message:
    message = object.__new__(Message)
    message.__setstate__(values)
    return message


def test_what_is_sent_arrives() -> None:
    message = Message("a", 1, "given")
    assert pickle.loads(pickle.dumps(message)) == message


def test_fields_that_an_older_sender_lacks_have_their_defaults() -> None:
    assert received(["a", 1]) == Message("a", 1, "default")


def test_fields_of_a_newer_sender_are_left_out() -> None:
    assert received(["a", 1, "given", "of the future"]) == Message("a", 1, "given")
