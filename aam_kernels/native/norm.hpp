// Layer norm of rows, and its derivative.

#pragma once

#include <math.h>

#include "functions.hpp"
#include "products.hpp"

namespace {

constexpr float NORM_EPS = 1e-5f;
// Rows that are summed by themselves, because errors grow with the length of a sum (of 5,000 rows
// from 12 times a pairwise sum's to twice).
constexpr int64_t SUMMED_ROWS = 64;

struct RowStatistics {
    float mean, rstd;
};

// dim is a multiple of WIDTH in this file. Two sums at a time, or each addition waits for the last.
static inline RowStatistics row_statistics(const float* x, int64_t dim) {
    Floats even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= dim; i += 2 * WIDTH) {
        even += load(x + i);
        odd += load(x + i + WIDTH);
    }
    if (i < dim) even += load(x + i);
    const float mean = sum_of(even + odd) / static_cast<float>(dim);
    even = odd = Floats{};
    for (i = 0; i + 2 * WIDTH <= dim; i += 2 * WIDTH) {
        const Floats a = load(x + i) - mean, b = load(x + i + WIDTH) - mean;
        even += a * a;
        odd += b * b;
    }
    if (i < dim) {
        const Floats a = load(x + i) - mean;
        even += a * a;
    }
    const float variance = sum_of(even + odd) / static_cast<float>(dim);
    return {mean, 1.0f / sqrtf(variance + NORM_EPS)};
}

// out = (x - mean) rstd weight + bias, row by row.
static void norm_rows(Matrix x, int64_t rows, int64_t dim, const float* weight, const float* bias,
                      float* out, int64_t out_row) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x.data + row * x.row;
        float* to = out + row * out_row;
        const RowStatistics statistics = row_statistics(from, dim);
        for (int64_t i = 0; i < dim; i += WIDTH) {
            const Floats normed = (load(from + i) - statistics.mean) * statistics.rstd;
            store(to + i, normed * load(weight + i) + load(bias + i));
        }
    }
}

// The derivative: out = more + d norm(x) / d x applied to grad. Adds to the gradients of weight
// and bias. `out` may be `grad` or `more`.
static void norm_backward_rows(Matrix grad, Matrix x, Matrix more, int64_t rows, int64_t dim,
                               const float* weight, float* out, int64_t out_row,
                               float* grad_weight, float* grad_bias) {
    for (int64_t first = 0; first < rows; first += SUMMED_ROWS) {
        const int64_t count = least(SUMMED_ROWS, rows - first);
        RowStatistics statistics[SUMMED_ROWS];
        for (int64_t r = 0; r < count; ++r)
            statistics[r] = row_statistics(x.data + (first + r) * x.row, dim);
        for (int64_t i = 0; i < dim; i += WIDTH) {
            Floats weights{}, biases{};
            for (int64_t r = 0; r < count; ++r) {
                const Floats from = load(x.data + (first + r) * x.row + i);
                const Floats g = load(grad.data + (first + r) * grad.row + i);
                weights += g * ((from - statistics[r].mean) * statistics[r].rstd);
                biases += g;
            }
            store(grad_weight + i, load(grad_weight + i) + weights);
            store(grad_bias + i, load(grad_bias + i) + biases);
        }
        for (int64_t r = 0; r < count; ++r) {
            const float* g = grad.data + (first + r) * grad.row;
            const float* from = x.data + (first + r) * x.row;
            const float* other = more.data + (first + r) * more.row;
            float* to = out + (first + r) * out_row;
            const auto [mean, rstd] = statistics[r];
            Floats sum{}, projection{};
            for (int64_t i = 0; i < dim; i += WIDTH) {
                const Floats scaled = load(g + i) * load(weight + i);
                sum += scaled;
                projection += scaled * ((load(from + i) - mean) * rstd);
            }
            const float mean_sum = sum_of(sum) / static_cast<float>(dim);
            const float mean_projection = sum_of(projection) / static_cast<float>(dim);
            for (int64_t i = 0; i < dim; i += WIDTH) {
                const Floats normed = (load(from + i) - mean) * rstd;
                const Floats scaled = load(g + i) * load(weight + i);
                const Floats inner = (scaled - mean_sum) - normed * mean_projection;
                store(to + i, inner * rstd + load(other + i));
            }
        }
    }
}

// sums[j] += sum over rows of x(row, j)
static void add_columns(Matrix x, int64_t rows, int64_t columns, float* sums) {
    for (int64_t first = 0; first < rows; first += SUMMED_ROWS) {
        const int64_t last = least(rows, first + SUMMED_ROWS);
        for (int64_t j = 0; j < columns; j += WIDTH) {
            Floats even{}, odd{};
            int64_t row = first;
            for (; row + 2 <= last; row += 2) {
                even += load(x.data + row * x.row + j);
                odd += load(x.data + (row + 1) * x.row + j);
            }
            if (row < last) even += load(x.data + row * x.row + j);
            store(sums + j, load(sums + j) + (even + odd));
        }
    }
}

}  // namespace
