// The weights of a decoder layer, and what its halves consist of; see layer.cpp and linear.cpp.

#pragma once

#include "product.h"

struct Linear {
    const void* panels;   // of Pair, or of BytePair if there are scales
    const float* scales;  // of each column, or null
    const Bf16* bias;     // of each column, or null
};

// As packed_layer.py has it.
struct Layer {
    Linear qkv, output, gate_up, down;
    const Bf16 *input_norm, *post_norm, *query_norm, *key_norm;  // the last two may be null
    int64_t hidden_size, mlp_size, num_heads, num_kv_heads, head_dim;
    float eps, head_eps;
};

extern "C" {
void winnow_rms_norm(const Bf16* hidden, const Bf16* residual, const Bf16* weight, Bf16* normed,
                     Bf16* total, int64_t num_tokens, int64_t size, float eps, int num_threads);
void winnow_silu_mul(const Bf16* gate_up, Bf16* output, int64_t num_tokens, int64_t size,
                     int num_threads);
void winnow_rotate(Bf16* heads, const Bf16* cos, const Bf16* sin, const Bf16* query_norm,
                   const Bf16* key_norm, float eps, int64_t num_tokens, int64_t all_heads,
                   int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int num_threads);
void winnow_add(Bf16* sums, const Bf16* others, int64_t size, int num_threads);
void winnow_linear(const Bf16* inputs, const Linear* weights, Bf16* outputs, int64_t num_rows,
                   int64_t num_columns, int64_t inner, int num_threads);
}
