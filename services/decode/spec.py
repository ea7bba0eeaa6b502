"""Conversion of a Generate request to the engine's GenerationSpec, with validation."""

import re

from services.common.messages import recompression_from_proto, sampling_from_proto
from winnow.checks import require_token_ids
from winnow.engine.generation_spec import GenerationSpec
from winnow.errors import InvalidSetting
from winnow.pruning_settings import Recompression
from winnow.sampling_params import SamplingParams
from winnow.v1 import decode_pb2 as pb

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def spec_from_request(request: pb.GenerateRequest, vocab_size: int) -> GenerationSpec:
    """Raises InvalidSetting, naming the field, for any value out of range."""
    if not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidSetting(
            "request_id must be 1 to 128 characters of [A-Za-z0-9_.-]", param="request_id"
        )
    sampling = sampling_from_proto(request.sampling)
    _require_prompt(request, sampling)
    require_token_ids("prompt_token_ids", request.prompt_token_ids, vocab_size)
    require_token_ids("logit_bias", sampling.logit_bias, vocab_size)
    require_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _require_replayed(request, vocab_size)
    return GenerationSpec(
        request_id=request.request_id,
        num_prompt_tokens=request.num_prompt_tokens,
        max_prompt_entries=request.max_prompt_entries,
        sampling=sampling,
        num_sequences=request.num_sequences,
        recompression=_recompression(request),
        prompt_token_ids=tuple(request.prompt_token_ids),
        replayed=tuple(tuple(sequence.token_ids) for sequence in request.replayed),
        assured=request.assured,
        moved=request.HasField("origin"),
    )


def _recompression(request: pb.GenerateRequest) -> Recompression:
    if request.HasField("recompression"):
        return recompression_from_proto(request.recompression)
    return Recompression()  # no decode_budget, no decode_floor: KV is never cut


def _require_prompt(request: pb.GenerateRequest, sampling: SamplingParams) -> None:
    """Require all prompt tokens if a penalty reads them, otherwise none."""
    needed = request.num_prompt_tokens if sampling.needs_prompt else 0
    got = len(request.prompt_token_ids)
    if got != needed:
        raise InvalidSetting(
            f"prompt_token_ids has {got} tokens; {needed} are needed", param="prompt_token_ids"
        )


def _require_replayed(request: pb.GenerateRequest, vocab_size: int) -> None:
    """Require none, or each sequence's generated tokens: at most `max_tokens` of them."""
    if request.replayed and len(request.replayed) != request.num_sequences:
        raise InvalidSetting(
            f"replayed has {len(request.replayed)} sequences; the request has "
            f"{request.num_sequences}",
            param="replayed",
        )
    for sequence in request.replayed:
        require_token_ids("replayed", sequence.token_ids, vocab_size)
        if len(sequence.token_ids) > request.sampling.max_tokens:
            raise InvalidSetting(
                f"replayed has {len(sequence.token_ids)} tokens of a sequence; max_tokens is "
                f"{request.sampling.max_tokens}",
                param="replayed",
            )
