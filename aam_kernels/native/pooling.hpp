// Attention pooling: the softmax-weighted sum of each sequence's rows, and its gradients.
//
// With scores s and values v of a sequence: p = softmax(s), o = p v, lse = logsumexp(s);
// dv = p dO, ds = p (v dO - o dO). The values, which are nearly all of the data, are read once
// each way. The backward pass makes the softmax again: exp(s - lse) would round where the lse is
// large. A sequence is one thread's work, so that sums have one order.

#pragma once

#include <math.h>

#include "functions.hpp"

namespace {

constexpr int64_t POOLING_ROWS = 64;             // rows whose weights are made together
constexpr int64_t POOLING_ELEMENTS = 64 * 1024;  // values a thread takes at a time
constexpr int64_t PREFETCHED_ROWS = 16;          // ahead: 39 GB/s of 128 columns where 30 were

// Calls work(sequence, thread) for every sequence, neighbours on one thread. A block is the
// sequences that start in its rows; the last one also has those that start past all rows.
template <class Work>
struct PoolingBlocks {
    const aam::Sequences& sequences;
    const Work& work;
    int64_t rows, blocks, next;

    // The first sequence that starts at `row` or later.
    int64_t first_from(int64_t row) const {
        int64_t low = 0, high = sequences.count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (sequences.start(middle) < row)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
    static void run(void* context, int thread) {
        PoolingBlocks& self = *static_cast<PoolingBlocks*>(context);
        for (;;) {
            const int64_t block = __atomic_fetch_add(&self.next, 1, __ATOMIC_RELAXED);
            if (block >= self.blocks) return;
            const int64_t first = self.first_from(block * self.rows);
            const bool last = block + 1 == self.blocks;
            const int64_t end =
                last ? self.sequences.count : self.first_from((block + 1) * self.rows);
            for (int64_t i = first; i < end; ++i) self.work(i, thread);
        }
    }
};

template <class Work>
static inline void each_sequence(const aam::Sequences& sequences, int64_t dim, int threads,
                                 const Work& work) {
    if (sequences.count == 0) return;
    const int64_t rows = most(1, POOLING_ELEMENTS / most(1, dim));
    const int64_t count = sequences.start(sequences.count) / rows + 1;
    PoolingBlocks<Work> blocks{sequences, work, rows, count, 0};
    aam::in_parallel(static_cast<int>(least(threads, count)), PoolingBlocks<Work>::run, &blocks);
}

struct Scores {
    const float* data;
    int64_t row;

    // `count` (to WIDTH) scores from `first`; `rest` in the other lanes.
    Floats read(int64_t first, int64_t count, float rest) const {
        if (row == 1 && count == WIDTH) return load(data + first);
        float x[WIDTH];
        for (int i = 0; i < WIDTH; ++i) x[i] = i < count ? data[(first + i) * row] : rest;
        return load(x);
    }
    float largest(int64_t length) const {
        Floats peak = all(-INFINITY);
        for (int64_t i = 0; i < length; i += WIDTH)
            peak = larger(read(i, least(WIDTH, length - i), -INFINITY), peak);
        return largest_of(peak);
    }
    // weights[i] = exp(score - peak) for `count` scores from `first`, padded with zeros to WIDTH
    // where `padded`; gives their sum.
    Floats weigh(int64_t first, int64_t count, float peak, float* weights, bool padded) const {
        Floats sum{};
        for (int64_t i = 0; i < count; i += WIDTH) {
            const int64_t part = least(WIDTH, count - i);
            const Floats x = exp2_of((read(first + i, part, -INFINITY) - peak) * LOG2_E);
            sum += x;
            if (padded || part == WIDTH)
                store(weights + i, x);
            else
                store_part(weights + i, x, part);
        }
        return sum;
    }
};

// sums (+)= sum over ROWS rows of weights[row] values(row, ...): the rows side by side, so that
// memory is read in the order in which it lies. `sums` has one vector more than the whole ones of
// a row: the last columns of a row that is no multiple of WIDTH are its last WIDTH, some again.
template <int ROWS>
static inline void add_rows(const float* values, int64_t values_row, const float* weights,
                            int64_t dim, float* sums, bool first) {
    const auto add = [&](int64_t column, float* to, auto read) {
        Floats sum = weights[0] * read(values + column);
        for (int r = 1; r < ROWS; ++r) sum += weights[r] * read(values + r * values_row + column);
        store(to, first ? sum : load(to) + sum);
    };
    const auto whole = [](const float* from) { return load(from); };
    if (dim < WIDTH) {
        add(0, sums, [&](const float* from) { return load_part(from, dim); });
        return;
    }
    int64_t column = 0;
    for (; column + WIDTH <= dim; column += WIDTH) {
        if (ROWS > 1 && column % 16 == 0)  // a line of the cache
            for (int r = 0; r < ROWS; ++r)
                __builtin_prefetch(values + (r + PREFETCHED_ROWS) * values_row + column);
        add(column, sums + column, whole);
    }
    if (column < dim) add(dim - WIDTH, sums + column, whole);
}

static inline void add_rows(const float* values, int64_t values_row, const float* weights,
                            int64_t rows, int64_t dim, float* sums, bool first) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8)
        add_rows<8>(values + row * values_row, values_row, weights + row, dim, sums,
                    first && row == 0);
    for (; row < rows; ++row)
        add_rows<1>(values + row * values_row, values_row, weights + row, dim, sums,
                    first && row == 0);
}

static void pool_sequence(const aam::PoolingForward& call, int64_t i, float* sums) {
    const int64_t start = call.sequences.start(i), length = call.sequences.length(i);
    float* pooled = call.pooled + i * call.dim;
    if (length == 0) {
        call.lse[i] = -INFINITY;
        memset(pooled, 0, static_cast<size_t>(call.dim) * sizeof(float));
        return;
    }
    const float* values = call.values + start * call.values_row;
    const Scores scores{call.scores + start * call.scores_row, call.scores_row};
    const float peak = scores.largest(length);
    Floats total{};
    for (int64_t row = 0; row < length; row += POOLING_ROWS) {
        alignas(64) float weights[POOLING_ROWS];
        const int64_t rows = least(POOLING_ROWS, length - row);
        total += scores.weigh(row, rows, peak, weights, true);
        add_rows(values + row * call.values_row, call.values_row, weights, rows, call.dim, sums,
                 row == 0);
    }
    const float sum = sum_of(total);
    call.lse[i] = peak + logf(sum);
    const float factor = 1.0f / sum;
    if (call.dim < WIDTH) {
        store_part(pooled, load(sums) * factor, call.dim);
        return;
    }
    int64_t column = 0;
    for (; column + WIDTH <= call.dim; column += WIDTH)
        store(pooled + column, load(sums + column) * factor);
    if (column < call.dim) store(pooled + call.dim - WIDTH, load(sums + column) * factor);
}

static void pooling_forward(const aam::PoolingForward& call) {
    const int64_t size = rounded_up(call.dim, WIDTH);
    const aam::Scratch scratch(size * call.threads);
    float* sums = scratch.data();
    each_sequence(call.sequences, call.dim, call.threads,
                  [&](int64_t i, int thread) { pool_sequence(call, i, sums + thread * size); });
}

// The last WIDTH (or all, where there are fewer) of a row's columns, for products: those that the
// whole vectors before them hold already are 0.
AAM_INLINE Floats last_columns(const float* row, int64_t dim) {
    if (dim < WIDTH) return load_part(row, dim);
    const int32_t again = static_cast<int32_t>(WIDTH - dim % WIDTH);
    return select(lane_numbers() < again, Floats{}, load(row + dim - WIDTH));
}

// Dot products of ROWS rows with `grad`, whose last columns are `last`.
template <int ROWS>
static inline void dot_rows(const float* values, int64_t values_row, const float* grad,
                            Floats last, int64_t dim, float* products) {
    Floats even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = Floats{};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= dim; i += 2 * WIDTH) {
        const Floats a = load(grad + i), b = load(grad + i + WIDTH);
        for (int r = 0; r < ROWS; ++r) {
            even[r] += a * load(values + r * values_row + i);
            odd[r] += b * load(values + r * values_row + i + WIDTH);
        }
    }
    if (i + WIDTH <= dim) {
        const Floats a = load(grad + i);
        for (int r = 0; r < ROWS; ++r) even[r] += a * load(values + r * values_row + i);
        i += WIDTH;
    }
    if (i < dim)
        for (int r = 0; r < ROWS; ++r) {
            const float* row = values + r * values_row;
            odd[r] += last * (dim < WIDTH ? load_part(row, dim) : load(row + dim - WIDTH));
        }
    for (int r = 0; r < ROWS; ++r) products[r] = sum_of(even[r] + odd[r]);
}

static inline void scaled_row(const float* grad, float weight, int64_t dim, float* out) {
    if (dim < WIDTH) {
        store_part(out, load_part(grad, dim) * weight, dim);
        return;
    }
    int64_t i = 0;
    for (; i + WIDTH <= dim; i += WIDTH) store(out + i, load(grad + i) * weight);
    if (i < dim) store(out + dim - WIDTH, load(grad + dim - WIDTH) * weight);
}

static void pool_sequence_backward(const aam::PoolingBackward& call, int64_t i) {
    const int64_t start = call.sequences.start(i), length = call.sequences.length(i);
    if (length == 0) return;
    const float* grad = call.grad_pooled + i * call.dim;
    const float* values = call.values + start * call.values_row;
    float* grad_scores = call.grad_scores + start;
    float* grad_values = call.grad_values + start * call.dim;
    const Scores scores{call.scores + start * call.scores_row, call.scores_row};

    const float peak = scores.largest(length);
    const Floats total = scores.weigh(0, length, peak, grad_scores, false);
    const float factor = 1.0f / sum_of(total);
    const Floats last = last_columns(grad, call.dim);
    float delta;
    dot_rows<1>(call.pooled + i * call.dim, call.dim, grad, last, call.dim, &delta);

    const auto rows = [&]<int ROWS>(int64_t row) {
        float products[ROWS];
        dot_rows<ROWS>(values + row * call.values_row, call.values_row, grad, last, call.dim,
                       products);
        for (int r = 0; r < ROWS; ++r) {
            const float weight = grad_scores[row + r] * factor;
            grad_scores[row + r] = weight * (products[r] - delta);
            scaled_row(grad, weight, call.dim, grad_values + (row + r) * call.dim);
        }
    };
    int64_t row = 0;
    for (; row + 4 <= length; row += 4) rows.template operator()<4>(row);
    for (; row < length; ++row) rows.template operator()<1>(row);
}

static void pooling_backward(const aam::PoolingBackward& call) {
    each_sequence(call.sequences, call.dim, call.threads,
                  [&](int64_t i, int) { pool_sequence_backward(call, i); });
}

}  // namespace
