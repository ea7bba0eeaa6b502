// Products of a strip of rows with a packed matrix.
//
// The instruction takes two numbers of the inner dimension at a time, so in a packed matrix those
// stand side by side (`Pair`): [inner / 2][columns]. Each sum is made in the order of the inner
// dimension, so it does not depend on the rows beside it. A matrix of int8 (`BytePair`) is widened
// as it is read: every int8 is a bfloat16.

#pragma once

#include <cstring>
#include <type_traits>

#include "vectors.h"

using Pair = uint32_t;      // two Bf16 of the inner dimension, the even one low
using BytePair = uint16_t;  // two int8, likewise

constexpr int PANEL = 4 * LANES;  // columns that are packed together
constexpr int STRIP = 6;          // rows of a strip: its 6 x 4 sums fill most registers

inline __m512bh columns_at(const Pair* at) { return (__m512bh)_mm512_load_si512(at); }

inline __m512bh columns_at(const BytePair* at) {
    auto bytes = reinterpret_cast<const __m128i*>(at);
    __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    return _mm512_cvtne2ps_pbh(second, first);
}

// sums [ROWS][16 * VECTORS] (+)= left [ROWS][2 * pairs] x right [pairs][16 * VECTORS].
// AHEAD: memory so many bytes behind what is read of `right` is fetched; 0: that is left to the CPU.
template <int ROWS, int VECTORS, bool ADD, int AHEAD = 0, typename Right>
void product(const Bf16* left, int64_t left_stride, const Right* right, int64_t right_stride,
             int pairs, float* sums, int64_t sums_stride) {
    __m512 sum[ROWS][VECTORS];
    for (int row = 0; row < ROWS; ++row)
        for (int i = 0; i < VECTORS; ++i)
            sum[row][i] = ADD ? _mm512_load_ps(sums + row * sums_stride + i * LANES)
                              : _mm512_setzero_ps();
    for (int pair = 0; pair < pairs; ++pair) {
        if constexpr (AHEAD > 0)
            _mm_prefetch(reinterpret_cast<const char*>(right + pair * right_stride) + AHEAD,
                         _MM_HINT_T0);
        __m512bh columns[VECTORS];
        for (int i = 0; i < VECTORS; ++i)
            columns[i] = columns_at(right + pair * right_stride + i * LANES);
        for (int row = 0; row < ROWS; ++row) {
            Pair two;
            std::memcpy(&two, left + row * left_stride + 2 * pair, sizeof two);
            __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            for (int i = 0; i < VECTORS; ++i)
                sum[row][i] = _mm512_dpbf16_ps(sum[row][i], both, columns[i]);
        }
    }
    for (int row = 0; row < ROWS; ++row)
        for (int i = 0; i < VECTORS; ++i)
            _mm512_store_ps(sums + row * sums_stride + i * LANES, sum[row][i]);
}

// Calls `compute` with the number of rows, 1 to MOST, as a constant.
template <int MOST = STRIP, typename Compute>
void for_rows(int64_t rows, Compute compute) {
    if (rows == MOST) return compute(std::integral_constant<int, MOST>());
    if constexpr (MOST > 1) for_rows<MOST - 1>(rows, compute);
}
