"""The laid-out circuits do what they say before any training; the export is the same model."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM

from training import attention
from training.circuits import FOLLOWING_HEAD, GROUP, HEAD_DIM, NUM_BEFORE, NUM_HEADS
from training.export import export_model
from training.model import NUM_FREE_LAYERS, NUM_LAYERS, make_model
from training.samples import SampleMaker
from training.tasks import variable

LIMIT_BYTES = 32 * 10**6


@pytest.fixture(scope="module")
def model(maker: SampleMaker) -> Qwen2ForCausalLM:
    attention.register()
    (assigns,) = maker.encode(" =")
    model = make_model(0, assigns)
    model.set_attn_implementation("eager")
    return model


def _attention(model: Qwen2ForCausalLM, layer_idx: int, head: int, states: list[Tensor]) -> Tensor:
    """Attention of one head in one layer, from the states before it: [T, T]."""
    layer = model.model.layers[layer_idx]
    hidden = layer.input_layernorm(states[layer_idx])
    rope = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    output = layer.self_attn(hidden, position_embeddings=rope, attention_mask=_causal(hidden))
    return output[1][0, head]


def _causal(hidden: Tensor) -> Tensor:
    length = hidden.shape[1]
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def _states(model: Qwen2ForCausalLM, tokens: list[int]) -> list[Tensor]:
    hidden = model.model.embed_tokens(torch.tensor([tokens]))
    rope = model.model.rotary_emb(hidden, torch.arange(len(tokens))[None])
    states = []
    for layer in model.model.layers:
        states.append(hidden)
        hidden = layer(hidden, attention_mask=_causal(hidden), position_embeddings=rope)
    return states


def _tokens(num_tokens: int, maker: SampleMaker) -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(300, 1000) for _ in range(num_tokens)]


@torch.no_grad()
def test_look_back_heads_look_1_to_4_tokens_back(
    model: Qwen2ForCausalLM, maker: SampleMaker
) -> None:
    states = _states(model, _tokens(600, maker))
    for head in range(NUM_BEFORE):
        weights = _attention(model, 0, head, states)
        assert weights[50:].diagonal(50 - head - 1).min() > 0.9


@torch.no_grad()
def test_digest_heads_look_2_8_and_1_tokens_back(
    model: Qwen2ForCausalLM, maker: SampleMaker
) -> None:
    states = _states(model, _tokens(600, maker))
    for head, offset in ((0, 2), (1, 8), (2, 1)):
        weights = _attention(model, 1, head, states)
        assert weights[50:].diagonal(50 - offset).min() > 0.9


@torch.no_grad()
def test_copying_heads_look_behind_the_earlier_occurrence(
    model: Qwen2ForCausalLM, maker: SampleMaker
) -> None:
    tokens = _tokens(200, maker)
    states = _states(model, tokens * 2)
    for head in (0, 2):
        found = _attention(model, NUM_FREE_LAYERS, head, states).argmax(-1)
        expected = torch.arange(len(tokens) * 2) - len(tokens) + 1
        assert (found == expected)[len(tokens) + 8 :].float().mean() > 0.9


@torch.no_grad()
def test_the_following_head_looks_at_the_links_end(
    model: Qwen2ForCausalLM, maker: SampleMaker
) -> None:
    rng = random.Random(4)
    names = [variable(rng) for _ in range(30)]
    links = [f"VAR {name} = VAR {names[i - 15]}." for i, name in enumerate(names)]
    rng.shuffle(links)
    context = maker.encode("\n".join(links) + "\n")
    hits = 0
    for name in names:
        question = maker.encode(f"Question: What is the value of VAR {name}? Answer: VAR {name} = ")
        states = _states(model, context + question)
        weights = _attention(model, NUM_FREE_LAYERS, FOLLOWING_HEAD, states)
        before = next(link for link in links if link.startswith(f"VAR {name} ="))
        start = context_index(context, maker.encode(before[:-1].removeprefix("VAR")))
        hits += int(weights[-1].argmax()) == start
    assert hits >= 0.8 * len(names)


def context_index(tokens: list[int], part: list[int]) -> int:
    """Index of the last token of `part` in `tokens`."""
    starts = range(len(tokens) - len(part) + 1)
    return next(i for i in starts if tokens[i : i + len(part)] == part) + len(part) - 1


def test_layers_from_the_first_repeated_one_are_one_and_the_same(model: Qwen2ForCausalLM) -> None:
    layers = model.model.layers
    assert len(layers) == NUM_LAYERS
    assert all(layer is layers[NUM_FREE_LAYERS] for layer in layers[NUM_FREE_LAYERS:])
    assert len({id(layer) for layer in layers}) == NUM_FREE_LAYERS + 1
    assert layers[0].self_attn.k_proj.weight.shape[0] * GROUP == NUM_HEADS * HEAD_DIM


@torch.no_grad()
def test_the_export_is_the_same_model_written_out(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export_model(model, tokenizer, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode("VAR ABCDE = 12345. VAR FGHIJ = VAR ABCDE.")])
    rounded = make_model(0, tokenizer.encode(" =")[0])
    for parameter in rounded.parameters():
        parameter.copy_(parameter.bfloat16())
    expected = rounded(tokens, use_cache=False).logits
    torch.testing.assert_close(exported(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size <= LIMIT_BYTES


@pytest.mark.parametrize("length", [100, 300])
def test_block_wise_attention_is_attention(length: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 8, length, 32, requires_grad=True)
    key, value = torch.randn(2, 2, 4, length, 32)
    found, _ = attention.causal_attention(torch.nn.Module(), query, key, value, None, scaling=0.2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(found.square().sum(), query, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.square().sum(), query)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
