"""All settings of Winnow's processes: plain data, read once at startup and passed down.

`settings_sources.load_settings` reads it; `setting_types` has how each value is checked.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    SecretStr,
    model_validator,
)

from services.common.setting_types import (
    MAX_PORT,
    AbsolutePath,
    Adapters,
    Alias,
    Count,
    GenerationConfig,
    KnownPort,
    Listed,
    ModelSource,
    NumRanks,
    Origins,
    Port,
    PositiveBytes,
    Pruning,
    Seconds,
    Share,
    TaskName,
    ToolParser,
)
from winnow.adapters.ref import DEFAULT_MAX_RANK, AdapterRoom
from winnow.catalog import METHODS
from winnow.checks import require_first_gpu
from winnow.hub.reference import HubModel, parse, short_name
from winnow.load_options import LoadOptions
from winnow.quantization.settings import Quantize, require_quantize

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "models" / "winnow-tiny"

_TLS_FILES = ("tls_cert_file", "tls_key_file")
_PEER_FILES = ("peer_cert_file", "peer_key_file", "peer_ca_file")


class Settings(BaseModel):
    """The settings of all of Winnow's processes; each process uses those it needs."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,  # of which command-line flags are described
        hide_input_in_errors=True,  # the input may hold a password, which a traceback would show
    )

    # What is served
    model: ModelSource = str(EMBEDDED_MODEL)
    """model folder, GGUF file, or a hub's model: org/name, org/name@revision, org/name:Q4_K_M or
    org/name/file.gguf (default: the embedded model)"""
    revision: str | None = Field(None, min_length=1, pattern=r"^[^@:\s]+$")
    """branch, tag or commit of a hub's model (default: main)"""
    model_name: str | None = Field(None, min_length=1)
    """name under which it is served (default: the folder's or file's)"""
    model_aliases: Listed[Alias] = ()
    """further names by which requests may ask for the model, with commas between them; * is any
    name (default: none)"""
    adapters: Adapters = {}
    """folders of LoRA adapters of the model as PEFT saves them, by the names under which requests
    ask for them, like mine=/models/mine"""
    max_adapters: Annotated[int, Field(ge=0, le=256)] | None = None
    """adapters in a worker's model at once, for which memory is set aside; others wait, or take
    the place of one that no request uses (default: as many as `adapters` has)"""
    max_adapter_rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="highest rank of an adapter (default: the highest of `adapters`, or "
        f"{DEFAULT_MAX_RANK} without any)",
    )
    device: str = "cpu"
    """torch device of the workers: cpu or cuda, the first GPU that each sees (CUDA_VISIBLE_DEVICES
    chooses)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto, float32, bfloat16 or float16; auto is the checkpoint's"""
    kv_dtype: Literal["auto", "int8"] = "auto"
    """keys and values on the network, in decode workers' pools and in the prefix cache: auto (the
    dtype) or int8, which takes about half of 16 bits' memory"""
    quantize: Quantize | None = None
    """int8: weights become 8 bits when they are loaded, on a CPU, which halves bfloat16's memory
    and decodes faster (default: they stay as they are)"""
    dequantize: bool = False
    """true: a quantized checkpoint's weights become the dtype when they are loaded, so that no
    library of its method is needed; the log tells the memory before"""
    max_model_len: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = None
    """tokens of a prompt and its answer together, the same for all processes of a service
    (default: what the model's rotary tables allow)"""
    pruning: Pruning = Field(
        {},
        description="pruning settings over the model's own, as in a request's `winnow` object; "
        f"method is one of {', '.join(METHODS)}",
    )
    generation_config: GenerationConfig = "auto"
    """where requests' defaults of sampling come from: auto (the model's generation_config.json),
    none (they are OpenAI's; vllm means the same), or a folder with a generation_config.json"""
    chat_template_kwargs: dict[str, Any] = {}
    """variables of the chat template, like enable_thinking, under a request's own"""
    allow_special_tokens: bool = False
    """true: the text of a control token in a message is that token; false: it is text like any
    other"""
    tool_parser: ToolParser = "auto"
    """form in which the model writes calls of tools: auto goes by its template, json is one that
    any model can be told of, off refuses tools"""
    reasoning_parser: Literal["auto", "think", "harmony", "off"] = "auto"
    """think: what stands between <think> and </think> is told apart as reasoning; harmony: what is
    in gpt-oss's channel for it; auto: as the chat template has it; off: it is text of the
    answer"""
    playground: bool = True
    """false: no page to try the service out is served at `/`"""

    # Where it listens
    host: str = Field("127.0.0.1", min_length=1)
    """address of the HTTP and gRPC APIs"""
    port: Port = 8000
    """port of the HTTP API"""
    grpc_port: Port | None = 8001
    """port of the public gRPC API; 0 is any free one, null is none"""
    admin_port: Port | None = 8002
    """port of what operators ask a gateway (/metrics, /metrics/targets, /ready with details), on
    decode_host and without a key; 0 is any free one, null is none"""
    decode_host: str = Field("127.0.0.1", min_length=1)
    """address on which decode workers listen, every process's /metrics, and admin_port"""
    decode_advertised_host: str | None = None
    """address they announce to gateway and prefill (default: decode_host)"""
    decode_port: Port = 0
    """port of Decode; 0 is any free one"""
    kv_port: Port = 0
    """port of KvTransfer; 0 is any free one; process r of tensor_parallel has the r-th after it"""
    decode_advertised_port: KnownPort | None = None
    """port of Decode as they announce it, behind NAT (default: decode_port)"""
    kv_advertised_port: KnownPort | None = None
    """port of KvTransfer as they announce it (default: kv_port)"""
    metrics_port: Port = 0
    """port of a decode worker's /metrics; 0 is any free one"""
    prefill_metrics_port: Port = 0
    """port of a prefill worker's /metrics; 0 is any free one"""
    gateway_metrics_port: Port = 0
    """port of a gateway's /metrics; 0 is any free one"""

    # How many, and where Ray may place them
    prefill_replicas: Count = 1
    """prefill workers"""
    decode_workers: NonNegativeInt = 1
    """decode workers started with the service; others may join through Redis"""
    gateway_replicas: Count = 1
    """gateway processes"""
    num_threads: Count | None = None
    """torch threads per worker (default: its share of this machine's cores)"""
    cores_dir: AbsolutePath | None = None
    """folder in which workers on the same cores learn of each other; containers need a common one
    (default: winnow-UID in /dev/shm)"""
    prefill_num_cpus: NonNegativeFloat = 1
    """cores that Ray sets aside per prefill worker"""
    decode_num_cpus: NonNegativeFloat = 1
    """cores that Ray sets aside per decode worker"""
    gateway_num_cpus: NonNegativeFloat = 0
    """cores that Ray sets aside per gateway"""
    worker_num_gpus: NonNegativeFloat | None = None
    """GPUs that Ray sets aside per worker (default: on a cuda device one per process of
    tensor_parallel)"""
    tensor_parallel: NumRanks = 1
    """processes on one machine, each with its own GPU, that share every layer of a worker's model;
    it must divide the model's heads and KV heads"""
    prefill_tensor_parallel: NumRanks | None = None
    """the same of prefill workers (default: tensor_parallel)"""
    decode_tensor_parallel: NumRanks | None = None
    """the same of decode workers (default: tensor_parallel)"""
    redis_url: SecretStr | None = None
    """registry of workers in Redis (default: an actor of Ray's)"""
    redis_ca_file: AbsolutePath | None = None
    """authority that signed Redis' certificate, PEM, for a rediss:// URL (default: those this
    machine trusts)"""
    namespace: str = Field("winnow", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """keeps services apart in a registry"""

    # What a request may ask for
    max_prompt_tokens: Count | None = None
    """longest prompt (default: what the model's context leaves)"""
    max_new_tokens: Count = 4096
    """highest max_tokens"""
    max_tokens_policy: Literal["refuse", "clamp"] = "refuse"
    """of max_tokens over max_new_tokens, or over what the prompt leaves of the model's context:
    refuse the request, or clamp the number"""
    max_n: Count = 8
    """highest n"""
    max_prompts_per_request: Count = 16
    """prompts in one completions request"""
    max_body_bytes: PositiveBytes = ByteSize(8 << 20)
    """largest HTTP body, like 8388608 or 8MiB"""
    max_select_tokens: Count | None = None
    """highest select_tokens"""
    max_kv_budget: Count | None = None
    """highest kv_budget"""
    max_decode_budget: Count | None = None
    """highest decode_budget"""
    request_timeout_s: Seconds = 300
    """a request ends within this time"""
    sse_keepalive_s: NonNegativeFloat | None = 3
    """a stream that is silent for this long gets a comment, so that proxies keep it open; 0 or
    null is never"""

    # Quality in use
    quality_sample: Share = 0
    """share of pruned requests that gateways compute unpruned too, in idle time, for the metrics
    winnow_quality_*"""
    quality_tasks: Listed[TaskName] = ()
    """names that requests' winnow.task may give those metrics, with commas between them; any other
    one is counted as `other` (default: none)"""

    # Memory and queues
    kv_memory_bytes: PositiveBytes = ByteSize(1 << 30)
    """KV pool of a decode worker, like 1GiB"""
    kv_overcommit: Annotated[float, Field(ge=1, le=100)] = 1.5
    """decode workers promise this many times their KV pool, as most answers end before max_tokens;
    where they do not, sequences shrink to decode_floor or wait"""
    swap_bytes: ByteSize = ByteSize(1 << 30)
    """host memory of a decode worker for sequences that wait for KV memory"""
    page_size: Count = Field(16, le=1024)
    """KV entries per page"""
    max_batch_size: Count = Field(64, le=4096)
    """sequences decoded together"""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """auto: on a GPU, decode steps are recorded at the start and replayed; off: launched kernel by
    kernel"""
    decode_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """while a prompt is prefilled on a decode worker's cores, it takes this share of them, and
    goes on at this share of its pace; 1: both take what they can get"""
    prefix_cache_bytes: ByteSize = ByteSize(0)
    """memory of a prefill worker for the beginnings of prompts, like 4GiB: a prompt that begins
    like an earlier one does not compute that again; 0: none"""
    prefix_cache_device: Literal["device", "host"] = "device"
    """where that memory is: device (beside the model) or host, from which a GPU fetches what it
    needs"""
    prefix_cache_device_bytes: ByteSize = ByteSize(1 << 30)
    """with prefix_cache_device: host, a prefill worker on a GPU keeps what was used last in this
    much memory beside the model, and the rest in host memory; 0: all in host memory; on a CPU it
    is not used"""
    prefix_affinity: bool = True
    """prompts go to the prefill worker that holds most of their beginning, unless it has too much
    to do; false: to any that is free"""
    max_waiting_prefills: Count = 64
    """prompts waiting per prefill worker"""
    max_open_prefills: Count = Field(4, le=32)
    """prompts that a prefill worker has begun and not ended: after each layer the one with the
    least work left goes on; each holds its hidden states (8,192 tokens of an 8B model: 64 MiB) and
    up to two layers' kept KV; 1: each is computed to its end"""
    prefill_attempts: Count = Field(2, le=10)
    """tries at a prompt's prefill"""
    lease_s: Seconds = 30
    """a decode worker without heartbeat stays registered this long"""
    kv_lease_s: Seconds = 120
    """reserved KV memory is freed when no KV came for this long; a two-pass method sends none
    before its second pass"""
    start_timeout_s: Seconds = 1800
    """`winnow serve` ends if its workers have not loaded the model within this time"""
    drain_notice_s: NonNegativeFloat = 5
    """on SIGTERM a gateway first says for this long that it is not ready, and closes each
    connection after its answer, so that clients go elsewhere"""
    drain_timeout_s: Seconds = 30
    """running requests may end within this time"""

    # Who may connect
    cors_allowed_origins: Origins = ()
    """origins whose web pages may call the HTTP API, with commas between them, like
    https://app.example.com; * is any (default: none)"""
    api_keys_file: AbsolutePath | None = None
    """YAML file of API keys' hashes, see `winnow key` (default: open to all)"""
    tls_cert_file: AbsolutePath | None = None
    """certificate chain of the HTTP and gRPC APIs, PEM (default: plain text)"""
    tls_key_file: AbsolutePath | None = None
    """its private key, PEM"""
    peer_cert_file: AbsolutePath | None = None
    """certificate chain for mutual TLS between gateway, prefill and decode, PEM (default: plain
    text)"""
    peer_key_file: AbsolutePath | None = None
    """its private key, PEM"""
    peer_ca_file: AbsolutePath | None = None
    """authority that signed every peer's certificate, PEM"""
    peer_name: str = Field("winnow", min_length=1)
    """DNS name that every peer's certificate has"""

    # Logs and traces
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://")
    """collector of traces, OTLP over HTTP, like http://collector:4318 (default: no traces)"""
    trace_sample_ratio: Share = 1.0
    """share of requests that are traced, of those that bring no trace"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """debug, info, warning or error and above"""
    log_format: Literal["text", "json"] = "text"
    """text, or json with one object per line"""

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        for names in (_TLS_FILES, _PEER_FILES):
            given = [name for name in names if getattr(self, name) is not None]
            if given and len(given) < len(names):
                missing = ", ".join(sorted(set(names) - set(given)))
                raise ValueError(f"{given[0]} is set without {missing}")
        return self

    @model_validator(mode="after")
    def _encrypted_redis(self) -> Self:
        """Refuse a CA file without TLS: a redis:// URL would ignore it."""
        url = self.redis_url.get_secret_value() if self.redis_url else ""
        if self.redis_ca_file is not None and not url.startswith("rediss://"):
            raise ValueError("redis_ca_file is set, but redis_url does not begin with rediss://")
        return self

    @model_validator(mode="after")
    def _revision_of_a_hub_model(self) -> Self:
        if self.revision is None:
            return self
        if (hub_model := parse(self.model)) is None:
            raise ValueError(f"revision is set, but model {self.model} is none of a hub")
        if "@" in self.model:
            raise ValueError(
                f"revision is {self.revision}, but model {self.model} names {hub_model.revision}"
            )
        return self

    @model_validator(mode="after")
    def _room_for_adapters(self) -> Self:
        for name in (self.served_name, *self.model_aliases):
            if name in self.adapters:
                raise ValueError(f"adapter {name} has a name of the model itself")
        if self.max_adapters is not None and self.max_adapters < len(self.adapters):
            raise ValueError(
                f"max_adapters is {self.max_adapters}; adapters names {len(self.adapters)}"
            )
        return self

    @model_validator(mode="after")
    def _one_gpu_per_rank(self) -> Self:
        require_first_gpu(self.device)
        num_ranks = max(self.prefill_ranks, self.decode_ranks)
        if num_ranks > 1 and self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"device is {self.device}; with tensor_parallel {num_ranks} it is cuda, of which "
                "each process takes its own, or cpu"
            )
        if num_ranks > 1 and self.gpus_per_worker(num_ranks) < num_ranks and self.device == "cuda":
            raise ValueError(
                f"worker_num_gpus is {self.worker_num_gpus:g}; with tensor_parallel {num_ranks} on "
                f"cuda a worker needs {num_ranks}, one for each of its processes"
            )
        return self

    @model_validator(mode="after")
    def _quantizes_whole_models(self) -> Self:
        require_quantize(self.quantize, self.device, max(self.prefill_ranks, self.decode_ranks))
        return self

    @model_validator(mode="after")
    def _one_port_per_rank(self) -> Self:
        last = self.kv_port + self.decode_ranks - 1
        if self.kv_port and last > MAX_PORT:
            raise ValueError(
                f"kv_port is {self.kv_port}; with tensor_parallel {self.decode_ranks} the last "
                f"process has port {last}, and the limit is {MAX_PORT}"
            )
        return self

    @property
    def hub_model(self) -> HubModel | None:
        """The hub's model that is to be loaded; None for a folder or file of this machine."""
        hub_model = parse(self.model)
        if hub_model is None or self.revision is None:
            return hub_model
        return replace(hub_model, revision=self.revision)

    @property
    def model_source(self) -> str:
        """The model as `load_model` takes it, with its revision."""
        return self.model if self.revision is None else str(self.hub_model)

    @property
    def load_options(self) -> LoadOptions:
        """What `describe_model` and `load_model` are told of it besides."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "quantize": self.quantize,
            "dequantize": self.dequantize,
        }

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        return self.model_name or short_name(self.model)

    @property
    def scheme(self) -> str:
        """URL scheme of the REST API."""
        return "http" if self.tls_cert_file is None else "https"

    @property
    def prefill_ranks(self) -> int:
        """Processes of a prefill worker."""
        return self.prefill_tensor_parallel or self.tensor_parallel

    @property
    def decode_ranks(self) -> int:
        """Processes of a decode worker."""
        return self.decode_tensor_parallel or self.tensor_parallel

    @property
    def prefill_crowds_decode(self) -> bool:
        """Whether prefill workers leave decode less than half of this machine's cores."""
        threads = self.prefill_replicas * self.threads_per_worker(self.prefill_replicas)
        return 2 * threads > len(os.sched_getaffinity(0))

    def threads_per_worker(self, num_workers: int) -> int:
        """Torch threads for each of `num_workers` of one kind on this machine."""
        return self.num_threads or max(1, len(os.sched_getaffinity(0)) // max(1, num_workers))

    def gpus_per_worker(self, num_ranks: int) -> float:
        """GPUs that Ray sets aside for a worker of so many processes."""
        if self.worker_num_gpus is not None:
            return self.worker_num_gpus
        return float(num_ranks) if self.device.startswith("cuda") else 0.0

    def adapter_room(self) -> AdapterRoom | None:
        """What each worker sets aside for adapters; None: nothing.

        Raises UnusableAdapter for a folder without an adapter's configuration.
        """
        from winnow.adapters.description import room_for  # noqa: PLC0415 - loads torch

        return room_for(self.adapters, self.max_adapters, self.max_adapter_rank)
