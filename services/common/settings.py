"""All settings of Winnow's processes, read once at startup and passed down.

`Settings` is plain data. `load_settings` reads it: command-line flags override `WINNOW_*`
variables, which override a YAML file, which overrides the defaults. Unknown or invalid ones are
refused with a one-line error.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode
from pydantic_settings.exceptions import SettingsError

from winnow.adapters.ref import DEFAULT_MAX_RANK, AdapterRoom, require_adapter_name
from winnow.catalog import METHODS
from winnow.checks import require_first_gpu
from winnow.errors import InvalidSetting, UnusableModel
from winnow.generation_defaults import FROM_MODEL, NONE
from winnow.hub.reference import HubModel, parse, short_name
from winnow.pruning_settings import PruningSettings
from winnow.quantization.settings import Quantize, require_quantize

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "models" / "winnow-tiny"
ENV_PREFIX = "WINNOW_"
CONFIG_VARIABLE = "WINNOW_CONFIG"

MAPS = ("pruning", "chat_template_kwargs")  # their entries from all sources are merged

_TLS_FILES = ("tls_cert_file", "tls_key_file")
_PEER_FILES = ("peer_cert_file", "peer_key_file", "peer_ca_file")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")

MAX_PORT = 65535
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
KnownPort = Annotated[int, Field(ge=1, le=MAX_PORT)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Alias = Annotated[str, Field(min_length=1, max_length=256)]


class Settings(BaseModel):
    """The settings of all of Winnow's processes; each process uses those it needs."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        hide_input_in_errors=True,  # the input may hold a password, which a traceback would show
    )

    # What is served
    model: str = Field(
        str(EMBEDDED_MODEL),
        description="model folder, GGUF file, or a hub's model: org/name, org/name@revision, "
        "org/name:Q4_K_M or org/name/file.gguf (default: the embedded model)",
    )
    revision: str | None = Field(
        None,
        min_length=1,
        pattern=r"^[^@:\s]+$",
        description="branch, tag or commit of a hub's model (default: main)",
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        description="name under which it is served (default: the folder's or file's)",
    )
    model_aliases: Annotated[tuple[Alias, ...], NoDecode] = Field(
        (),
        description="further names by which requests may ask for the model, with commas between "
        "them; * is any name (default: none)",
    )
    adapters: Annotated[dict[str, Path], NoDecode] = Field(
        default_factory=dict,
        description="folders of LoRA adapters of the model as PEFT saves them, by the names under "
        "which requests ask for them, like mine=/models/mine",
    )
    max_adapters: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None,
        description="adapters in a worker's model at once, for which memory is set aside; others "
        "wait, or take the place of one that no request uses (default: as many as `adapters` has)",
    )
    max_adapter_rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="highest rank of an adapter (default: the highest of `adapters`, or "
        f"{DEFAULT_MAX_RANK} without any)",
    )
    device: str = Field(
        "cpu",
        description="torch device of the workers: cpu or cuda, the first GPU that each sees "
        "(CUDA_VISIBLE_DEVICES chooses)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto, float32, bfloat16 or float16; auto is the checkpoint's"
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="keys and values on the network, in decode workers' pools and in the prefix "
        "cache: auto (the dtype) or int8, which takes about half of 16 bits' memory",
    )
    quantize: Quantize | None = Field(
        None,
        description="int8: weights become 8 bits when they are loaded, on a CPU, which halves "
        "bfloat16's memory and decodes faster (default: they stay as they are)",
    )
    dequantize: bool = Field(
        False,
        description="true: a quantized checkpoint's weights become the dtype when they are loaded, "
        "so that no library of its method is needed; the log tells the memory before",
    )
    max_model_len: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = Field(
        None,
        description="tokens of a prompt and its answer together, the same for all processes of a "
        "service (default: what the model's rotary tables allow)",
    )
    pruning: dict[str, Any] = Field(
        default_factory=dict,
        description="pruning settings over the model's own, as in a request's `winnow` object; "
        f"method is one of {', '.join(METHODS)}",
    )
    generation_config: str = Field(
        "auto",
        min_length=1,
        description="where requests' defaults of sampling come from: auto (the model's "
        "generation_config.json), none (they are OpenAI's; vllm means the same), or a folder "
        "with a generation_config.json",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="variables of the chat template, like enable_thinking, under a request's own",
    )
    allow_special_tokens: bool = Field(
        False,
        description="true: the text of a control token in a message is that token; false: it is "
        "text like any other",
    )
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral", "harmony", "json", "off"] = (
        Field(
            "auto",
            description="form in which the model writes calls of tools: auto goes by its template, "
            "json is one that any model can be told of, off refuses tools",
        )
    )
    reasoning_parser: Literal["auto", "think", "harmony", "off"] = Field(
        "auto",
        description="think: what stands between <think> and </think> is told apart as reasoning; "
        "harmony: what is in gpt-oss's channel for it; auto: as the chat template has it; off: it "
        "is text of the answer",
    )
    playground: bool = Field(
        True, description="false: no page to try the service out is served at `/`"
    )

    # Where it listens
    host: str = Field("127.0.0.1", min_length=1, description="address of the HTTP and gRPC APIs")
    port: Port = Field(8000, description="port of the HTTP API")
    grpc_port: Port | None = Field(
        8001, description="port of the public gRPC API; 0 is any free one, null is none"
    )
    admin_port: Port | None = Field(
        8002,
        description="port of what operators ask a gateway (/metrics, /metrics/targets, /ready with "
        "details), on decode_host and without a key; 0 is any free one, null is none",
    )
    decode_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address on which decode workers listen, every process's /metrics, and "
        "admin_port",
    )
    decode_advertised_host: str | None = Field(
        None, description="address they announce to gateway and prefill (default: decode_host)"
    )
    decode_port: Port = Field(0, description="port of Decode; 0 is any free one")
    kv_port: Port = Field(
        0,
        description="port of KvTransfer; 0 is any free one; process r of tensor_parallel has the "
        "r-th after it",
    )
    decode_advertised_port: KnownPort | None = Field(
        None, description="port of Decode as they announce it, behind NAT (default: decode_port)"
    )
    kv_advertised_port: KnownPort | None = Field(
        None, description="port of KvTransfer as they announce it (default: kv_port)"
    )
    metrics_port: Port = Field(
        0, description="port of a decode worker's /metrics; 0 is any free one"
    )
    prefill_metrics_port: Port = Field(
        0, description="port of a prefill worker's /metrics; 0 is any free one"
    )
    gateway_metrics_port: Port = Field(
        0, description="port of a gateway's /metrics; 0 is any free one"
    )

    # How many, and where Ray may place them
    prefill_replicas: Count = Field(1, description="prefill workers")
    decode_workers: Annotated[int, Field(ge=0)] = Field(
        1, description="decode workers started with the service; others may join through Redis"
    )
    gateway_replicas: Count = Field(1, description="gateway processes")
    num_threads: Count | None = Field(
        None, description="torch threads per worker (default: its share of this machine's cores)"
    )
    cores_dir: Path | None = Field(
        None,
        description="folder in which workers on the same cores learn of each other; containers "
        "need a common one (default: winnow-UID in /dev/shm)",
    )
    prefill_num_cpus: Annotated[float, Field(ge=0)] = Field(
        1, description="cores that Ray sets aside per prefill worker"
    )
    decode_num_cpus: Annotated[float, Field(ge=0)] = Field(
        1, description="cores that Ray sets aside per decode worker"
    )
    gateway_num_cpus: Annotated[float, Field(ge=0)] = Field(
        0, description="cores that Ray sets aside per gateway"
    )
    worker_num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="GPUs that Ray sets aside per worker (default: on a cuda device one per "
        "process of tensor_parallel)",
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="processes on one machine, each with its own GPU, that share every layer of a "
        "worker's model; it must divide the model's heads and KV heads",
    )
    prefill_tensor_parallel: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="the same of prefill workers (default: tensor_parallel)"
    )
    decode_tensor_parallel: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="the same of decode workers (default: tensor_parallel)"
    )
    redis_url: SecretStr | None = Field(
        None, description="registry of workers in Redis (default: an actor of Ray's)"
    )
    redis_ca_file: Path | None = Field(
        None,
        description="authority that signed Redis' certificate, PEM, for a rediss:// URL "
        "(default: those this machine trusts)",
    )
    namespace: str = Field(
        "winnow", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="keeps services apart in a registry"
    )

    # What a request may ask for
    max_prompt_tokens: Count | None = Field(
        None, description="longest prompt (default: what the model's context leaves)"
    )
    max_new_tokens: Count = Field(4096, description="highest max_tokens")
    max_tokens_policy: Literal["refuse", "clamp"] = Field(
        "refuse",
        description="of max_tokens over max_new_tokens, or over what the prompt leaves of the "
        "model's context: refuse the request, or clamp the number",
    )
    max_n: Count = Field(8, description="highest n")
    max_prompts_per_request: Count = Field(16, description="prompts in one completions request")
    max_body_bytes: ByteSize = Field(
        ByteSize(8 << 20), gt=0, description="largest HTTP body, like 8388608 or 8MiB"
    )
    max_select_tokens: Count | None = Field(None, description="highest select_tokens")
    max_kv_budget: Count | None = Field(None, description="highest kv_budget")
    max_decode_budget: Count | None = Field(None, description="highest decode_budget")
    request_timeout_s: Seconds = Field(300, description="a request ends within this time")
    sse_keepalive_s: Annotated[float, Field(ge=0)] | None = Field(
        3,
        description="a stream that is silent for this long gets a comment, so that proxies keep it "
        "open; 0 or null is never",
    )

    # Quality in use
    quality_sample: Annotated[float, Field(ge=0, le=1)] = Field(
        0,
        description="share of pruned requests that gateways compute unpruned too, in idle time, "
        "for the metrics winnow_quality_*",
    )
    quality_tasks: Annotated[tuple[TaskName, ...], NoDecode] = Field(
        (),
        description="names that requests' winnow.task may give those metrics, with commas between "
        "them; any other one is counted as `other` (default: none)",
    )

    # Memory and queues
    kv_memory_bytes: ByteSize = Field(
        ByteSize(1 << 30), gt=0, description="KV pool of a decode worker, like 1GiB"
    )
    kv_overcommit: Annotated[float, Field(ge=1, le=100)] = Field(
        1.5,
        description="decode workers promise this many times their KV pool, as most answers end "
        "before max_tokens; where they do not, sequences shrink to decode_floor or wait",
    )
    swap_bytes: ByteSize = Field(
        ByteSize(1 << 30),
        ge=0,
        description="host memory of a decode worker for sequences that wait for KV memory",
    )
    page_size: Count = Field(16, le=1024, description="KV entries per page")
    max_batch_size: Count = Field(64, le=4096, description="sequences decoded together")
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto",
        description="auto: on a GPU, decode steps are recorded at the start and replayed; off: "
        "launched kernel by kernel",
    )
    decode_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1,
        description="while a prompt is prefilled on a decode worker's cores, it takes this share "
        "of them, and goes on at this share of its pace; 1: both take what they can get",
    )
    prefix_cache_bytes: ByteSize = Field(
        ByteSize(0),
        ge=0,
        description="memory of a prefill worker for the beginnings of prompts, like 4GiB: a prompt "
        "that begins like an earlier one does not compute that again; 0: none",
    )
    prefix_cache_device: Literal["device", "host"] = Field(
        "device",
        description="where that memory is: device (beside the model) or host, from which a GPU "
        "fetches what it needs",
    )
    prefix_cache_device_bytes: ByteSize = Field(
        ByteSize(1 << 30),
        ge=0,
        description="with prefix_cache_device: host, a prefill worker on a GPU keeps what was used "
        "last in this much memory beside the model, and the rest in host memory; 0: all in host "
        "memory; on a CPU it is not used",
    )
    prefix_affinity: bool = Field(
        True,
        description="prompts go to the prefill worker that holds most of their beginning, unless "
        "it has too much to do; false: to any that is free",
    )
    max_waiting_prefills: Count = Field(64, description="prompts waiting per prefill worker")
    max_open_prefills: Count = Field(
        4,
        le=32,
        description="prompts that a prefill worker has begun and not ended: after each layer the "
        "one with the least work left goes on; each holds its hidden states (8,192 tokens of an 8B "
        "model: 64 MiB) and up to two layers' kept KV; 1: each is computed to its end",
    )
    prefill_attempts: Count = Field(2, le=10, description="tries at a prompt's prefill")
    lease_s: Seconds = Field(
        30, description="a decode worker without heartbeat stays registered this long"
    )
    kv_lease_s: Seconds = Field(
        120,
        description="reserved KV memory is freed when no KV came for this long; "
        "a two-pass method sends none before its second pass",
    )
    start_timeout_s: Seconds = Field(
        1800,
        description="`winnow serve` ends if its workers have not loaded the model within this time",
    )
    drain_notice_s: Annotated[float, Field(ge=0)] = Field(
        5,
        description="on SIGTERM a gateway first says for this long that it is not ready, and "
        "closes each connection after its answer, so that clients go elsewhere",
    )
    drain_timeout_s: Seconds = Field(30, description="running requests may end within this time")

    # Who may connect
    cors_allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="origins whose web pages may call the HTTP API, with commas between them, like "
        "https://app.example.com; * is any (default: none)",
    )
    api_keys_file: Path | None = Field(
        None, description="YAML file of API keys' hashes, see `winnow key` (default: open to all)"
    )
    tls_cert_file: Path | None = Field(
        None, description="certificate chain of the HTTP and gRPC APIs, PEM (default: plain text)"
    )
    tls_key_file: Path | None = Field(None, description="its private key, PEM")
    peer_cert_file: Path | None = Field(
        None,
        description="certificate chain for mutual TLS between gateway, prefill and decode, PEM "
        "(default: plain text)",
    )
    peer_key_file: Path | None = Field(None, description="its private key, PEM")
    peer_ca_file: Path | None = Field(
        None, description="authority that signed every peer's certificate, PEM"
    )
    peer_name: str = Field(
        "winnow", min_length=1, description="DNS name that every peer's certificate has"
    )

    # Logs and traces
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="collector of traces, OTLP over HTTP, like http://collector:4318 "
        "(default: no traces)",
    )
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="share of requests that are traced, of those that bring no trace"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error and above"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="text, or json with one object per line"
    )

    @field_validator("model")
    @classmethod
    def _absolute_folder(cls, model: str) -> str:
        """Make a folder's path absolute, because workers have other working directories."""
        if not model:
            raise ValueError("it names no model")
        try:
            if Path(model).exists():
                return str(Path(model).absolute())
            parse(model)
        except OSError:  # the name is too long; `describe_model` reports it
            return model
        except UnusableModel as error:
            raise ValueError(error.message) from error
        return model

    @field_validator("generation_config")
    @classmethod
    def _absolute_generation_config(cls, source: str) -> str:
        """Make a folder's path absolute, as for `model`."""
        is_folder = source not in (FROM_MODEL, *NONE) and Path(source).is_dir()
        return str(Path(source).resolve()) if is_folder else source

    @field_validator("api_keys_file", "redis_ca_file", "cores_dir", *_TLS_FILES, *_PEER_FILES)
    @classmethod
    def _absolute_file(cls, path: Path | None) -> Path | None:
        """Make the path absolute, as for `model`."""
        return None if path is None else path.resolve()

    @field_validator("cors_allowed_origins", "quality_tasks", "model_aliases", mode="before")
    @classmethod
    def _split_list(cls, listed: object) -> object:
        """Split the single string that variables and flags give."""
        if isinstance(listed, str):
            return tuple(one for part in listed.split(",") if (one := part.strip()))
        return tuple(listed) if isinstance(listed, list) else listed

    @field_validator("cors_allowed_origins")
    @classmethod
    def _exact_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """Require origins in the form that browsers send, since they are compared as strings."""
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is neither * nor like https://app.example.com:8443")
        return origins

    @field_validator("pruning")
    @classmethod
    def _known_pruning(cls, pruning: dict[str, Any]) -> dict[str, Any]:
        known = sorted(field.name for field in fields(PruningSettings))
        for name in pruning:
            if name not in known:
                raise ValueError(f"{name!r} is not a pruning setting; known are {', '.join(known)}")
        return pruning

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

    @field_validator("adapters", mode="before")
    @classmethod
    def _named_folders(cls, adapters: object) -> object:
        """Split NAME=FOLDER pairs, which variables and flags give with spaces between them."""
        if isinstance(adapters, str):
            adapters = adapters.split()
        if isinstance(adapters, dict):
            for name, folder in adapters.items():
                if not folder:
                    raise ValueError(f"{name} has no folder")
        if not isinstance(adapters, list):
            return adapters
        pairs = [str(pair).partition("=") for pair in adapters]
        for name, equals, folder in pairs:
            if not (equals and folder):
                raise ValueError(f"{name!r} is not NAME=FOLDER")
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise ValueError("a name is there twice")
        return {name: folder for name, _, folder in pairs}

    @field_validator("adapters")
    @classmethod
    def _sound_adapters(cls, adapters: dict[str, Path]) -> dict[str, Path]:
        for name in adapters:
            require_adapter_name(name)
        return {name: folder.resolve() for name, folder in adapters.items()}

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

    def adapter_room(self) -> AdapterRoom | None:
        """What each worker sets aside for adapters; None: nothing.

        Raises UnusableAdapter for a folder without an adapter's configuration.
        """
        from winnow.adapters.description import room_for  # noqa: PLC0415 - loads torch

        return room_for(self.adapters, self.max_adapters, self.max_adapter_rank)

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        return self.model_name or short_name(self.model)

    @property
    def scheme(self) -> str:
        """URL scheme of the REST API."""
        return "http" if self.tls_cert_file is None else "https"

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
    def prefill_ranks(self) -> int:
        """Processes of a prefill worker."""
        return self.prefill_tensor_parallel or self.tensor_parallel

    @property
    def decode_ranks(self) -> int:
        """Processes of a decode worker."""
        return self.decode_tensor_parallel or self.tensor_parallel

    def gpus_per_worker(self, num_ranks: int) -> float:
        if self.worker_num_gpus is not None:
            return self.worker_num_gpus
        return float(num_ranks) if self.device.startswith("cuda") else 0.0

    @property
    def prefill_crowds_decode(self) -> bool:
        """Whether prefill workers leave decode less than half of this machine's cores."""
        threads = self.prefill_replicas * self.threads_per_worker(self.prefill_replicas)
        return 2 * threads > len(os.sched_getaffinity(0))

    def threads_per_worker(self, num_workers: int) -> int:
        """Torch threads for each of `num_workers` of one kind on this machine."""
        return self.num_threads or max(1, len(os.sched_getaffinity(0)) // max(1, num_workers))


class _Environment(BaseSettings, Settings):  # type: ignore[misc]  # both configure pydantic
    """The fields of `Settings`, for pydantic-settings to read from environment variables."""


def load_settings(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """The settings of this process; `config` is the YAML file (default: $WINNOW_CONFIG).

    Raises InvalidSetting, with a one-line message, for anything unknown, malformed or out of range.
    """
    _refuse_unknown_variables()
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    sources = [_read_file(config) if config else {}, _read_environment(), dict(flags or {})]
    merged = {name: value for source in sources for name, value in source.items()}
    for name in MAPS:
        if all(isinstance(source.get(name, {}), dict) for source in sources):
            merged[name] = {k: v for s in sources for k, v in s.get(name, {}).items()}
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise _one_line(error) from error


def _refuse_unknown_variables() -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE}
    for name in sorted(os.environ):
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            raise InvalidSetting(f"{name} is not a setting of Winnow; see winnow serve --help")


def _read_environment() -> dict[str, Any]:
    source = EnvSettingsSource(_Environment, env_prefix=ENV_PREFIX, env_parse_none_str="null")
    try:
        return source()
    except SettingsError as error:
        raise InvalidSetting(f"the environment is malformed: {error}") from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidSetting(f"settings file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Neither the error's text nor the error as a cause: it quotes the line, passwords included.
        raise InvalidSetting(f"settings file {path} is not YAML{_where(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InvalidSetting(f"settings file {path} must map names to values")
    return content


def _where(error: Exception) -> str:
    """Line, column and problem, if PyYAML reports them."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    mark = error.problem_mark
    return f": line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _one_line(error: ValidationError) -> InvalidSetting:
    """The first validation error, with the setting's name and value."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        return InvalidSetting(first["msg"].removeprefix("Value error, "))
    name = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return InvalidSetting(f"{name} is not a setting of Winnow; see winnow serve --help")
    value = "" if name == "redis_url" else f" is {first['input']!r}"
    reason = first["msg"].removeprefix("Value error, ")
    return InvalidSetting(f"setting {name}{value}: {reason}", param=name)
