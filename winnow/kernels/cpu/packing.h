// Keys packed as products read them, and memory for what is packed.

#pragma once

#include <new>
#include <vector>

#include "product.h"

constexpr float NEVER = -1e30f;  // a logit whose weight is 0; finite, so differences are numbers

template <typename T>
struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <typename U>
    AlignedAllocator(const AlignedAllocator<U>&) {}
    T* allocate(size_t n) {
        return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
    }
    void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t(64)); }
    template <typename U>
    bool operator==(const AlignedAllocator<U>&) const { return true; }
    template <typename U>
    bool operator!=(const AlignedAllocator<U>&) const { return false; }
    template <typename U>
    void construct(U*) {}  // `resize` clears nothing
};
template <typename T>
using Scratch = std::vector<T, AlignedAllocator<T>>;

template <typename... T>
size_t bytes_held(const Scratch<T>&... all) { return (0 + ... + (all.capacity() * sizeof(T))); }

// Rows of 16 vectors become columns.
inline void transpose(__m512i rows[LANES]) {
    __m512i other[LANES];
    for (int i = 0; i < LANES; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + j + 2]);
        }
    }
    for (int i = 0; i < LANES; i += 8) {
        for (int j = 0; j < 4; ++j) {
            other[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
            other[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
        }
    }
    for (int j = 0; j < 8; ++j) {
        rows[j] = _mm512_shuffle_i32x4(other[j], other[j + 8], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(other[j], other[j + 8], 0xdd);
    }
}

// 16 keys, of which `num_used` are read and the others zeros, into a panel: [D / 2][PANEL].
inline void pack_keys(const Bf16* keys, int64_t stride, int num_used, int head_dim, Pair* panel) {
    for (int pair = 0; pair < head_dim / 2; pair += LANES) {
        __m512i rows[LANES];
        for (int key = 0; key < LANES; ++key)
            rows[key] = key < num_used ? _mm512_loadu_si512(keys + key * stride + 2 * pair)
                                       : _mm512_setzero_si512();
        transpose(rows);
        for (int i = 0; i < LANES; ++i) _mm512_store_si512(panel + (pair + i) * PANEL, rows[i]);
    }
}

inline int64_t panels_of(int64_t num_keys) { return (num_keys + PANEL - 1) / PANEL; }
