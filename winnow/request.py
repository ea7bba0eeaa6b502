"""What a request asks for and what became of it: plain data that every part of Winnow shares.

All dataclasses are frozen and checked when they are made: a value out of range raises
InvalidSetting that names the number and the limit.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from winnow.catalog import COMPRESSIONS, METHODS, RECOMPRESSIONS, load
from winnow.errors import InvalidSetting

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
_MAX_COUNT = 2**31 - 1


class FinishReason(StrEnum):
    STOP = "stop"  # an end token, one of `stop_token_ids`, or a stop string
    LENGTH = "length"  # max_tokens, or the model's last position


def require_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    """Raise InvalidSetting unless low <= value <= high (low < value with `low_open`)."""
    if not (low < value if low_open else low <= value) or not value <= high:
        bracket = "(" if low_open else "["
        raise InvalidSetting(
            f"{name} is {value:.12g}; the allowed range is {bracket}{low:g}, {high:.12g}]",
            param=name,
        )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the logits, and when to stop.

    temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off; num_logprobs None gives
    no log-probabilities, 0 the chosen token's only, k the k likeliest tokens' too.
    stop_token_ids: tokens that end the answer besides the model's end tokens.
    min_tokens: neither those nor end tokens are sampled before so many tokens have been, and no
    stop string ends the answer.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    num_logprobs: int | None = None
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        require_range("max_tokens", self.max_tokens, 1, _MAX_COUNT)
        require_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        require_range("temperature", self.temperature, 0, 2)
        require_range("top_p", self.top_p, 0, 1, low_open=True)
        require_range("top_k", self.top_k, 0, _MAX_COUNT)
        require_range("min_p", self.min_p, 0, 1)
        require_range("seed", self.seed, 0, 2**63 - 1)
        require_range("presence_penalty", self.presence_penalty, -2, 2)
        require_range("frequency_penalty", self.frequency_penalty, -2, 2)
        require_range("repetition_penalty", self.repetition_penalty, 0, 10, low_open=True)
        require_range("logit_bias", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        for bias in self.logit_bias.values():
            require_range("logit_bias", bias, -100, 100)
        if self.num_logprobs is not None:
            require_range("logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        require_range("stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)

    @property
    def needs_prompt(self) -> bool:
        """True if sampling looks at the prompt's token ids."""
        return self.repetition_penalty != 1.0

    def ends(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end an answer of a model with these end tokens."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids


@dataclass(frozen=True, slots=True)
class Recompression:
    """Decode's side of PruningSettings, which explains the fields; `method` is `recompression`."""

    decode_budget: int | None = None
    decode_floor: int | None = None
    recompress_interval: int = 128
    method: str = "snapkv"
    redundancy_weight: float = 0.1
    window_size: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        _require_choice("recompression", self.method, RECOMPRESSIONS)
        _require_window(self.window_size, self.kernel_size)
        require_range("recompress_interval", self.recompress_interval, 1, 2**20)
        require_range("redundancy_weight", self.redundancy_weight, 0, 1)
        _require_above_window("decode_budget", self.decode_budget, self.window_size)
        _require_above_window("decode_floor", self.decode_floor, self.window_size)
        if self.decode_budget is not None and self.decode_floor is not None:
            require_range("decode_floor", self.decode_floor, 1, self.decode_budget)

    @property
    def observes(self) -> bool:
        """Whether entries may have to be scored, so that the last queries are kept."""
        return self.decode_budget is not None or self.decode_floor is not None


@dataclass(frozen=True, slots=True)
class PruningSettings:
    """How prompt and cache are pruned. Defaults are the paper's for 28 to 48 layers.

    method           one of winnow.methods.METHODS: which tokens go on, which KV is kept.
    select_tokens    prompt tokens (window included) that go on above the selection layer.
    window_size      last prompt tokens whose queries observe all others (w).
    kernel_size      pooling width over positions, odd (S).
    observed_layers  layers over which rank variance is taken (L_obs).
    min_layer        first layer at which ASL may select, counted from 0 (L_min).
    threshold        select when relative rank variance falls below it (tau).
    latest_layer     select here at the latest; None: with a threshold never met, asl selects
                     nothing, asl-2pass at the last layer.
    fixed_layer      where fastkv and gemfilter select.
    compression      snapkv: `kv_budget` entries per KV head; adakv: `kv_budget` on average, shared
                     out over a layer's heads; top_p: the smallest set per KV head with attention
                     mass `kv_top_p`; none: every computed entry is kept. For snapkv, fastkv, asl;
                     the other methods have rules of their own.
    full_kv_below    fastkv and asl: layers up to the selection layer keep all their KV.
    decode_budget    entries per KV head that decode keeps while it generates; None: all.
    decode_floor     entries per KV head, down to which decode may cut when its memory is short;
                     None: it never cuts below decode_budget.
    recompress_interval  entries over decode_budget that may gather before decode cuts back.
    recompression    how decode cuts back: snapkv, or rkv, which weighs redundant keys down.
    redundancy_weight  rkv: weight of the attention against redundancy, 0 to 1 (lambda).
    """

    method: str = "asl"
    select_tokens: int = 2048
    window_size: int = 32
    kernel_size: int = 7
    observed_layers: int = 8
    min_layer: int = 10
    threshold: float = 0.3
    latest_layer: int | None = None
    fixed_layer: int = 15
    compression: str = "snapkv"
    kv_budget: int | None = 2048
    kv_top_p: float = 0.95
    full_kv_below: bool = False
    decode_budget: int | None = None
    decode_floor: int | None = None
    recompress_interval: int = 128
    recompression: str = "snapkv"
    redundancy_weight: float = 0.1

    def __post_init__(self) -> None:
        for setting in fields(self):
            _require_type(setting.name, getattr(self, setting.name), setting.type)
        _require_choice("method", self.method, METHODS)
        _require_choice("compression", self.compression, COMPRESSIONS)
        _require_window(self.window_size, self.kernel_size)
        require_range("observed_layers", self.observed_layers, 1, 1024)
        require_range("threshold", self.threshold, 0, 1e6)
        require_range("kv_top_p", self.kv_top_p, 0, 1, low_open=True)
        require_range("fixed_layer", self.fixed_layer, 0, 1023)
        _require_above_window("select_tokens", self.select_tokens, self.window_size)
        _require_above_window("kv_budget", self.kv_budget, self.window_size)
        _ = self.decode_side  # which checks its own
        if self.min_layer < self.observed_layers - 1:
            raise InvalidSetting(
                f"min_layer is {self.min_layer}; with observed_layers {self.observed_layers} "
                f"it must be at least {self.observed_layers - 1}",
                param="min_layer",
            )
        if self.latest_layer is not None and self.latest_layer < self.min_layer:
            raise InvalidSetting(
                f"latest_layer is {self.latest_layer}; it must be at least "
                f"min_layer, {self.min_layer}",
                param="latest_layer",
            )

    @property
    def decode_side(self) -> Recompression:
        """What decode has to know."""
        names = {field.name for field in fields(Recompression)} - {"method"}
        own = {name: getattr(self, name) for name in names}
        return Recompression(method=self.recompression, **own)

    def max_prompt_entries(self, num_prompt_tokens: int, num_kv_heads: int) -> int:
        """KV entries per (layer, KV head) that a prompt can leave behind at most."""
        method = load(METHODS[self.method])
        return int(method.max_entries(self, num_prompt_tokens, num_kv_heads))

    def require_fits(self, num_layers: int) -> None:
        """Raise InvalidSetting for a layer that a model of `num_layers` does not have."""
        load(METHODS[self.method]).require_fits(self, num_layers)


def _require_window(window_size: int, kernel_size: int) -> None:
    require_range("window_size", window_size, 1, 1024)
    require_range("kernel_size", kernel_size, 1, 1023)
    if kernel_size % 2 == 0:
        raise InvalidSetting(f"kernel_size is {kernel_size}; it must be odd", param="kernel_size")


def _require_above_window(name: str, value: int | None, window_size: int) -> None:
    if value is None:
        return
    if value <= window_size:
        raise InvalidSetting(
            f"{name} is {value}; it must be above window_size, {window_size}", param=name
        )
    require_range(name, value, 1, _MAX_COUNT)


_TYPE_NAMES: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    int | None: "a whole number or null",
    float: "a number",
    str: "a word",
}


def _require_type(name: str, value: object, declared: Any) -> None:  # noqa: ANN401 - a field's type
    """Whole numbers are numbers too; true and false are neither."""
    accepted = int | float if declared is float else declared
    is_bool = isinstance(value, bool)
    if is_bool != (declared is bool) or not isinstance(value, accepted):
        raise InvalidSetting(f"{name} is {value!r}; it must be {_TYPE_NAMES[declared]}", param=name)


def _require_choice(name: str, value: object, choices: Iterable[object]) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise InvalidSetting(f"{name} is {value!r}; known are {known}", param=name)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an attempt shows the decode worker. token: 32 bytes."""

    wire_version: int
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SequenceState:
    """Where a running sequence is, besides its KV and its last queries.

    next_position: as in PrefillReport, of its next token.
    recompressed_entries: of its whole request.  at_floor: its budget was lowered to decode_floor.
    """

    token_ids: tuple[int, ...]
    next_position: int
    recompressed_entries: int = 0
    at_floor: bool = False


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """One attempt at one prompt's prefill: what the gateway hands to a prefill worker.

    attempt counts from 1; decode refuses frames of an attempt older than one it has seen.
    deadline_s is seconds from the moment the job is received.
    trace_context is the W3C traceparent of the request; empty where it is not traced.
    admitted: an earlier prefill of the request was let in, so this one is not refused for others
    that wait.
    kv_address, ticket: None where nothing is generated, so that nobody wants the KV.
    num_prompt_logprobs: as in SamplingParams, of the prompt's own tokens; needs method `full`.
    """

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    pruning: PruningSettings
    kv_address: str | None
    ticket: Ticket | None
    deadline_s: float
    trace_context: str = ""
    admitted: bool = False
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """What prefill did with one prompt.

    selection_layer: layer after which fewer tokens went on (the first, where there are several),
    or None with `no_selection_reason` (`off`, `short_prompt`, `threshold_not_met`).
    num_selected_tokens: tokens that the last layer computed.
    next_position: at which decoding goes on: num_prompt_tokens, or num_selected_tokens where the
    selected tokens were computed again from position 0.
    rho: (layer, relative rank variance) for each layer at which ASL looked.
    computed_share: layer-tokens computed / (num_layers * num_prompt_tokens), up to 1; of a method
    that computes twice the sum of both passes, up to 2.
    kv_bytes_full, kv_bytes_kept: keys and values of every token, and of the kept entries.
    layer_entries: kept KV entries per layer, summed over KV heads.
    """

    num_prompt_tokens: int
    num_selected_tokens: int
    next_position: int
    selection_layer: int | None
    no_selection_reason: str | None
    rho: tuple[tuple[int, float], ...]
    computed_share: float
    kv_bytes_full: int
    kv_bytes_kept: int
    layer_entries: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillTimings:
    """Seconds of one prefill in the service.

    queue_s: waited for the engine. compute_s: forward passes. transfer_s: first frame sent to
    receipt. exposed_transfer_s: from the end of compute to the receipt, what overlap did not hide.
    wire_bytes: bytes of all frames.
    """

    queue_s: float
    compute_s: float
    transfer_s: float
    exposed_transfer_s: float
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities under the raw logits: the chosen token's and the top ones'."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """As TokenLogprobs, of every token of a prompt but the first, which nothing predicts.

    logprobs: [num_tokens - 1], each token's.  top_ids, top_logprobs: [num_tokens - 1][k].
    Plain lists, since they cross processes and are long.
    """

    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    def of_each(self) -> Iterator[TokenLogprobs | None]:
        """Each token's, from the first on, which has none."""
        yield None
        for logprob, ids, values in zip(
            self.logprobs, self.top_ids, self.top_logprobs, strict=True
        ):
            yield TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)))


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of sequence `sequence_idx` (0 to n - 1); `finish_reason` on the last."""

    sequence_idx: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What a prefill worker answers when an attempt's KV is in place, or was not wanted."""

    report: PrefillReport
    timings: PrefillTimings
    prompt_logprobs: PromptLogprobs | None = None
