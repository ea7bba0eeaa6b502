// Linear layers of packed weights; see linear.py.

#include <algorithm>

#include "packed_layer.h"

namespace {

constexpr int64_t PARALLEL_PRODUCTS = 1 << 19;  // from which on more threads pay
constexpr int BLOCK_ROWS = 192;     // inputs whose products with a panel are made together
constexpr int BLOCK_INNER = 1024;   // numbers of the inner dimension, likewise
// Widening int8 takes as long as the products of some rows, so for more than STRIP rows a strip has
// twice as many and half a panel. It reads every second line of memory, which no CPU foresees.
constexpr int TALL = 2 * STRIP;
constexpr int AHEAD = 8192;  // bytes

// With `pairs` of the inner dimension.  sums: [rows][PANEL], overwritten by the first ones.
template <typename Right>
void multiply_part(const Bf16* inputs, int64_t stride, const Right* panel, int64_t rows, int pairs,
                   bool is_first, float* sums) {
    constexpr int MOST = std::is_same_v<Right, BytePair> ? TALL : STRIP;
    for (int64_t row = 0; row < rows; row += MOST) {
        const Bf16* left = inputs + row * stride;
        float* out = sums + row * PANEL;
        for_rows<MOST>(std::min<int64_t>(MOST, rows - row), [&](auto n) {
            constexpr int VECTORS = n > STRIP ? 2 : 4;
            constexpr int BYTES = n > STRIP ? AHEAD : 0;
            for (int column = 0; column < PANEL; column += VECTORS * LANES)
                if (is_first)
                    product<n, VECTORS, false, BYTES>(left, stride, panel + column, PANEL, pairs,
                                                      out + column, PANEL);
                else
                    product<n, VECTORS, true, BYTES>(left, stride, panel + column, PANEL, pairs,
                                                     out + column, PANEL);
        });
    }
}

// sums: [rows][PANEL].
template <typename Right>
void multiply(const Bf16* inputs, int64_t inner, const Right* panel, int64_t rows, float* sums) {
    for (int64_t first = 0; first < inner; first += BLOCK_INNER) {
        int pairs = std::min<int64_t>(BLOCK_INNER, inner - first) / 2;
        multiply_part(inputs + first, inner, panel + first / 2 * PANEL, rows, pairs, first == 0, sums);
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
