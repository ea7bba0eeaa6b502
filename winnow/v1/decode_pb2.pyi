from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_RAW: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT16: DType
CODEC_UNSPECIFIED: Codec
CODEC_RAW: Codec
CODEC_INT8: Codec

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model_fingerprint", "num_prompt_tokens", "num_sequences", "max_prompt_entries", "sampling", "recompression", "prompt_token_ids", "wire_versions", "replayed", "origin", "assured", "sampler_version", "grammar", "adapter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RECOMPRESSION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    ASSURED_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_VERSION_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_fingerprint: str
    num_prompt_tokens: int
    num_sequences: int
    max_prompt_entries: int
    sampling: SamplingParams
    recompression: Recompression
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    wire_versions: _containers.RepeatedScalarFieldContainer[int]
    replayed: _containers.RepeatedCompositeFieldContainer[ReplayedTokens]
    origin: Origin
    assured: bool
    sampler_version: int
    grammar: Grammar
    adapter: Adapter
    def __init__(self, request_id: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_sequences: _Optional[int] = ..., max_prompt_entries: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., recompression: _Optional[_Union[Recompression, _Mapping]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., wire_versions: _Optional[_Iterable[int]] = ..., replayed: _Optional[_Iterable[_Union[ReplayedTokens, _Mapping]]] = ..., origin: _Optional[_Union[Origin, _Mapping]] = ..., assured: _Optional[bool] = ..., sampler_version: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "digest", "folder")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    folder: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., folder: _Optional[str] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("json_schema", "regex", "lark", "control_token_ids")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    LARK_FIELD_NUMBER: _ClassVar[int]
    CONTROL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    lark: str
    control_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., lark: _Optional[str] = ..., control_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Origin(_message.Message):
    __slots__ = ("kv_address", "request_id", "fetch_token")
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FETCH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    kv_address: str
    request_id: str
    fetch_token: bytes
    def __init__(self, kv_address: _Optional[str] = ..., request_id: _Optional[str] = ..., fetch_token: _Optional[bytes] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("request_id", "fetch_token", "into_request_id", "wire_version", "transfer_token", "sampler_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FETCH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    INTO_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fetch_token: bytes
    into_request_id: str
    wire_version: int
    transfer_token: bytes
    sampler_version: int
    def __init__(self, request_id: _Optional[str] = ..., fetch_token: _Optional[bytes] = ..., into_request_id: _Optional[str] = ..., wire_version: _Optional[int] = ..., transfer_token: _Optional[bytes] = ..., sampler_version: _Optional[int] = ...) -> None: ...

class ReplayedTokens(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "num_logprobs", "ignore_eos", "stop_token_ids", "min_tokens")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    num_logprobs: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_tokens: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., num_logprobs: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_tokens: _Optional[int] = ...) -> None: ...

class Recompression(_message.Message):
    __slots__ = ("decode_budget", "recompress_interval", "window_size", "kernel_size", "method", "redundancy_weight", "decode_floor")
    DECODE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    RECOMPRESS_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SIZE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REDUNDANCY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DECODE_FLOOR_FIELD_NUMBER: _ClassVar[int]
    decode_budget: int
    recompress_interval: int
    window_size: int
    kernel_size: int
    method: str
    redundancy_weight: float
    decode_floor: int
    def __init__(self, decode_budget: _Optional[int] = ..., recompress_interval: _Optional[int] = ..., window_size: _Optional[int] = ..., kernel_size: _Optional[int] = ..., method: _Optional[str] = ..., redundancy_weight: _Optional[float] = ..., decode_floor: _Optional[int] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("admitted", "prefilled", "tokens", "leaving", "moved", "waiting")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    prefilled: Prefilled
    tokens: Tokens
    leaving: Leaving
    moved: Moved
    waiting: Waiting
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., prefilled: _Optional[_Union[Prefilled, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Waiting(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Moved(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("worker_id", "kv_address", "lease_s", "reserved_pages", "wire_version", "transfer_secret", "sampler_version", "rank_kv_addresses")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    RESERVED_PAGES_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_SECRET_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_VERSION_FIELD_NUMBER: _ClassVar[int]
    RANK_KV_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    kv_address: str
    lease_s: float
    reserved_pages: int
    wire_version: int
    transfer_secret: bytes
    sampler_version: int
    rank_kv_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., kv_address: _Optional[str] = ..., lease_s: _Optional[float] = ..., reserved_pages: _Optional[int] = ..., wire_version: _Optional[int] = ..., transfer_secret: _Optional[bytes] = ..., sampler_version: _Optional[int] = ..., rank_kv_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Prefilled(_message.Message):
    __slots__ = ("attempt", "report")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    report: PrefillReport
    def __init__(self, attempt: _Optional[int] = ..., report: _Optional[_Union[PrefillReport, _Mapping]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("tokens", "recompressed_entries")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOMPRESSED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    recompressed_entries: int
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., recompressed_entries: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("sequence_idx", "token_id", "logprob", "top_logprobs", "finish_reason")
    SEQUENCE_IDX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    sequence_idx: int
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    finish_reason: FinishReason
    def __init__(self, sequence_idx: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("worker_id", "model_fingerprint", "wire_versions", "draining", "running_sequences", "reserved_requests", "pages_total", "pages_used", "pages_reserved", "page_size", "kv_bytes_used", "open_transfers", "swapped_sequences")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    PAGES_RESERVED_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    OPEN_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model_fingerprint: str
    wire_versions: _containers.RepeatedScalarFieldContainer[int]
    draining: bool
    running_sequences: int
    reserved_requests: int
    pages_total: int
    pages_used: int
    pages_reserved: int
    page_size: int
    kv_bytes_used: int
    open_transfers: int
    swapped_sequences: int
    def __init__(self, worker_id: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., wire_versions: _Optional[_Iterable[int]] = ..., draining: _Optional[bool] = ..., running_sequences: _Optional[int] = ..., reserved_requests: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_used: _Optional[int] = ..., pages_reserved: _Optional[int] = ..., page_size: _Optional[int] = ..., kv_bytes_used: _Optional[int] = ..., open_transfers: _Optional[int] = ..., swapped_sequences: _Optional[int] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("model_fingerprint", "adapter")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    adapter: Adapter
    def __init__(self, model_fingerprint: _Optional[str] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining_requests",)
    REMAINING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    remaining_requests: int
    def __init__(self, remaining_requests: _Optional[int] = ...) -> None: ...

class PushFrame(_message.Message):
    __slots__ = ("header", "layer", "data", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: TransferHeader
    layer: LayerManifest
    data: DataFrame
    trailer: TransferTrailer
    def __init__(self, header: _Optional[_Union[TransferHeader, _Mapping]] = ..., layer: _Optional[_Union[LayerManifest, _Mapping]] = ..., data: _Optional[_Union[DataFrame, _Mapping]] = ..., trailer: _Optional[_Union[TransferTrailer, _Mapping]] = ...) -> None: ...

class TransferHeader(_message.Message):
    __slots__ = ("request_id", "attempt", "wire_version", "model_fingerprint", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "num_prompt_tokens", "dtype", "codec", "transfer_token", "sequence_idx", "sequences_left", "first_kv_head", "num_part_kv_heads")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDX_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_LEFT_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_PART_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    wire_version: int
    model_fingerprint: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    num_prompt_tokens: int
    dtype: DType
    codec: Codec
    transfer_token: bytes
    sequence_idx: int
    sequences_left: int
    first_kv_head: int
    num_part_kv_heads: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., wire_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., codec: _Optional[_Union[Codec, str]] = ..., transfer_token: _Optional[bytes] = ..., sequence_idx: _Optional[int] = ..., sequences_left: _Optional[int] = ..., first_kv_head: _Optional[int] = ..., num_part_kv_heads: _Optional[int] = ...) -> None: ...

class LayerManifest(_message.Message):
    __slots__ = ("layer_idx", "head_lengths", "num_window_queries", "states")
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    HEAD_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    NUM_WINDOW_QUERIES_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    layer_idx: int
    head_lengths: _containers.RepeatedScalarFieldContainer[int]
    num_window_queries: int
    states: _containers.RepeatedCompositeFieldContainer[StateTensor]
    def __init__(self, layer_idx: _Optional[int] = ..., head_lengths: _Optional[_Iterable[int]] = ..., num_window_queries: _Optional[int] = ..., states: _Optional[_Iterable[_Union[StateTensor, _Mapping]]] = ...) -> None: ...

class StateTensor(_message.Message):
    __slots__ = ("dtype", "sizes")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class DataFrame(_message.Message):
    __slots__ = ("layer_idx", "offset", "crc32", "payload")
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    layer_idx: int
    offset: int
    crc32: int
    payload: bytes
    def __init__(self, layer_idx: _Optional[int] = ..., offset: _Optional[int] = ..., crc32: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class TransferTrailer(_message.Message):
    __slots__ = ("final_hidden", "digest", "report", "sequence")
    FINAL_HIDDEN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    final_hidden: bytes
    digest: bytes
    report: PrefillReport
    sequence: SequenceState
    def __init__(self, final_hidden: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., report: _Optional[_Union[PrefillReport, _Mapping]] = ..., sequence: _Optional[_Union[SequenceState, _Mapping]] = ...) -> None: ...

class SequenceState(_message.Message):
    __slots__ = ("token_ids", "next_position", "recompressed_entries", "at_floor")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    RECOMPRESSED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    AT_FLOOR_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    next_position: int
    recompressed_entries: int
    at_floor: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., next_position: _Optional[int] = ..., recompressed_entries: _Optional[int] = ..., at_floor: _Optional[bool] = ...) -> None: ...

class PrefillReport(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_selected_tokens", "selection_layer", "no_selection_reason", "rho", "computed_share", "kv_bytes_full", "kv_bytes_kept", "layer_entries", "next_position", "num_cached_tokens", "num_recomputed_tokens", "saved_layer_tokens", "no_prefix_reason", "state_bytes")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SELECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SELECTION_LAYER_FIELD_NUMBER: _ClassVar[int]
    NO_SELECTION_REASON_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_SHARE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FULL_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_KEPT_FIELD_NUMBER: _ClassVar[int]
    LAYER_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAVED_LAYER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NO_PREFIX_REASON_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_selected_tokens: int
    selection_layer: int
    no_selection_reason: str
    rho: _containers.RepeatedCompositeFieldContainer[RankVariance]
    computed_share: float
    kv_bytes_full: int
    kv_bytes_kept: int
    layer_entries: _containers.RepeatedScalarFieldContainer[int]
    next_position: int
    num_cached_tokens: int
    num_recomputed_tokens: int
    saved_layer_tokens: int
    no_prefix_reason: str
    state_bytes: int
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_selected_tokens: _Optional[int] = ..., selection_layer: _Optional[int] = ..., no_selection_reason: _Optional[str] = ..., rho: _Optional[_Iterable[_Union[RankVariance, _Mapping]]] = ..., computed_share: _Optional[float] = ..., kv_bytes_full: _Optional[int] = ..., kv_bytes_kept: _Optional[int] = ..., layer_entries: _Optional[_Iterable[int]] = ..., next_position: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_recomputed_tokens: _Optional[int] = ..., saved_layer_tokens: _Optional[int] = ..., no_prefix_reason: _Optional[str] = ..., state_bytes: _Optional[int] = ...) -> None: ...

class RankVariance(_message.Message):
    __slots__ = ("layer_idx", "value")
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    layer_idx: int
    value: float
    def __init__(self, layer_idx: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...

class PushReceipt(_message.Message):
    __slots__ = ("payload_bytes", "num_layers")
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    payload_bytes: int
    num_layers: int
    def __init__(self, payload_bytes: _Optional[int] = ..., num_layers: _Optional[int] = ...) -> None: ...
