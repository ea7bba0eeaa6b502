// What a layer computes between its products; see norm.py, rope.py and activation.py.
//
// All tensors are contiguous bfloat16; sizes, and half a head's, are multiples of 16.

#include <cpuid.h>

#include <cmath>

#include "packed_layer.h"
#include "version.h"

namespace {

float inverse_rms(const Bf16* row, int64_t size, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += LANES) {
        __m512 x = widen(row + i);
        sum = _mm512_fmadd_ps(x, x, sum);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / size + eps);
}

}  // namespace

extern "C" {

int winnow_version() { return VERSION; }

// Whether this CPU has what the kernels use.
int winnow_runs_here() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Whether it has AMX, with which oneDNN's products of many rows are faster than ours.
int winnow_has_amx() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
}

// hidden, residual, normed, total: [T, size]; residual and total may be null.
void winnow_rms_norm(const Bf16* hidden, const Bf16* residual, const Bf16* weight, Bf16* normed,
                     Bf16* total, int64_t num_tokens, int64_t size, float eps, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * size >= PARALLEL)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Bf16* row = hidden + token * size;
        if (residual) {
            Bf16* sums = total + token * size;
            for (int64_t i = 0; i < size; i += LANES)
                narrow(sums + i, _mm512_add_ps(widen(row + i), widen(residual + token * size + i)));
            row = sums;
        }
        __m512 scale = _mm512_set1_ps(inverse_rms(row, size, eps));
        for (int64_t i = 0; i < size; i += LANES)
            narrow(normed + token * size + i,
                   _mm512_mul_ps(rounded(_mm512_mul_ps(widen(row + i), scale)), widen(weight + i)));
    }
}

// sums, others: [size], a multiple of 16.
void winnow_add(Bf16* sums, const Bf16* others, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (size >= PARALLEL)
    for (int64_t i = 0; i < size; i += LANES)
        narrow(sums + i, _mm512_add_ps(widen(sums + i), widen(others + i)));
}

// gate_up: [T, 2 * size].  output: [T, size].
void winnow_silu_mul(const Bf16* gate_up, Bf16* output, int64_t num_tokens, int64_t size,
                     int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * size >= PARALLEL)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Bf16* gates = gate_up + token * 2 * size;
        for (int64_t i = 0; i < size; i += LANES) {
            __m512 gate = widen(gates + i);
            __m512 grown = exp2(_mm512_mul_ps(gate, _mm512_set1_ps(-LOG2_E)));
            __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(grown, _mm512_set1_ps(1.0f)));
            narrow(output + token * size + i, _mm512_mul_ps(rounded(silu), widen(gates + size + i)));
        }
    }
}

// heads: [T, all_heads, D], of which the first num_heads + num_kv_heads are rotated.
// cos, sin: [T, D].  query_norm, key_norm: [D], or null.
void winnow_rotate(Bf16* heads, const Bf16* cos, const Bf16* sin, const Bf16* query_norm,
                   const Bf16* key_norm, float eps, int64_t num_tokens, int64_t all_heads,
                   int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * all_heads * head_dim >= PARALLEL)
    for (int64_t token = 0; token < num_tokens; ++token) {
        for (int64_t idx = 0; idx < num_heads + num_kv_heads; ++idx) {
            Bf16* head = heads + (token * all_heads + idx) * head_dim;
            const Bf16* norm = idx < num_heads ? query_norm : key_norm;
            __m512 scale = _mm512_set1_ps(norm ? inverse_rms(head, head_dim, eps) : 1.0f);
            int64_t half = head_dim / 2;
            for (int64_t i = 0; i < half; i += LANES) {
                __m512 first = _mm512_mul_ps(widen(head + i), scale);
                __m512 second = _mm512_mul_ps(widen(head + half + i), scale);
                if (norm) {
                    first = _mm512_mul_ps(first, widen(norm + i));
                    second = _mm512_mul_ps(second, widen(norm + half + i));
                }
                __m512 c = widen(cos + token * head_dim + i), s = widen(sin + token * head_dim + i);
                narrow(head + i, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
                narrow(head + half + i, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
            }
        }
    }
}

}  // extern "C"
