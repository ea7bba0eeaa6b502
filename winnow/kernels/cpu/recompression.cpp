// Scores of the entries of KV heads in pages, the choice of the best, and moving them together; see
// recompression.py.
//
// Keys are bfloat16, or int8 with scales: [pages, page_size, D], D a multiple of 32, page_size of 16.
// Head n of N has lengths[n] entries in pages[n][width]; those of its window are its last.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "int8.h"
#include "packing.h"

namespace {

constexpr float SIMILAR = 0.5f;  // T in the code of R-KV's authors
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int FEW = 2 * STRIP;    // open keys of a panel for which not all others are read
constexpr size_t MOST_KEPT = 4 << 20;  // bytes of a thread between two calls

// What the heads of one call share.
struct Heads {
    const Bf16* queries;  // [N, group, window, D]
    const void* keys;
    const Half* scales;  // [pages, page_size, 2] of int8 keys and of values, or null
    const int64_t* pages;
    const int64_t* lengths;
    int64_t group, window, head_dim, page_size, width;
    float scale;  // of the logits, for powers of 2

    int64_t num_slots() const { return width * page_size; }
    const Bf16* queries_of(int64_t head) const { return queries + head * group * window * head_dim; }
    int64_t slot(int64_t head, int64_t idx) const {
        return pages[head * width + idx / page_size] * page_size + idx % page_size;
    }
    // 16 keys one after another, of which `used` count; those that are int8 are widened into `levels`.
    const Bf16* entries(int64_t head, int64_t idx, int used, Bf16* levels) const {
        int64_t at = slot(head, idx) * head_dim;
        if (!scales) return static_cast<const Bf16*>(keys) + at;
        widen_levels(static_cast<const int8_t*>(keys) + at, used * head_dim, levels);
        return levels;
    }
    float scale_of(int64_t head, int64_t idx) const {
        return _cvtsh_ss(scales[2 * slot(head, idx)]);
    }
};

// Memory of a thread, kept for its next head: fresh pages are dear. That of long heads is given back
// when a call ends.
struct Memory {
    Scratch<Pair> panels;                // keys
    Scratch<Bf16> rows;                  // keys one after another
    Scratch<Bf16> levels;                // of 16 keys
    Scratch<float> scales;               // of each key that is int8
    Scratch<float> logits, best, pooled;  // of a strip's queries
    Scratch<float> norms, limits, mean;  // of each key
    Scratch<int32_t> latest;             // likewise
    Scratch<int32_t> open;               // keys without a later similar one
    Scratch<Bf16> strip;                 // of those that are compared
    Scratch<uint32_t> order;

    void end_call() {
        size_t held = bytes_held(panels, rows, levels, scales, logits, best, pooled, norms, limits,
                                 mean, latest, open, strip, order);
        if (held > MOST_KEPT) *this = Memory();
    }
};
thread_local Memory own;

// Have threads compute heads, each the next one that is left.
template <typename Compute>
void for_heads(int64_t num_heads, int num_threads, Compute compute) {
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < num_heads; ++head) compute(head);
        own.end_call();
    }
}

int64_t row_size(int64_t num_keys) { return panels_of(num_keys) * PANEL; }

void pack(const Heads& heads, int64_t head, int64_t num_keys) {
    own.panels.resize(row_size(num_keys) * heads.head_dim / 2);
    own.levels.resize(LANES * heads.head_dim);
    for (int64_t key = 0; key < row_size(num_keys); key += LANES) {
        int used = std::clamp<int64_t>(num_keys - key, 0, LANES);
        const Bf16* keys = used ? heads.entries(head, key, used, own.levels.data()) : nullptr;
        pack_keys(keys, heads.head_dim, used, heads.head_dim,
                  own.panels.data() + key / PANEL * PANEL * heads.head_dim / 2 + key % PANEL);
    }
    own.scales.resize(heads.scales ? num_keys : 0);
    for (size_t key = 0; key < own.scales.size(); ++key) own.scales[key] = heads.scale_of(head, key);
}

// Products of up to STRIP rows with the packed keys: [rows][row_size].
void multiply(const Bf16* rows, int64_t count, int64_t num_keys, int64_t head_dim, float* products) {
    for_rows(count, [&](auto n) {
        for (int64_t key = 0; key < num_keys; key += PANEL)
            product<n, 4, false>(rows, head_dim, own.panels.data() + key * head_dim / 2, PANEL,
                                 head_dim / 2, products + key, row_size(num_keys));
    });
}

// Products with the packed keys become those with what int8 keys stand for.
void apply_scales(float* products) {
    const float* scales = own.scales.data();
    int64_t size = own.scales.size();
    for (int64_t key = 0; key < size; ++key) products[key] *= scales[key];
}

// Logits become weights of the first `num_seen` keys, and zeros up to a whole vector.
// Returns the inverse of their sum.
float weigh(float* logits, int64_t num_seen, float scale) {
    int64_t end = (num_seen + LANES - 1) / LANES * LANES;
    std::fill(logits + num_seen, logits + end, NEVER);
    __m512 largest = _mm512_set1_ps(NEVER), sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < end; key += LANES)
        largest = _mm512_max_ps(largest, _mm512_load_ps(logits + key));
    largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t key = 0; key < end; key += LANES) {
        __m512 below = _mm512_sub_ps(_mm512_load_ps(logits + key), largest);
        __m512 weight = exp2(_mm512_mul_ps(below, _mm512_set1_ps(scale)));
        sum = _mm512_add_ps(sum, weight);
        _mm512_store_ps(logits + key, weight);
    }
    return 1 / _mm512_reduce_add_ps(sum);
}

// sums += numbers * factor.
void add(float* sums, const float* numbers, float factor, int64_t size) {
    for (int64_t i = 0; i < size; ++i) sums[i] += numbers[i] * factor;
}

void score_by_window(const Heads& heads, int64_t head, float* scores) {
    int64_t length = heads.lengths[head], num_queries = heads.group * heads.window;
    std::fill(scores, scores + heads.num_slots(), 0.0f);
    pack(heads, head, length);
    own.logits.resize(STRIP * row_size(length));
    for (int64_t query = 0; query < num_queries; query += STRIP) {
        int64_t count = std::min<int64_t>(STRIP, num_queries - query);
        multiply(heads.queries_of(head) + query * heads.head_dim, count, length, heads.head_dim,
                 own.logits.data());
        for (int64_t row = 0; row < count; ++row) {
            float* logits = own.logits.data() + row * row_size(length);
            apply_scales(logits);
            int64_t num_seen = length - heads.window + (query + row) % heads.window + 1;
            float factor = weigh(logits, num_seen, heads.scale);
            add(scores, logits, factor, num_seen);
        }
    }
}

// scores += factor * the maximum of each weight and its neighbours within `half`; the weights, and
// the scores that are written, are whole vectors.
void add_pooled(float* scores, const float* weights, int64_t size, int64_t half, float factor) {
    own.pooled.assign(size + 2 * half + LANES, 0.0f);
    float* pooled = own.pooled.data();
    std::copy(weights, weights + size, pooled + half);
    for (int64_t i = 0; i < size; i += LANES) {
        __m512 most = _mm512_loadu_ps(pooled + i);
        for (int64_t j = 1; j <= 2 * half; ++j)
            most = _mm512_max_ps(most, _mm512_loadu_ps(pooled + i + j));
        __m512 sum = _mm512_fmadd_ps(most, _mm512_set1_ps(factor), _mm512_loadu_ps(scores + i));
        _mm512_storeu_ps(scores + i, sum);
    }
}

// scores += weight * R-KV's importance of the packed candidates.
void add_importance(const Heads& heads, int64_t head, int64_t num_keys, int64_t kernel_size,
                    float weight, float* scores) {
    int64_t stride = row_size(num_keys);
    own.logits.resize(STRIP * stride);
    own.best.resize(STRIP * stride);
    float* best = own.best.data();
    for (int64_t query = 0; query < heads.window; query += STRIP) {
        int64_t count = std::min<int64_t>(STRIP, heads.window - query);
        for (int64_t member = 0; member < heads.group; ++member) {
            float* logits = member ? own.logits.data() : best;
            const Bf16* rows = heads.queries_of(head) + (member * heads.window + query) * heads.head_dim;
            multiply(rows, count, num_keys, heads.head_dim, logits);
            for (int64_t i = 0; member && i < count * stride; ++i)
                best[i] = std::max(best[i], logits[i]);
        }
        for (int64_t row = 0; row < count; ++row) {
            float* weights = best + row * stride;
            apply_scales(weights);  // after the maximum: no scale is below 0
            float factor = weigh(weights, num_keys, heads.scale);
            add_pooled(scores, weights, num_keys, kernel_size / 2, weight * factor / heads.window);
        }
    }
}

// The keys one after another, and their norms; infinite of a key without a direction. A scale changes
// no direction, so of int8 keys both are the levels'; where it is not finite, these are 0.
void read_keys(const Heads& heads, int64_t head, int64_t num_keys) {
    own.rows.resize(num_keys * heads.head_dim);
    own.norms.resize(num_keys);
    own.limits.assign(row_size(num_keys), INFINITE);
    for (int64_t key = 0; key < num_keys; ++key) {
        Bf16* row = own.rows.data() + key * heads.head_dim;
        const Bf16* at = heads.entries(head, key, 1, row);
        if (at != row) std::memcpy(row, at, heads.head_dim * sizeof(Bf16));
        __m512 squares = _mm512_setzero_ps();
        for (int64_t dim = 0; dim < heads.head_dim; dim += LANES) {
            __m512 x = widen(row + dim);
            squares = _mm512_fmadd_ps(x, x, squares);
        }
        float norm = std::sqrt(_mm512_reduce_add_ps(squares));
        own.norms[key] = norm > 0 && norm < INFINITE ? norm : INFINITE;
        own.limits[key] = SIMILAR * own.norms[key];
    }
}

// Keys whose similarity is compared; all one after another.
struct Directions {
    const Bf16* rows;
    const Pair* panels;
    const float *norms, *limits;
    int32_t* latest;
    int64_t head_dim;
};

// Compare `ROWS` keys with a panel of keys.
template <int ROWS>
void compare(const Directions& keys, const int32_t* rows, int64_t panel) {
    alignas(64) float products[ROWS * PANEL];
    own.strip.resize(ROWS * keys.head_dim);
    for (int i = 0; i < ROWS; ++i)
        std::memcpy(&own.strip[i * keys.head_dim], keys.rows + rows[i] * keys.head_dim,
                    keys.head_dim * sizeof(Bf16));
    product<ROWS, 4, false>(own.strip.data(), keys.head_dim, keys.panels + panel * keys.head_dim / 2,
                            PANEL, keys.head_dim / 2, products, PANEL);
    int32_t last[ROWS];
    std::fill(last, last + ROWS, -1);
    for (int64_t key = panel; key < panel + PANEL; key += LANES) {
        __m512 limits = _mm512_load_ps(keys.limits + key);
        __m512i latest = _mm512_load_si512(keys.latest + key);
        for (int i = 0; i < ROWS; ++i) {
            __m512 limit = _mm512_mul_ps(limits, _mm512_set1_ps(keys.norms[rows[i]]));
            __m512 found = _mm512_load_ps(products + i * PANEL + key - panel);
            unsigned similar = _mm512_cmp_ps_mask(found, limit, _CMP_GT_OQ);
            if (rows[i] >= key && rows[i] < key + LANES) similar &= ~(1u << (rows[i] - key));
            if (!similar) continue;
            last[i] = key + 31 - __builtin_clz(similar);
            latest = _mm512_mask_max_epi32(latest, similar, latest, _mm512_set1_epi32(rows[i]));
        }
        _mm512_store_si512(keys.latest + key, latest);
    }
    for (int i = 0; i < ROWS; ++i)
        keys.latest[rows[i]] = std::max(keys.latest[rows[i]], last[i]);
}

// Compares keys with one panel, a strip at a time.
class Comparison {
public:
    Comparison(const Directions& keys, int64_t panel) : keys(keys), panel(panel) {}

    void add(int32_t row) {
        rows[count++] = row;
        if (count == STRIP) finish();
    }
    void finish() {
        if (count) for_rows(count, [&](auto n) { compare<n>(keys, rows, panel); });
        count = 0;
    }
    bool is_between_strips() const { return count == 0; }

private:
    const Directions& keys;
    int64_t panel;
    int32_t rows[STRIP];
    int count = 0;
};

// The latest other key similar to each, or -1. Keys are open until a similar one is found. Each panel,
// the last first, is compared with all keys before it until few of its own are open, then only with
// open keys, since others have found a later one. Its few stay open for the panels before it.
void find_latest(int64_t num_keys, int64_t head_dim) {
    own.latest.assign(row_size(num_keys), -1);
    own.open.resize(num_keys);
    std::iota(own.open.begin(), own.open.end(), 0);
    int32_t* latest = own.latest.data();
    Directions keys{own.rows.data(),   own.panels.data(), own.norms.data(),
                    own.limits.data(), latest,            head_dim};
    for (int64_t panel = row_size(num_keys) - PANEL; panel >= 0; panel -= PANEL) {
        int64_t end = std::min(num_keys, panel + PANEL), first = end;
        auto num_open = [&] { return std::count(latest + panel, latest + end, -1); };
        Comparison comparison(keys, panel);
        while (first > 0 && !(comparison.is_between_strips() && num_open() <= FEW))
            comparison.add(--first);
        comparison.finish();

        int32_t few[FEW], num_few = 0;
        for (int64_t key = panel; first > 0 && key < end; ++key)
            if (latest[key] < 0) few[num_few++] = key;
        std::for_each(own.open.rbegin(), own.open.rend(), [&](int32_t one) {
            if (one < first || one >= end) comparison.add(one);
        });
        comparison.finish();
        // Of the keys before the panel they were compared with the open ones only.
        for (int i = 0; i < num_few; ++i)
            if (latest[few[i]] < panel) latest[few[i]] = -1;

        auto is_done = [&](int32_t one) {
            return latest[one] >= 0 || (first == 0 && one >= panel && one < end);
        };
        own.open.erase(std::remove_if(own.open.begin(), own.open.end(), is_done), own.open.end());
    }
}

float cosine(int64_t one, int64_t other, int64_t head_dim) {
    const Bf16 *left = own.rows.data() + one * head_dim, *right = own.rows.data() + other * head_dim;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t dim = 0; dim < head_dim; dim += LANES)
        sum = _mm512_fmadd_ps(widen(left + dim), widen(right + dim), sum);
    return _mm512_reduce_add_ps(sum) / own.norms[one] / own.norms[other];
}

// The mean cosine similarity of each key to the others: from the sum of all directions, without
// that of each key to the latest similar to it.
void average_similarity(int64_t num_keys, int64_t head_dim) {
    Scratch<float>& total = own.logits;
    total.assign(head_dim, 0.0f);
    own.mean.assign(row_size(num_keys), 0.0f);
    for (int64_t key = 0; key < num_keys; ++key) {
        if (own.norms[key] == INFINITE) continue;
        const Bf16* row = own.rows.data() + key * head_dim;
        __m512 factor = _mm512_set1_ps(1 / own.norms[key]);
        for (int64_t dim = 0; dim < head_dim; dim += LANES)
            _mm512_store_ps(&total[dim],
                            _mm512_fmadd_ps(widen(row + dim), factor, _mm512_load_ps(&total[dim])));
    }
    for (int64_t key = 0; key < num_keys; ++key) {
        if (own.norms[key] == INFINITE) continue;
        const Bf16* row = own.rows.data() + key * head_dim;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t dim = 0; dim < head_dim; dim += LANES)
            sum = _mm512_fmadd_ps(widen(row + dim), _mm512_load_ps(&total[dim]), sum);
        own.mean[key] += _mm512_reduce_add_ps(sum) / own.norms[key] - 1;
        int32_t latest = own.latest[key];
        if (latest >= 0) own.mean[latest] -= cosine(key, latest, head_dim);
    }
    for (int64_t key = 0; key < num_keys; ++key) own.mean[key] /= num_keys;
}

void score_by_rkv(const Heads& heads, int64_t head, int64_t kernel_size, float weight,
                  float* scores) {
    int64_t num_keys = heads.lengths[head] - heads.window;
    std::fill(scores, scores + heads.num_slots(), 0.0f);
    pack(heads, head, num_keys);
    if (weight > 0) add_importance(heads, head, num_keys, kernel_size, weight, scores);
    read_keys(heads, head, num_keys);
    find_latest(num_keys, heads.head_dim);
    average_similarity(num_keys, heads.head_dim);
    float factor = weigh(own.mean.data(), num_keys, LOG2_E);
    add(scores, own.mean.data(), (weight - 1) * factor, num_keys);
}

// Numbers in the order of the scores; what is not a number is the lowest.
uint32_t ordinal(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    if (std::isnan(score)) return 0;
    if (score == 0) return 1u << 31;  // -0 equals 0
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

// Writes the window's entries and the best before it, `budget` in all, ascending.
void choose(const float* scores, int64_t length, int64_t window, int64_t budget, int64_t* kept) {
    int64_t num_candidates = length - window, room = budget - window;
    own.order.resize(num_candidates);
    std::transform(scores, scores + num_candidates, own.order.begin(), ordinal);
    auto last = own.order.begin() + room - 1;
    std::nth_element(own.order.begin(), last, own.order.end(), std::greater<uint32_t>());
    uint32_t least = *last;
    int64_t num_ties =
        room - std::count_if(own.order.begin(), last, [&](uint32_t one) { return one > least; });
    for (int64_t entry = 0; entry < num_candidates; ++entry) {
        uint32_t one = ordinal(scores[entry]);
        if (one > least || (one == least && num_ties-- > 0)) *kept++ = entry;
    }
    for (int64_t entry = num_candidates; entry < length; ++entry) *kept++ = entry;
}

}  // namespace

extern "C" {

// scores: [N, width * page_size], of the entries that the queries attend to.
// scales: as in Heads.
void winnow_window_scores(const Bf16* queries, const void* keys, const Half* scales,
                          const int64_t* pages, const int64_t* lengths, float* scores,
                          int64_t num_heads, int64_t group, int64_t window, int64_t head_dim,
                          int64_t page_size, int64_t width, float scaling, int num_threads) {
    Heads heads{queries, keys,     scales,    pages, lengths,         group,
                window,  head_dim, page_size, width, scaling * LOG2_E};
    for_heads(num_heads, num_threads, [&](int64_t head) {
        score_by_window(heads, head, scores + head * heads.num_slots());
    });
}

// scores: likewise, of the entries before the window.
void winnow_rkv_scores(const Bf16* queries, const void* keys, const Half* scales,
                       const int64_t* pages, const int64_t* lengths, float* scores,
                       int64_t num_heads, int64_t group, int64_t window, int64_t head_dim,
                       int64_t page_size, int64_t width, int64_t kernel_size, float scaling,
                       float weight, int num_threads) {
    Heads heads{queries, keys,     scales,    pages, lengths,         group,
                window,  head_dim, page_size, width, scaling * LOG2_E};
    for_heads(num_heads, num_threads, [&](int64_t head) {
        score_by_rkv(heads, head, kernel_size, weight, scores + head * heads.num_slots());
    });
}

// scores: [N, num_slots].  budgets: [N].  kept: [N, largest], of which each head's budget is written.
void winnow_best_entries(const float* scores, const int64_t* lengths, const int64_t* budgets,
                         int64_t* kept, int64_t num_heads, int64_t num_slots, int64_t window,
                         int64_t largest, int num_threads) {
    for_heads(num_heads, num_threads, [&](int64_t head) {
        choose(scores + head * num_slots, lengths[head], window, budgets[head],
               kept + head * largest);
    });
}

// parts: of the pool, each [pages * page_size] of so many bytes.  kept: [N, largest], ascending, of
// which the first `lengths` [N] count.
void winnow_compact(char* const* parts, const int64_t* part_bytes, int64_t num_parts,
                    const int64_t* pages, const int64_t* kept, const int64_t* lengths,
                    int64_t num_heads, int64_t width, int64_t largest, int64_t page_size,
                    int num_threads) {
#pragma omp parallel for num_threads(num_threads)
    for (int64_t head = 0; head < num_heads; ++head) {
        const int64_t* own_pages = pages + head * width;
        auto slot = [&](int64_t entry) {
            return own_pages[entry / page_size] * page_size + entry % page_size;
        };
        for (int64_t to = 0; to < lengths[head]; ++to) {
            int64_t from = kept[head * largest + to];
            if (from == to) continue;
            for (int64_t part = 0; part < num_parts; ++part)
                std::memcpy(parts[part] + slot(to) * part_bytes[part],
                            parts[part] + slot(from) * part_bytes[part], part_bytes[part]);
        }
    }
}

}  // extern "C"
