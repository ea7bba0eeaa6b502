// Linear layers of packed weights; see linear.py.

#include <algorithm>

#include "packed_layer.h"

namespace {

constexpr int64_t PARALLEL_PRODUCTS = 1 << 19;  // from which on more threads pay
constexpr int BLOCK_ROWS = 192;     // inputs whose products with a panel are made together
constexpr int BLOCK_INNER = 1024;   // numbers of the inner dimension, likewise
constexpr int FEW_ROWS = 4 * STRIP;  // up to which int8 is widened for each strip

// With `pairs` of the inner dimension.  sums: [rows][PANEL], overwritten by the first ones.
template <typename Right>
void multiply_part(const Bf16* inputs, int64_t stride, const Right* panel, int64_t rows, int pairs,
                   bool is_first, float* sums) {
    for (int64_t row = 0; row < rows; row += STRIP) {
        const Bf16* left = inputs + row * stride;
        float* out = sums + row * PANEL;
        for_rows(std::min<int64_t>(STRIP, rows - row), [&](auto n) {
            if (is_first)
                product<n, 4, false>(left, stride, panel, PANEL, pairs, out, PANEL);
            else
                product<n, 4, true>(left, stride, panel, PANEL, pairs, out, PANEL);
        });
    }
}

// sums: [rows][PANEL].
void multiply(const Bf16* inputs, int64_t inner, const Pair* panel, int64_t rows, float* sums) {
    for (int64_t first = 0; first < inner; first += BLOCK_INNER) {
        int pairs = std::min<int64_t>(BLOCK_INNER, inner - first) / 2;
        multiply_part(inputs + first, inner, panel + first / 2 * PANEL, rows, pairs, first == 0, sums);
    }
}

// Of many rows each part of the panel is widened once.
void multiply(const Bf16* inputs, int64_t inner, const BytePair* panel, int64_t rows, float* sums) {
    if (rows <= FEW_ROWS) return multiply_part(inputs, inner, panel, rows, inner / 2, true, sums);
    alignas(64) Pair wide[BLOCK_INNER / 2 * PANEL];
    for (int64_t first = 0; first < inner; first += BLOCK_INNER) {
        int pairs = std::min<int64_t>(BLOCK_INNER, inner - first) / 2;
        const BytePair* part = panel + first / 2 * PANEL;
        for (int64_t i = 0; i < int64_t{pairs} * PANEL; i += LANES)
            _mm512_store_si512(wide + i, (__m512i)columns_at(part + i));
        multiply_part(inputs + first, inner, wide, rows, pairs, first == 0, sums);
    }
}

template <typename Right>
void linear(const Bf16* inputs, const Right* panels, const float* scales, const Bf16* bias,
            Bf16* outputs, int64_t num_rows, int64_t num_columns, int64_t inner, int num_threads) {
    int64_t num_panels = (num_columns + PANEL - 1) / PANEL;
    int64_t num_blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    bool is_large = num_rows * num_columns * inner >= PARALLEL_PRODUCTS;
#pragma omp parallel for collapse(2) num_threads(num_threads) if (is_large)
    for (int64_t block = 0; block < num_blocks; ++block) {
        for (int64_t panel = 0; panel < num_panels; ++panel) {
            alignas(64) float sums[BLOCK_ROWS * PANEL];
            int64_t first = block * BLOCK_ROWS, rows = std::min<int64_t>(BLOCK_ROWS, num_rows - first);
            multiply(inputs + first * inner, inner, panels + panel * inner / 2 * PANEL, rows, sums);
            int64_t end = std::min((panel + 1) * PANEL, num_columns);
            for (int64_t row = 0; row < rows; ++row) {
                for (int64_t column = panel * PANEL; column < end; column += LANES) {
                    __m512 sum = _mm512_load_ps(sums + row * PANEL + column % PANEL);
                    if (scales) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(scales + column));
                    if (bias) sum = _mm512_add_ps(sum, widen(bias + column));
                    narrow(outputs + (first + row) * num_columns + column, sum);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// inputs: [rows, inner].  weights.panels: [ceil(columns / PANEL)][inner / 2][PANEL], of Pair, or of
// BytePair where there are scales.  outputs: [rows, columns]; columns are a multiple of 16, inner
// of 2.
void winnow_linear(const Bf16* inputs, const Linear* weights, Bf16* outputs, int64_t num_rows,
                   int64_t num_columns, int64_t inner, int num_threads) {
    const Bf16* bias = weights->bias;
    if (weights->scales)
        linear(inputs, static_cast<const BytePair*>(weights->panels), weights->scales, bias, outputs,
               num_rows, num_columns, inner, num_threads);
    else
        linear(inputs, static_cast<const Pair*>(weights->panels), nullptr, bias, outputs, num_rows,
               num_columns, inner, num_threads);
}

}  // extern "C"
