// Vectors as int8 with a float16 scale; see winnow/kv_quantization.py, of which these are the bits.

#pragma once

#include "vectors.h"

using Half = uint16_t;  // a float16

// levels: [size].  Returns the scale, a float16.
inline Half quantize(const Bf16* vector, int64_t size, int8_t* levels) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 is_nan = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        __m512 x = widen(vector + i);
        is_nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
    }
    float most = is_nan ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
    Half half = _cvtss_sh(most * (1.0f / 127), _MM_FROUND_TO_NEAREST_INT);
    if (_cvtsh_ss(half) * 127 < most) ++half;  // the next float16 above
    __m512 scale = _mm512_set1_ps(_cvtsh_ss(half));
    for (int64_t i = 0; i < size; i += LANES) {
        __m512 level = _mm512_div_ps(widen(vector + i), scale);
        __mmask16 is_number = _mm512_cmp_ps_mask(level, level, _CMP_ORD_Q);
        __m512i whole = _mm512_maskz_cvtps_epi32(is_number, level);  // to the nearest, even of two
        _mm_storeu_si128(reinterpret_cast<__m128i*>(levels + i), _mm512_cvtepi32_epi8(whole));
    }
    return half;
}

// count: a multiple of 32.
inline void widen_levels(const int8_t* levels, int64_t count, Bf16* numbers) {
    for (int64_t i = 0; i < count; i += LANES) {
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + i));
        narrow(numbers + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    }
}
