"""Command-line flags generated from the fields of `Settings`, so that each is described once."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from services.common.settings import Settings
from services.common.settings_sources import MAPS
from winnow.defaults import parse_change

_WORKER = {
    "Model": (
        *("model", "revision", "model_name", "device", "dtype", "kv_dtype", "max_model_len"),
        *("quantize", "dequantize", "tensor_parallel"),
    ),
    "Adapters": ("adapters", "max_adapters", "max_adapter_rank"),
    "Decode workers": (
        "decode_tensor_parallel",
        "decode_host",
        "decode_advertised_host",
        "decode_port",
        "kv_port",
        "decode_advertised_port",
        "kv_advertised_port",
        "metrics_port",
        "kv_memory_bytes",
        "kv_overcommit",
        "swap_bytes",
        "page_size",
        "max_batch_size",
        "cuda_graphs",
        "decode_share",
        "lease_s",
        "kv_lease_s",
    ),
    "Process": (
        "num_threads",
        "cores_dir",
        "namespace",
        "drain_timeout_s",
        "log_level",
        "log_format",
        "otlp_endpoint",
        "trace_sample_ratio",
    ),
}
_PEERS = ("peer_cert_file", "peer_key_file", "peer_ca_file", "peer_name")
DECODE_GROUPS: Mapping[str, Sequence[str]] = _WORKER | {
    "Who may connect": ("redis_ca_file", *_PEERS)
}
SERVE_GROUPS: Mapping[str, Sequence[str]] = {
    "Model": (*_WORKER["Model"], "model_aliases", "pruning"),
    "Adapters": _WORKER["Adapters"],
    "Addresses": (
        "host",
        "port",
        "grpc_port",
        "admin_port",
        "gateway_metrics_port",
        "prefill_metrics_port",
    ),
    "Who may connect": (
        "redis_ca_file",
        "cors_allowed_origins",
        "api_keys_file",
        "tls_cert_file",
        "tls_key_file",
        *_PEERS,
    ),
    "How many": ("prefill_replicas", "decode_workers", "gateway_replicas"),
    "At its start and end": ("start_timeout_s", "drain_notice_s"),
    "What a request gets": ("generation_config", "playground"),
    "Chat": (
        "chat_template_kwargs",
        "allow_special_tokens",
        "tool_parser",
        "reasoning_parser",
    ),
    "What a request may ask for": (
        "max_prompt_tokens",
        "max_new_tokens",
        "max_tokens_policy",
        "max_n",
        "max_prompts_per_request",
        "max_body_bytes",
        "max_select_tokens",
        "max_kv_budget",
        "max_decode_budget",
        "request_timeout_s",
        "sse_keepalive_s",
    ),
    "Quality in use": ("quality_sample", "quality_tasks"),
    "Prefill workers": (
        "prefill_tensor_parallel",
        "max_waiting_prefills",
        "max_open_prefills",
        "prefill_attempts",
        "prefix_cache_bytes",
        "prefix_cache_device",
        "prefix_cache_device_bytes",
        "prefix_affinity",
    ),
    "Decode workers": _WORKER["Decode workers"],
    "Processes": (
        *_WORKER["Process"][:2],
        "prefill_num_cpus",
        "decode_num_cpus",
        "gateway_num_cpus",
        "worker_num_gpus",
        *_WORKER["Process"][2:],
    ),
}
EVALUATED_GROUPS: Mapping[str, Sequence[str]] = {
    "Model": (
        *("model", "revision", "device", "dtype", "kv_dtype", "max_model_len"),
        *("quantize", "dequantize", "pruning"),
    ),
    "Memory": ("num_threads", "kv_memory_bytes"),
}
EVAL_GROUPS: Mapping[str, Sequence[str]] = {
    **EVALUATED_GROUPS,
    "Memory": (
        *EVALUATED_GROUPS["Memory"],
        "prefix_cache_bytes",
        "prefix_cache_device",
        "prefix_cache_device_bytes",
    ),
}
FETCH_GROUPS: Mapping[str, Sequence[str]] = {
    "Model": ("model", "revision"),
    "Process": ("log_level", "log_format"),
}
# Of `winnow chat`, for a model in its own process.
LOCAL_CHAT = (
    *("model", "revision", "device", "dtype", "kv_dtype", "max_model_len"),
    *("quantize", "dequantize", "adapters"),
    *("allow_special_tokens", "reasoning_parser"),
    *("num_threads", "kv_memory_bytes", "prefix_cache_bytes"),
)
CHAT_GROUPS: Mapping[str, Sequence[str]] = {
    "Model in this process": LOCAL_CHAT,
    "Model of a service": ("model_name",),
    "Either": ("pruning", "chat_template_kwargs"),
}
# redis_url comes only from WINNOW_REDIS_URL or a file: other users can see command lines.

_LISTS = {"adapters": "NAME=FOLDER"}
_KINDS = {"pruning": "a pruning setting", "chat_template_kwargs": "a template's variable"}
_METAVARS = {
    "_s": "SECONDS",
    "_bytes": "BYTES",
    "port": "PORT",
    "host": "ADDRESS",
    "_file": "FILE",
    "_origins": "ORIGINS",
    "_tasks": "NAMES",
    "_aliases": "NAMES",
    "_dir": "DIR",
    "model": "MODEL",
    "generation_config": "SOURCE",
}


def add_settings_flags(
    parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[str]]
) -> None:
    """Add one flag per setting; flags that are not given are absent from the parsed arguments."""
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, name)


def _add_flag(group: argparse._ArgumentGroup, name: str) -> None:
    field = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    text = f"{field.description}{_default(field.default)}"
    if name in MAPS:
        group.add_argument(
            flag,
            action="append",
            metavar="NAME=VALUE",
            default=argparse.SUPPRESS,
            help=f"{text}; may be repeated",
        )
        return
    options: dict[str, Any] = {}
    if name in _LISTS:
        options = {"action": "extend", "nargs": "+"}
    elif field.annotation is bool:
        options = {"nargs": "?", "const": "true"}
    metavar = _LISTS.get(name) or _metavar(name, field.annotation)
    group.add_argument(flag, metavar=metavar, default=argparse.SUPPRESS, help=text, **options)


def _default(default: object) -> str:
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return f" (default: {default:g})" if default < 10**6 else f" (default: {_mib(default)})"
    return f" (default: {default})" if isinstance(default, str) and len(default) < 16 else ""


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:g}MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:g}GiB"


def _metavar(name: str, annotation: object) -> str:
    kind = "BOOLEAN" if annotation is bool else "NAME" if _takes_words(annotation) else "N"
    return next((word for end, word in _METAVARS.items() if name.endswith(end)), kind)


def _takes_words(annotation: object) -> bool:
    is_word = annotation is str or get_origin(annotation) is Literal
    return is_word or any(map(_takes_words, get_args(annotation)))


def settings_from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, for `load_settings`.

    Raises InvalidSetting if a NAME=VALUE flag is malformed.
    """
    given = {name: value for name, value in vars(args).items() if name in Settings.model_fields}
    flags = {name: None if value == "null" else value for name, value in given.items()}
    for name in MAPS:
        if name in flags:
            flags[name] = dict(parse_change(text, _KINDS[name]) for text in given[name])
    return flags
