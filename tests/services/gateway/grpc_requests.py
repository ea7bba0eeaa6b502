"""Requests of winnow.v1.Inference."""

from typing import Any

from tests.services.gateway.service import MODEL_NAME
from winnow.v1 import inference_pb2 as pb

PROMPT = list(range(5, 45))


def request(**changes: Any) -> pb.CompleteRequest:
    values: dict[str, Any] = {
        "model": MODEL_NAME,
        "token_ids": pb.TokenIds(ids=PROMPT),
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    }
    if {"text", "messages"} & set(changes):
        del values["token_ids"]
    return pb.CompleteRequest(**(values | changes))
