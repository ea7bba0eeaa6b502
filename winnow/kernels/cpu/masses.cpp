// Sums over blocks of a vocabulary; see masses.py.

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace {

constexpr float LOWEST_POWER = -150.0f;  // 2^-150 counts as 0

float mass(const float* logits, int64_t size, __m512 best, __m512 scale, __m512 threshold) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += LANES) {
        __mmask16 in_block = (1u << std::min<int64_t>(LANES, size - i)) - 1;
        __m512 x = _mm512_maskz_loadu_ps(in_block, logits + i);
        __mmask16 is_above = _mm512_mask_cmp_ps_mask(in_block, x, threshold, _CMP_GT_OQ);
        __m512 power = _mm512_mul_ps(_mm512_sub_ps(x, best), scale);
        power = _mm512_max_ps(power, _mm512_set1_ps(LOWEST_POWER));
        sum = _mm512_mask_add_ps(sum, is_above, sum, exp2(power));
    }
    return _mm512_reduce_add_ps(sum);
}

}  // namespace

extern "C" {

// logits: rows of `size`, `stride` apart.  best, scale, threshold: [num_rows]; the last may be null.
// masses: [num_rows, ceil(size / block_size)].
void winnow_block_masses(const float* logits, const float* best, const float* scale,
                         const float* threshold, float* masses, int64_t num_rows, int64_t size,
                         int64_t stride, int64_t block_size, int num_threads) {
    int64_t num_blocks = (size + block_size - 1) / block_size;
#pragma omp parallel for collapse(2) num_threads(num_threads) if (num_rows * size >= PARALLEL)
    for (int64_t row = 0; row < num_rows; ++row) {
        for (int64_t block = 0; block < num_blocks; ++block) {
            int64_t first = block * block_size;
            float least = threshold ? threshold[row] : -std::numeric_limits<float>::infinity();
            masses[row * num_blocks + block] =
                mass(logits + row * stride + first, std::min(block_size, size - first),
                     _mm512_set1_ps(best[row]), _mm512_set1_ps(scale[row]), _mm512_set1_ps(least));
        }
    }
}

}  // extern "C"
