"""Sizes on GPUs, from the model's configuration alone: the tables of docs/gpu.md.

python -m deploy.sizing            # Llama-3.1's 8B and 70B
python -m deploy.sizing FOLDER     # a model folder, or its config.json
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

from winnow.context_length import context_length
from winnow.kv import KvDtype, ModelShape
from winnow.model_files import shape_of
from winnow.network_parts import mlp_names

KV_DTYPES: dict[str, KvDtype] = {"bf16": "auto", "int8": "int8"}
GPUS = {"80 GB": 80e9, "141 GB": 141e9}
USABLE = 0.9  # of a GPU's memory; the rest is CUDA's, and a step's and a prompt's activations
PROMPT, BUDGET, ANSWER = 32_768, 2048, 512
LINKS = {"25 Gbit/s": 25e9 / 8, "100 Gbit/s": 100e9 / 8}
_ENTRIES = (PROMPT + ANSWER, BUDGET + ANSWER)  # of a request at its end, unpruned and pruned
_POSITION_BYTES = torch.int32.itemsize

Table = list[dict[str, str]]
_CAPACITY = (
    "weights per GPU",
    "pool of a decode worker",
    "tokens in all pools",
    f"requests of {PROMPT:,} + {ANSWER}",
    f"of {BUDGET:,} + {ANSWER}",
)


@dataclass(frozen=True, slots=True)
class Model:
    """weight_bytes: in bfloat16.  whole_bytes: of them, what every tensor-parallel rank has.

    state_bytes: of one sequence's recurrent layers, however long it is.
    """

    name: str
    shape: ModelShape
    weight_bytes: int
    whole_bytes: int
    state_bytes: int = 0

    def weights_per_gpu(self, tensor_parallel: int) -> float:
        """Bytes on each: a part of the layers and the LM head, and the whole embeddings."""
        return self.whole_bytes + (self.weight_bytes - self.whole_bytes) / tensor_parallel

    def token_bytes(self, kv_dtype: KvDtype, *, positions: bool = True) -> int:
        """KV of one token in all layers, with the positions that pool and wire hold beside it."""
        return self._kv_bytes(1, kv_dtype, positions=positions)

    def sent_bytes(self, num_tokens: int, kv_dtype: KvDtype) -> int:
        """What so many tokens take on the wire, states included."""
        return self._kv_bytes(num_tokens, kv_dtype) + self.state_bytes

    def held_bytes(self, num_tokens: int, kv_dtype: KvDtype) -> int:
        """What so many tokens take in a pool, whose pages are of the largest layer's size."""
        num_entries = sum(self._entries(num_tokens))
        positions = num_entries * _POSITION_BYTES
        return self.shape.kv_bytes(num_entries, kv_dtype) + positions + self.state_bytes

    def _kv_bytes(self, num_tokens: int, kv_dtype: KvDtype, *, positions: bool = True) -> int:
        entries = self._entries(num_tokens)
        sent = self.shape.sent_bytes(entries, kv_dtype)
        return sent + (sum(entries) * _POSITION_BYTES if positions else 0)

    def _entries(self, num_tokens: int) -> list[int]:
        """Those of each layer, of which layers with windows hold what the last token sees."""
        return [
            size.num_kv_heads * (num_tokens - layer.first_visible(num_tokens - 1))
            if layer.has_kv
            else 0
            for size, layer in zip(self.shape.sizes, self.shape.layers, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Deployment:
    """One prefill worker's and one decode worker's part of a node, `pairs` times."""

    gpus: int
    pairs: int
    tensor_parallel: int
    is_shared: bool = False  # prefill and decode on the same GPU, each with its own weights

    @property
    def workers(self) -> str:
        if self.is_shared:
            return "one GPU for both"
        split = f" of {self.tensor_parallel} GPUs" if self.tensor_parallel > 1 else ""
        return f"{self.pairs} + {self.pairs}{split}"

    def pool_bytes(self, model: Model, gpu_bytes: float) -> float:
        """What a decode worker has for KV on all its GPUs; below 0: the weights do not fit."""
        copies = 2 if self.is_shared else 1
        weights = copies * model.weights_per_gpu(self.tensor_parallel)
        return self.tensor_parallel * (USABLE * gpu_bytes - weights)


def deployments(model: Model) -> list[Deployment]:
    """One GPU; and eight, split evenly, each worker on as few GPUs as its weights leave room on."""
    smallest = min(GPUS.values())
    fitting = [n for n in (1, 2, 4) if 2 * model.weights_per_gpu(n) < USABLE * smallest]
    tensor_parallel = min(fitting, default=4)
    return [
        Deployment(1, 1, 1, is_shared=True),
        Deployment(8, 4 // tensor_parallel, tensor_parallel),
    ]


def describe(name: str, config: Any) -> Model:  # noqa: ANN401 - each family has its own class
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = sum(parameter.numel() for parameter in network.parameters())
    whole = network.get_input_embeddings().weight.numel()
    config = config.get_text_config()
    shape = shape_of(config, torch.bfloat16, context_length(config))
    state_bytes = _state_bytes(network, config) if shape.has_states else 0
    return Model(name, shape, 2 * weights, 2 * whole, state_bytes)


def _state_bytes(network: Any, config: Any) -> int:  # noqa: ANN401 - each family's own
    """Of the states that a token leaves in transformers' own cache.  network: unusable then."""
    for layer in network.model.layers:
        for name in mlp_names(layer):
            setattr(layer, name, torch.nn.Identity())  # routing to experts needs data
    cache: Any = DynamicCache(config=config)
    token = torch.zeros((1, 1), dtype=torch.int64, device="meta")
    network.eval()(token, past_key_values=cache, use_cache=True)
    held = [
        state
        for layer in cache.layers
        for kind in ("conv_states", "recurrent_states")
        for state in getattr(layer, kind, {}).values()
    ]
    return sum(state.nbytes for state in held if state is not None)


def llama(name: str, **sizes: Any) -> Model:  # noqa: ANN401 - a configuration's values
    fixed: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8}
    return describe(name, LlamaConfig(**fixed, **sizes))


def usual_models() -> list[Model]:
    """Llama-3.1's shapes."""
    return [
        llama(
            "8B",
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        llama(
            "70B",
            hidden_size=8192,
            intermediate_size=28_672,
            num_hidden_layers=80,
            num_attention_heads=64,
        ),
    ]


def model_table(models: Sequence[Model]) -> Table:
    """Weights, and KV of a token, of a long prompt, and of what a budget keeps of it."""
    return [
        {
            "model": model.name,
            "weights": _gigabytes(model.weight_bytes),
            "KV": name,
            "of a token": f"{model.token_bytes(kv_dtype, positions=False) / 1024:.4g} KiB",
            f"of {PROMPT:,} tokens": _gigabytes(model.held_bytes(PROMPT, kv_dtype)),
            f"of {BUDGET:,} kept": _gigabytes(model.held_bytes(BUDGET, kv_dtype)),
        }
        for model in models
        for name, kv_dtype in KV_DTYPES.items()
    ]


def capacity_table(models: Sequence[Model]) -> Table:
    """What all decode workers of a node hold together."""
    return list(_capacity(models))


def _capacity(models: Sequence[Model]) -> Iterator[dict[str, str]]:
    for model in models:
        for deployment in deployments(model):
            for gpu, gpu_bytes in GPUS.items():
                pool = deployment.pool_bytes(model, gpu_bytes)
                row = {"model": model.name, "GPUs": f"{deployment.gpus} × {gpu}"}
                row["prefill + decode"] = deployment.workers
                if pool <= 0:
                    row |= dict.fromkeys(_CAPACITY, "–") | {_CAPACITY[0]: "do not fit"}
                else:
                    row |= _held(model, deployment, pool)
                yield row


def _held(model: Model, deployment: Deployment, pool: float) -> dict[str, str]:
    copies = 2 if deployment.is_shared else 1
    weights = copies * model.weights_per_gpu(deployment.tensor_parallel)
    pools, dtypes = deployment.pairs * pool, KV_DTYPES.values()
    # Of one long sequence: windows hold no part of most of its tokens.
    token_bytes = [model.held_bytes(PROMPT, dtype) / PROMPT for dtype in dtypes]
    values = (
        _gigabytes(weights),
        _gigabytes(pool),
        " / ".join(f"{pools / each / 1e6:.3g} M" for each in token_bytes),
        *(
            " / ".join(
                f"{deployment.pairs * int(pool / model.held_bytes(each, dtype)):,}"
                for dtype in dtypes
            )
            for each in _ENTRIES
        ),
    )
    return dict(zip(_CAPACITY, values, strict=True))


def network_table(models: Sequence[Model]) -> Table:
    """What a request sends from prefill to decode, and how long a link takes for it."""
    rows = []
    for model in models:
        for part, tokens in (("unpruned", PROMPT), (f"{BUDGET:,} kept", BUDGET)):
            for name, kv_dtype in KV_DTYPES.items():
                sent = model.sent_bytes(tokens, kv_dtype)
                row = {"model": model.name, f"of {PROMPT:,} tokens": part, "KV": name}
                row["sent"] = _gigabytes(sent)
                rows.append(row | {link: f"{sent / rate:.3f} s" for link, rate in LINKS.items()})
    return rows


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def render(models: Sequence[Model]) -> str:
    """The three tables as Markdown."""
    tables = (model_table(models), capacity_table(models), network_table(models))
    return "\n".join(map(_markdown, tables))


def _markdown(rows: Table) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]]
    given = [describe(path.name, AutoConfig.from_pretrained(path)) for path in paths]
    sys.stdout.write(render(given or usual_models()))


if __name__ == "__main__":
    main()
