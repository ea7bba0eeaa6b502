// Attention of queries to the keys before them, in one tensor or in pages; see attention.py.
//
// All tensors are bfloat16 with contiguous heads, whose sizes are multiples of 32; strides count
// numbers. Pages may also be int8, with scales: their levels are packed as bfloat16, which has them
// all, and the scales are applied to the logits and to the weights. Queries that share their keys
// (some tokens', of all heads of a group) are computed in strips. Keys and values are packed first,
// as products read them; see product.h.
//
// What a query gets does not depend on the queries beside it: blocks of keys begin at the same keys
// for all, and keys that it does not see weigh exactly 0. Blocks that no query of a strip sees are
// not computed.

#include <algorithm>

#include "int8.h"
#include "packing.h"

namespace {

constexpr int BLOCK = 512;         // keys between two updates of the softmax
constexpr int TASK_QUERIES = 192;  // of all heads of a group, that a thread computes together
constexpr int AHEAD = 4 * LANES;   // entries of pages that are fetched before they are needed

// Have the second cache get numbers that will be read: those of pages lie anywhere. The first one
// waits for what it fetches, which takes 1.6 times as long.
template <typename T>
void fetch(const T* at, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T))
        _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T1);
}

// 16 values, of which `num_used` are read and the others zeros: [LANES / 2][D], the pairs along the
// keys.
void pack_values(const Bf16* values, int64_t stride, int num_used, int head_dim, Pair* packed) {
    // Of two rows of 32 numbers, one number of each in turn: of their first halves, and last ones.
    const __m512i places = _mm512_cvtepu16_epi32(_mm256_setr_epi16(
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i firsts = _mm512_or_si512(
        places, _mm512_slli_epi32(_mm512_add_epi32(places, _mm512_set1_epi32(32)), 16));
    const __m512i lasts = _mm512_add_epi16(firsts, _mm512_set1_epi16(LANES));
    for (int key = 0; key < LANES; key += 2) {
        for (int dim = 0; dim < head_dim; dim += 2 * LANES) {
            __m512i low = _mm512_setzero_si512(), high = low;
            const Bf16* at = values + key * stride + dim;
            if (key < num_used) low = _mm512_loadu_si512(at);
            if (key + 1 < num_used) high = _mm512_loadu_si512(at + stride);
            Pair* pairs = packed + key / 2 * head_dim + dim;
            _mm512_store_si512(pairs, _mm512_permutex2var_epi16(low, firsts, high));
            _mm512_store_si512(pairs + LANES, _mm512_permutex2var_epi16(low, lasts, high));
        }
    }
}

// How a product of a query and a key becomes a logit: by scaling, or as softcap * tanh(scaling *
// product / softcap). A softcap of 0 is none.
struct Logits {
    float scaling, softcap;

    // Of a number that stands for a logit while the softmax is computed, for powers of 2.
    float scale() const { return softcap > 0 ? LOG2_E : scaling * LOG2_E; }

    // What stands for this logit.
    float of(float logit) const { return softcap > 0 ? logit : logit / scaling; }

    __m512 capped(__m512 product) const {
        __m512 x = _mm512_mul_ps(product, _mm512_set1_ps(scaling / softcap));
        __m512 power = exp2(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2 * LOG2_E)));
        __m512 one = _mm512_set1_ps(1.0f), cap = _mm512_set1_ps(softcap);
        __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, power), _mm512_add_ps(one, power));
        __mmask16 is_negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
        tanh = _mm512_mul_ps(tanh, cap);
        return _mm512_mask_sub_ps(tanh, is_negative, _mm512_setzero_ps(), tanh);
    }
};

// Up to STRIP queries that attend to the same keys.
struct Strip {
    const Bf16* queries;       // [rows][D]
    float* mixed;              // [rows][D]: values by weight, so far
    float* best;               // [rows]: the largest logit so far
    float* total;              // [rows]: sum of the weights
    const int64_t* first_key;  // [rows] that each sees
    const int64_t* num_keys;   // [rows] up to the last that each sees

    Strip from(int row, int head_dim) const {
        return {queries + row * head_dim, mixed + row * head_dim, best + row, total + row,
                first_key + row, num_keys + row};
    }
};

struct Weights {
    alignas(64) float logits[STRIP * BLOCK];
    alignas(64) Bf16 weights[STRIP * BLOCK];
};

// Of the keys and values of a block, where they are int8.
struct Scales {
    alignas(64) float keys[BLOCK];
    alignas(64) float values[BLOCK];
};

// The softmax of a row's products with `width` keys, of which it sees those from `first_seen` on
// and before `end_seen`.  scales: null if the keys and values have none.
void update_softmax(float* logits, Bf16* weights, int width, int64_t first_seen, int64_t end_seen,
                    const Logits& how, const Scales* scales, float* mixed, int head_dim,
                    float* best, float* total) {
    if (std::max<int64_t>(first_seen, 0) >= std::min<int64_t>(end_seen, width)) {
        std::memset(weights, 0, width * sizeof(Bf16));
        return;
    }
    for (int key = 0; scales && key < width; key += LANES)
        _mm512_store_ps(logits + key, _mm512_mul_ps(_mm512_load_ps(logits + key),
                                                    _mm512_load_ps(scales->keys + key)));
    for (int key = 0; how.softcap > 0 && key < width; key += LANES)
        _mm512_store_ps(logits + key, how.capped(_mm512_load_ps(logits + key)));
    for (int64_t key = std::min<int64_t>(first_seen, width) - 1; key >= 0; --key)
        logits[key] = NEVER;
    for (int64_t key = std::max<int64_t>(end_seen, 0); key < width; ++key) logits[key] = NEVER;
    __m512 largest = _mm512_set1_ps(NEVER);
    for (int key = 0; key < width; key += LANES)
        largest = _mm512_max_ps(largest, _mm512_load_ps(logits + key));
    float new_best = std::max(*best, _mm512_reduce_max_ps(largest));
    float scale = how.scale();
    __m512 sum = _mm512_setzero_ps();
    for (int key = 0; key < width; key += LANES) {
        __m512 below = _mm512_sub_ps(_mm512_load_ps(logits + key), _mm512_set1_ps(new_best));
        __m512 weight = exp2(_mm512_mul_ps(below, _mm512_set1_ps(scale)));
        sum = _mm512_add_ps(sum, weight);
        if (scales) weight = _mm512_mul_ps(weight, _mm512_load_ps(scales->values + key));
        narrow(weights + key, weight);
    }
    float shrink = exp2((*best - new_best) * scale);
    *best = new_best;
    *total = *total * shrink + _mm512_reduce_add_ps(sum);
    if (shrink == 1.0f) return;
    for (int dim = 0; dim < head_dim; dim += LANES)
        _mm512_store_ps(mixed + dim,
                        _mm512_mul_ps(_mm512_load_ps(mixed + dim), _mm512_set1_ps(shrink)));
}

// Attend to a block of keys: `num_keys` from `first` on, panels and values packed one after another.
template <int ROWS>
void attend_block(const Strip& strip, const Pair* panels, const Pair* values, int64_t first,
                  int num_keys, int head_dim, const Logits& how, const Scales* scales,
                  Weights& own) {
    int width = (num_keys + LANES - 1) / LANES * LANES;
    for (int key = 0; key < width; key += PANEL)
        product<ROWS, 4, false>(strip.queries, head_dim, panels + key * (head_dim / 2), PANEL,
                                head_dim / 2, own.logits + key, BLOCK);
    for (int row = 0; row < ROWS; ++row)
        update_softmax(own.logits + row * BLOCK, own.weights + row * BLOCK, width,
                       strip.first_key[row] - first, strip.num_keys[row] - first, how, scales,
                       strip.mixed + row * head_dim, head_dim, strip.best + row,
                       strip.total + row);
    int dim = 0;
    for (; dim + 4 * LANES <= head_dim; dim += 4 * LANES)
        product<ROWS, 4, true>(own.weights, BLOCK, values + dim, head_dim, width / 2,
                               strip.mixed + dim, head_dim);
    if (dim < head_dim)
        product<ROWS, 2, true>(own.weights, BLOCK, values + dim, head_dim, width / 2,
                               strip.mixed + dim, head_dim);
}

// The queries of one task: `rows` of them, their sums, and what each sees.
struct Task {
    Scratch<Bf16> queries;
    Scratch<float> mixed, best, total;
    Scratch<int64_t> first_key, num_keys;

    void start(int rows, int head_dim) {
        queries.resize(rows * head_dim);
        mixed.assign(rows * head_dim, 0.0f);
        best.assign(rows, NEVER);
        total.assign(rows, 0.0f);
        first_key.assign(rows, 0);
        num_keys.resize(rows);
    }

    // Have a query's sink take part in its softmax.  sink: a logit.
    void add_sink(int row, float sink, const Logits& how) {
        best[row] = how.of(sink);
        total[row] = 1.0f;
    }

    Strip strip(int row, int head_dim) {
        return Strip{queries.data(),   mixed.data(),     best.data(),
                     total.data(),     first_key.data(), num_keys.data()}
            .from(row, head_dim);
    }

    void write(int row, int head_dim, Bf16* output) const {
        __m512 scale = _mm512_set1_ps(total[row] == 0 ? 0 : 1 / total[row]);
        for (int dim = 0; dim < head_dim; dim += LANES)
            narrow(output + dim, _mm512_mul_ps(_mm512_load_ps(&mixed[row * head_dim + dim]), scale));
    }
};

// Memory of a thread, kept for its next task: fresh pages are dear.
struct Memory {
    Task task;
    Weights weights;
    Scratch<Pair> panels, packed;  // of a block
    Scales scales;
    Scratch<Bf16> levels;  // of 16 keys or values
};
thread_local Memory own_memory;

// All pages of one kind, and the float16 scales of int8 ones, a key's and a value's in turn.
template <typename Held>
struct Pages {
    Held *keys, *values;
    Half* scales;
};

void append(const Pages<Bf16>& pages, int64_t slot, const Bf16* key, const Bf16* value,
            int64_t head_dim) {
    std::memcpy(pages.keys + slot * head_dim, key, head_dim * sizeof(Bf16));
    std::memcpy(pages.values + slot * head_dim, value, head_dim * sizeof(Bf16));
}

void append(const Pages<int8_t>& pages, int64_t slot, const Bf16* key, const Bf16* value,
            int64_t head_dim) {
    pages.scales[2 * slot] = quantize(key, head_dim, pages.keys + slot * head_dim);
    pages.scales[2 * slot + 1] = quantize(value, head_dim, pages.values + slot * head_dim);
}

// Pack 16 entries from `slot` on, of which `used` are read, at the place `key` of the block.
void pack_entries(const Pages<Bf16>& pages, int64_t slot, int used, int head_dim, int key,
                  Memory& memory) {
    int64_t at = slot * head_dim, panel = key / PANEL * (PANEL * head_dim / 2) + key % PANEL;
    pack_keys(pages.keys + at, head_dim, used, head_dim, memory.panels.data() + panel);
    pack_values(pages.values + at, head_dim, used, head_dim,
                memory.packed.data() + key / 2 * head_dim);
}

void pack_entries(const Pages<int8_t>& pages, int64_t slot, int used, int head_dim, int key,
                  Memory& memory) {
    int64_t at = slot * head_dim, panel = key / PANEL * (PANEL * head_dim / 2) + key % PANEL;
    memory.levels.resize(LANES * head_dim);
    Bf16* levels = memory.levels.data();
    widen_levels(pages.keys + at, used * head_dim, levels);
    pack_keys(levels, head_dim, used, head_dim, memory.panels.data() + panel);
    widen_levels(pages.values + at, used * head_dim, levels);
    pack_values(levels, head_dim, used, head_dim, memory.packed.data() + key / 2 * head_dim);
    // A scale that no entry has may be NaN.
    __m512i both = _mm512_maskz_loadu_epi32((1u << used) - 1, pages.scales + 2 * slot);
    __m256i of_keys = _mm512_cvtepi32_epi16(both);
    __m256i of_values = _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16));
    _mm512_store_ps(memory.scales.keys + key, _mm512_cvtph_ps(of_keys));
    _mm512_store_ps(memory.scales.values + key, _mm512_cvtph_ps(of_values));
}

// See winnow_append_and_attend.
template <typename Held>
void append_and_attend(const Bf16* queries, const Bf16* new_keys, const Bf16* new_values,
                       const Pages<Held>& held, const int64_t* slots, const int64_t* pages,
                       const int64_t* rows, const int32_t* lengths, const int64_t* first_seen,
                       const int32_t* positions, const float* sinks, Bf16* output,
                       int64_t num_rows, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                       int64_t page_size, int64_t width, int64_t most, int64_t query_row_stride,
                       int64_t query_head_stride, int64_t key_row_stride, int64_t key_head_stride,
                       int64_t value_row_stride, int64_t value_head_stride, const Logits& how,
                       int num_threads) {
    int64_t group = num_heads / num_kv_heads, panel_size = PANEL * head_dim / 2;
    int64_t num_strips = (group + STRIP - 1) / STRIP, strip = (group + num_strips - 1) / num_strips;
    int64_t work = num_rows * num_kv_heads * most * head_dim;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (work >= 4 * PARALLEL)
    for (int64_t at = 0; at < num_rows * num_kv_heads; ++at) {
        int64_t row = at / num_kv_heads, head = at % num_kv_heads, length = lengths[at];
        const int64_t* own_pages = pages + (rows[row] * num_kv_heads + head) * width;
        auto slot_of = [&](int64_t entry) {
            return own_pages[entry / page_size] * page_size + entry % page_size;
        };
        Memory& memory = own_memory;
        Task& task = memory.task;
        task.start(group, head_dim);
        if (length > 0)
            append(held, slots[at], new_keys + row * key_row_stride + head * key_head_stride,
                   new_values + row * value_row_stride + head * value_head_stride, head_dim);
        // Positions ascend: entries before the first that is seen are not read.
        int64_t start = 0;
        for (int64_t end = first_seen ? length : 0; start < end;) {
            int64_t middle = (start + end) / 2;
            bool is_seen = positions[slot_of(middle)] >= first_seen[row];
            (is_seen ? end : start) = is_seen ? middle : middle + 1;
        }
        for (int64_t i = 0; i < group; ++i) {
            std::memcpy(&task.queries[i * head_dim],
                        queries + row * query_row_stride + (head * group + i) * query_head_stride,
                        head_dim * sizeof(Bf16));
            task.first_key[i] = start;
            task.num_keys[i] = length;
            if (sinks && length > 0) task.add_sink(i, sinks[head * group + i], how);
        }
        memory.panels.resize(BLOCK / PANEL * panel_size);
        memory.packed.resize(BLOCK / PANEL * panel_size);
        const Scales* scales = held.scales ? &memory.scales : nullptr;
        for (int64_t first = start / LANES * LANES; first < length; first += BLOCK) {
            int num_keys = static_cast<int>(std::min<int64_t>(length - first, BLOCK));
            for (int key = 0; key < num_keys; key += LANES) {
                if (first + key + AHEAD < length) {
                    int64_t next = slot_of(first + key + AHEAD) * head_dim;
                    fetch(held.keys + next, LANES * head_dim);
                    fetch(held.values + next, LANES * head_dim);
                }
                int used = std::min(num_keys - key, LANES);
                pack_entries(held, slot_of(first + key), used, head_dim, key, memory);
            }
            for (int64_t i = 0; i < group; i += strip)
                for_rows(std::min(strip, group - i), [&](auto count) {
                    attend_block<count>(task.strip(i, head_dim), memory.panels.data(),
                                       memory.packed.data(), first, num_keys, head_dim, how,
                                       scales, memory.weights);
                });
        }
        for (int64_t i = 0; i < group; ++i)
            task.write(i, head_dim, output + (row * num_heads + head * group + i) * head_dim);
    }
}

}  // namespace

extern "C" {

// Attention of T queries per head to the keys from `first_keys` [T] on (null: 0) up to their own,
// `own_keys` [T]; both ascend.  sinks: [H], a logit for each query of a head, or null.
// queries: [H, T, D].  keys, values: [H_kv, N, D].  output: [T, H, D], contiguous.
void winnow_attend(const Bf16* queries, const Bf16* keys, const Bf16* values,
                   const int64_t* own_keys, const int64_t* first_keys, const float* sinks,
                   Bf16* output, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads,
                   int64_t head_dim, int64_t query_head_stride, int64_t query_stride,
                   int64_t key_head_stride, int64_t key_stride, int64_t value_head_stride,
                   int64_t value_stride, float scaling, float softcap, int num_threads) {
    int64_t num_keys = own_keys[num_queries - 1] + 1, group = num_heads / num_kv_heads;
    int64_t num_panels = panels_of(num_keys), panel_size = PANEL * head_dim / 2;
    int64_t first_panel = (first_keys ? first_keys[0] : 0) / BLOCK * (BLOCK / PANEL);
    Logits how{scaling, softcap};
    Scratch<Pair> all_panels(num_kv_heads * num_panels * panel_size);
    Scratch<Pair> all_packed(num_kv_heads * num_panels * panel_size);
    int64_t tokens = std::max<int64_t>(1, TASK_QUERIES / group);
    int64_t num_blocks = (num_queries + tokens - 1) / tokens;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for
        for (int64_t at = 0; at < num_kv_heads * num_panels; ++at) {
            int64_t head = at / num_panels, first = at % num_panels * PANEL;
            if (at % num_panels < first_panel) continue;
            for (int64_t key = first; key < first + PANEL; key += LANES) {
                int used = std::clamp<int64_t>(num_keys - key, 0, LANES);
                pack_keys(keys + head * key_head_stride + key * key_stride, key_stride, used,
                          head_dim, all_panels.data() + at * panel_size + (key - first));
                pack_values(values + head * value_head_stride + key * value_stride, value_stride,
                            used, head_dim,
                            all_packed.data() + at * panel_size + (key - first) / 2 * head_dim);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t at = 0; at < num_kv_heads * num_blocks; ++at) {
            // The last queries, which see most, come first.
            int64_t head = at % num_kv_heads, block = num_blocks - 1 - at / num_kv_heads;
            int64_t begin = block * tokens, end = std::min(begin + tokens, num_queries);
            int rows = static_cast<int>((end - begin) * group);
            Task& task = own_memory.task;
            Weights& own = own_memory.weights;
            task.start(rows, head_dim);
            for (int row = 0; row < rows; ++row) {
                int64_t token = begin + row / group, query_head = head * group + row % group;
                std::memcpy(&task.queries[row * head_dim],
                            queries + query_head * query_head_stride + token * query_stride,
                            head_dim * sizeof(Bf16));
                task.num_keys[row] = own_keys[token] + 1;
                if (first_keys) task.first_key[row] = first_keys[token];
                if (sinks) task.add_sink(row, sinks[query_head], how);
            }
            int64_t start = task.first_key[0] / BLOCK * BLOCK;
            for (int64_t first = start; first < task.num_keys[rows - 1]; first += BLOCK) {
                int64_t offset = (head * num_panels + first / PANEL) * panel_size;
                for (int row = 0; row < rows; row += STRIP) {
                    int strip_rows = std::min(STRIP, rows - row);
                    int64_t seen = task.num_keys[row + strip_rows - 1] - first;
                    if (seen <= 0 || task.first_key[row] >= first + BLOCK) continue;
                    for_rows(strip_rows, [&](auto rows) {
                        attend_block<rows>(task.strip(row, head_dim), all_panels.data() + offset,
                                           all_packed.data() + offset, first,
                                           std::min<int64_t>(seen, BLOCK), head_dim, how,
                                           nullptr, own);
                    });
                }
            }
            for (int row = 0; row < rows; ++row) {
                int64_t token = begin + row / group, query_head = head * group + row % group;
                task.write(row, head_dim, output + (token * num_heads + query_head) * head_dim);
            }
        }
    }
}

// Append each row's entry to its pages, then attend to all of them; see append_and_attend.
// queries: [B, H, D].  new_keys, new_values: [B, H_kv, D].  keys, values: [pages, page_size, D].
// scales: [pages, page_size, 2] of int8 keys and values, or null.
// slots, lengths: [B, H_kv].  pages: [num_rows, H_kv, width], of which rows [B] are the batch's.
// first_seen: [B], the first position that each row sees, or null; positions: [pages, page_size].
// sinks: [H], as for winnow_attend.  softcap: see Logits.
// most: the longest length.  output: [B, H, D], contiguous.
void winnow_append_and_attend(const Bf16* queries, const Bf16* new_keys, const Bf16* new_values,
                              void* keys, void* values, Half* scales, const int64_t* slots,
                              const int64_t* pages, const int64_t* rows, const int32_t* lengths,
                              const int64_t* first_seen, const int32_t* positions,
                              const float* sinks, Bf16* output, int64_t num_rows,
                              int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                              int64_t page_size, int64_t width, int64_t most,
                              int64_t query_row_stride, int64_t query_head_stride,
                              int64_t key_row_stride, int64_t key_head_stride,
                              int64_t value_row_stride, int64_t value_head_stride, float scaling,
                              float softcap, int num_threads) {
    auto attend = [&](auto held) {
        append_and_attend(queries, new_keys, new_values, held, slots, pages, rows, lengths,
                          first_seen, positions, sinks, output, num_rows, num_heads, num_kv_heads,
                          head_dim, page_size, width, most, query_row_stride, query_head_stride,
                          key_row_stride, key_head_stride, value_row_stride, value_head_stride,
                          Logits{scaling, softcap}, num_threads);
    };
    if (scales)
        attend(Pages<int8_t>{static_cast<int8_t*>(keys), static_cast<int8_t*>(values), scales});
    else
        attend(Pages<Bf16>{static_cast<Bf16*>(keys), static_cast<Bf16*>(values), nullptr});
}

}  // extern "C"
