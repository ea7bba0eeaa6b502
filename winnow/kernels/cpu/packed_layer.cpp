// A decoder layer before and after its attention, each in one call; see packed_layer.py.

#include <algorithm>

#include "packed_layer.h"

extern "C" {

// hidden: [T, hidden_size].  cos, sin: [T, D].  normed: [T, hidden_size], which is overwritten.
// heads: [T, num_heads + 2 * num_kv_heads, D], the result.
void winnow_before_attention(const Layer* layer, const Bf16* hidden, const Bf16* cos,
                             const Bf16* sin, Bf16* normed, Bf16* heads, int64_t num_tokens,
                             int num_threads) {
    int64_t all_heads = layer->num_heads + 2 * layer->num_kv_heads;
    winnow_rms_norm(hidden, nullptr, layer->input_norm, normed, nullptr, num_tokens,
                    layer->hidden_size, layer->eps, num_threads);
    winnow_linear(normed, &layer->qkv, heads, num_tokens, all_heads * layer->head_dim,
                  layer->hidden_size, num_threads);
    winnow_rotate(heads, cos, sin, layer->query_norm, layer->key_norm, layer->head_eps, num_tokens,
                  all_heads, layer->num_heads, layer->num_kv_heads, layer->head_dim, num_threads);
}

// attended: [T, num_heads * D].  residual, result: [T, hidden_size].
// inner: [block_tokens, hidden_size + 3 * mlp_size], which is overwritten.
void winnow_after_attention(const Layer* layer, const Bf16* attended, const Bf16* residual,
                            Bf16* inner, Bf16* result, int64_t num_tokens, int64_t block_tokens,
                            int num_threads) {
    int64_t size = layer->hidden_size, mlp_size = layer->mlp_size;
    int64_t attended_size = layer->num_heads * layer->head_dim;
    for (int64_t first = 0; first < num_tokens; first += block_tokens) {
        int64_t rows = std::min(block_tokens, num_tokens - first);
        Bf16 *normed = inner, *gate_up = normed + rows * size, *out = result + first * size;
        Bf16* activated = gate_up + rows * 2 * mlp_size;
        winnow_linear(attended + first * attended_size, &layer->output, normed, rows, size,
                      attended_size, num_threads);
        winnow_rms_norm(normed, residual + first * size, layer->post_norm, normed, out, rows, size,
                        layer->eps, num_threads);
        winnow_linear(normed, &layer->gate_up, gate_up, rows, 2 * mlp_size, size, num_threads);
        winnow_silu_mul(gate_up, activated, rows, mlp_size, num_threads);
        winnow_linear(activated, &layer->down, normed, rows, size, mlp_size, num_threads);
        winnow_add(out, normed, rows * size, num_threads);
    }
}

}  // extern "C"
