// Sums over blocks of a vocabulary, for any x86-64 CPU; see masses.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "version.h"

// Compiled once for every kind of CPU; which is taken is decided when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

constexpr int64_t PARALLEL = 1 << 15;    // numbers from which on more threads pay
constexpr float LOWEST_POWER = -126.0f;  // 2^ less counts as 0
constexpr float WHOLE = 12582912.0f;     // 1.5 * 2^23: a sum with it is a whole number

// 2^x, of x from LOWEST_POWER to 0, within 2 of its last places.
__attribute__((always_inline)) inline float exp2(float x) {
    float whole = x + WHOLE - WHOLE, part = x - whole;
    float sum = part * 1.3264727e-3f + 9.6715130e-3f;  // least error from -1/2 to 1/2: 9e-8
    sum = sum * part + 5.5507336e-2f;
    sum = sum * part + 2.4022242e-1f;
    sum = sum * part + 6.9314700e-1f;
    sum = sum * part + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    bits += static_cast<int32_t>(whole) * (1 << 23);
    std::memcpy(&sum, &bits, sizeof sum);
    return sum;
}

FOR_EACH_CPU
float mass(const float* logits, int64_t size, float best, float scale, float threshold) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
        float power = (logits[i] - best) * scale;
        float weight = exp2(power > LOWEST_POWER ? power : LOWEST_POWER);
        weight = power > LOWEST_POWER ? weight : 0.0f;
        sum += logits[i] > threshold ? weight : 0.0f;
    }
    return sum;
}

}  // namespace

extern "C" {

int winnow_version() { return VERSION; }

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
                mass(logits + row * stride + first, std::min(block_size, size - first), best[row],
                     scale[row], least);
        }
    }
}

}  // extern "C"
