// Vectors of 16 float32 numbers, and bfloat16 ones in memory.

#pragma once

#include <immintrin.h>

#include <cstdint>

using Bf16 = uint16_t;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int LANES = 16;              // float32 numbers of a vector
constexpr int64_t PARALLEL = 1 << 15;  // numbers from which on more threads pay

inline __m512 widen(const Bf16* at) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 rounded(__m512 x) {
    __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void narrow(Bf16* at, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(x));
}

// 2^x, within 2 of its last places; 0 far below the smallest number.
inline __m512 exp2(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(1.3264727e-3f);  // least relative error from -1/2 to 1/2: 9e-8
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6715130e-3f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5507336e-2f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022242e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314700e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

inline float exp2(float x) { return _mm512_cvtss_f32(exp2(_mm512_set1_ps(x))); }
