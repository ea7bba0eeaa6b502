"""Attention implementations: within a prompt (prefill), and over KV pages (decode)."""

from winnow.attention.calls import ATTENTION_NAME, AttentionCall, attending
from winnow.attention.choice import decode_backend
from winnow.attention.decode import DecodeBackend, PagedEntries, PagedKV, StepAttention, StepPlan
from winnow.attention.fused import most_prompt_tokens
from winnow.attention.gather import GatherBackend
from winnow.attention.options import AttentionOptions
from winnow.attention.prefill import PrefillAttention, ScatteredAttention, causal_attention

__all__ = [
    "ATTENTION_NAME",
    "AttentionCall",
    "AttentionOptions",
    "DecodeBackend",
    "GatherBackend",
    "PagedEntries",
    "PagedKV",
    "PrefillAttention",
    "ScatteredAttention",
    "StepAttention",
    "StepPlan",
    "attending",
    "causal_attention",
    "decode_backend",
    "most_prompt_tokens",
]
