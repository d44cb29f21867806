// What both directions of attention share: transposed panels, padded rows, lanes, block sizes.

#pragma once

#include "functions.hpp"
#include "products.hpp"

#include <math.h>

namespace {

// Keys at a time. Up to here softmax is exact in two passes; more keys are taken tile by tile.
constexpr int64_t KEY_TILE = 512;
static_assert(KEY_TILE % PANEL == 0);
// Row strides known when compiled cost no address arithmetic; an odd number of cache lines keeps
// rows out of each other's cache sets.
constexpr int64_t SCORES_ROW = KEY_TILE + 16;
constexpr int64_t MAX_HEAD_DIM = 128;
constexpr int64_t DIM_ROW = MAX_HEAD_DIM + 16;
constexpr int64_t CACHE_LINE = 16;  // floats

constexpr int64_t QUERY_ROWS = 2 * BLOCK_ROWS;
// Keys whose products are summed by themselves: errors grow with the length of a sum, and that of
// an output makes the gradients of its row's scores add up to something other than 0.
constexpr int64_t SUMMED_KEYS = 160;

// Tiles as equal as whole panels allow: a last tile of one key would cost as much as one of many.
constexpr int64_t key_tile(int64_t keys) {
    const int64_t tiles = most(1, (keys + KEY_TILE - 1) / KEY_TILE);
    return rounded_up((keys + tiles - 1) / tiles, PANEL);
}

// As many rows as leave registers for VECTORS sums each.
template <int VECTORS>
constexpr int ROWS_OF =
    static_cast<int>(least(2 * BLOCK_ROWS, BLOCK_ROWS * PANEL_VECTORS / VECTORS));

// work.operator()<count>(), for a count from 1 to LIMIT.
template <int LIMIT, class Work>
AAM_INLINE void exactly(int64_t count, const Work& work) {
    if constexpr (LIMIT > 1) {
        if (count < LIMIT) {
            exactly<LIMIT - 1>(count, work);
            return;
        }
    }
    work.template operator()<LIMIT>();
}

// work.operator()<count>(row) for blocks of rows as equal as can be, none larger than LIMIT.
template <int LIMIT, class Work>
AAM_INLINE void in_blocks(int64_t rows, const Work& work) {
    const int64_t blocks = (rows + LIMIT - 1) / LIMIT;
    int64_t row = 0;
    for (int64_t left = blocks; left > 0; --left) {
        const int64_t count = (rows - row + left - 1) / left;
        exactly<LIMIT>(count, [&]<int ROWS>() { work.template operator()<ROWS>(row); });
        row += count;
    }
}

template <int ROWS, int VECTORS>
AAM_INLINE void zero(Floats (&sums)[ROWS][VECTORS]) {
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Floats{};
}

#if AAM_WIDTH == 16
#define AAM_LANES(LANE)                                                                         \
    LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7), LANE(8), LANE(9),   \
        LANE(10), LANE(11), LANE(12), LANE(13), LANE(14), LANE(15)
#elif AAM_WIDTH == 8
#define AAM_LANES(LANE) \
    LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7)
#else
#define AAM_LANES(LANE) LANE(0), LANE(1), LANE(2), LANE(3)
#endif

// Element i of the result is element (or, past WIDTH, y's element) LANE(i).
#if defined(__clang__) || __GNUC__ >= 12
#define AAM_SHUFFLE(x, y, LANE) __builtin_shufflevector(x, y, AAM_LANES(LANE))
#else
#define AAM_SHUFFLE(x, y, LANE) __builtin_shuffle(x, y, Ints{AAM_LANES(LANE)})
#endif

AAM_INLINE Floats interleave_low(Floats x, Floats y) {
#define AAM_LANE(i) ((i) / 2 + ((i) & 1) * AAM_WIDTH)
    return AAM_SHUFFLE(x, y, AAM_LANE);
#undef AAM_LANE
}
AAM_INLINE Floats interleave_high(Floats x, Floats y) {
#define AAM_LANE(i) ((i) / 2 + AAM_WIDTH / 2 + ((i) & 1) * AAM_WIDTH)
    return AAM_SHUFFLE(x, y, AAM_LANE);
#undef AAM_LANE
}
template <int STEP>
AAM_INLINE Floats swapped(Floats x) {
#define AAM_LANE(i) ((i) ^ STEP)
    return AAM_SHUFFLE(x, x, AAM_LANE);
#undef AAM_LANE
}

// 2^x for x <= 127, and 0 below -126. NaN stays NaN.
AAM_INLINE Floats exp2_or_zero(Floats x) {
    return select(x < -126.0f, Floats{}, exp2_in_range(x));
}

// log2 of normal numbers; NaN stays NaN: 2 artanh(s) with s = (m - 1) / (m + 1), m in [0.7, 1.42).
AAM_INLINE Floats log2_of(Floats x) {
    const Ints power = (bits(x) - 0x3f3504f3) >> 23;
    const Floats m = from_bits(bits(x) - (power << 23));
    const Floats s = (m - 1.0f) / (m + 1.0f), square = s * s;
    Floats y = all(2.0f / 9.0f);
    y = y * square + 2.0f / 7.0f;
    y = y * square + 2.0f / 5.0f;
    y = y * square + 2.0f / 3.0f;
    y = y * square + 2.0f;
    const Floats log = y * s * LOG2_E + __builtin_convertvector(power, Floats);
    return select(x == x, log, x);
}

// The largest element (the sum of all), in every element.
template <int STEP = WIDTH / 2>
AAM_INLINE Floats largest_everywhere(Floats x) {
    x = larger(x, swapped<STEP>(x));
    if constexpr (STEP > 1) x = largest_everywhere<STEP / 2>(x);
    return x;
}
template <int STEP = WIDTH / 2>
AAM_INLINE Floats sum_everywhere(Floats x) {
    x += swapped<STEP>(x);
    if constexpr (STEP > 1) x = sum_everywhere<STEP / 2>(x);
    return x;
}

AAM_INLINE Floats load_up_to(const float* from, int64_t count) {
    return count >= WIDTH ? load(from) : load_part(from, count);
}
AAM_INLINE void store_up_to(float* to, Floats x, int64_t count) {
    if (count >= WIDTH) store(to, x);
    else store_part(to, x, count);
}

// WIDTH rows become WIDTH columns.
template <int STEP = WIDTH / 2>
AAM_INLINE void transpose(Floats (&x)[WIDTH]) {
    Floats y[WIDTH];
    for (int i = 0; i < WIDTH / 2; ++i) {
        y[2 * i] = interleave_low(x[i], x[i + WIDTH / 2]);
        y[2 * i + 1] = interleave_high(x[i], x[i + WIDTH / 2]);
    }
    for (int i = 0; i < WIDTH; ++i) x[i] = y[i];
    if constexpr (STEP > 1) transpose<STEP / 2>(x);
}

// Packs the transpose of `from` (rows, depth) as Panels (depth, rows).
static __attribute__((noinline)) void pack_transposed(const Matrix& from, int64_t rows,
                                                      int64_t depth, float* to) {
    for (int64_t start = 0; start < rows; start += PANEL) {
        const int64_t width = rounded_up(least(PANEL, rows - start), WIDTH);
        float* out = to + start * depth;
        for (int64_t j = 0; j < width; j += WIDTH) {
            const float* block = from.data + (start + j) * from.row;
            const int64_t real = least(WIDTH, rows - start - j);
            for (int64_t k = 0; k < depth; k += WIDTH) {
                const int64_t deep = least(WIDTH, depth - k);
                Floats x[WIDTH];
                if (real == WIDTH && deep == WIDTH) {
                    for (int i = 0; i < WIDTH; ++i) x[i] = load(block + i * from.row + k);
                    transpose(x);
                    for (int i = 0; i < WIDTH; ++i) store(out + (k + i) * width + j, x[i]);
                    continue;
                }
                for (int i = 0; i < WIDTH; ++i) x[i] = Floats{};
                for (int i = 0; i < real; ++i) x[i] = load_up_to(block + i * from.row + k, deep);
                transpose(x);
                for (int i = 0; i < deep; ++i) store(out + (k + i) * width + j, x[i]);
            }
        }
    }
}

// Copies rows times `factor` into rows `to_row` apart, zero from head_dim to a multiple of WIDTH.
static inline void copy_rows(const Matrix& from, int64_t rows, int64_t head_dim, float factor,
                             float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < head_dim; d += WIDTH)
            store(to + i * to_row + d,
                  load_up_to(from.data + i * from.row + d, head_dim - d) * factor);
}

static inline void zero_rows(float* to, int64_t to_row, int64_t rows, int64_t head_dim) {
    for (int64_t i = 0; i < rows; ++i)
        memset(to + i * to_row, 0, static_cast<size_t>(head_dim) * sizeof(float));
}

static inline void column_factors(uint32_t first, int64_t count, int32_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = column_factor(first + static_cast<uint32_t>(i));
}

// Rows that will be read or written soon. The parts [from, to) of `parts` equal ones are fetched:
// a few at a time, where the processor computes, so that nothing has to wait for a free place
// among the outstanding fetches. (Always inline: a function that only prefetches has no effect
// that GCC knows of, and its calls vanish.)
struct Rows {
    const float* data;
    int64_t row, count, head_dim;

    __attribute__((always_inline)) void bring_near(int64_t from, int64_t to, int64_t parts) const {
        const int64_t end = count * to / parts;
        for (int64_t i = count * from / parts; i < end; ++i)
            for (int64_t d = 0; d < head_dim; d += CACHE_LINE)
                __builtin_prefetch(data + i * row + d);
    }
};

// Cuts scratch memory into pieces that start on cache lines; without memory it only counts.
struct Pieces {
    float* memory;
    int64_t used = 0;
    float* take(int64_t floats) {
        float* piece = memory ? memory + used : nullptr;
        used += rounded_up(floats, CACHE_LINE);
        return piece;
    }
};

}  // namespace
