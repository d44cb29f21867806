// Matrix products of a tile of rows that stays in cache, with sums held in registers.
//
// A block of up to six rows times a panel of PANEL columns is summed over the whole depth in
// registers; what happens to the finished sums (bias, dropout, residual, ...) is a function given
// by the caller, so that no intermediate result goes through memory. Every element is summed in
// the order of the depth, whatever the tile: results do not depend on how rows are cut.

#pragma once

#include "vectors.hpp"

namespace {

// Rows of a matrix: element (i, j) at data[i * row + j * step]. step != 1 reads a transpose.
struct Matrix {
    const float* data;
    int64_t row;
    int64_t step = 1;
};

// A matrix (depth, columns) cut into panels of PANEL columns, each (depth, width) with its width
// rounded up to WIDTH (zeros): panel p starts at data + p * PANEL * depth.
struct Panels {
    const float* data;
    int64_t depth;
    int64_t columns;
};

constexpr int64_t packed_size(int64_t depth, int64_t columns) {
    return depth * rounded_up(columns, WIDTH);
}

// Packs element (k, j) = from.data[k * from.row + j * from.step] for the panels [first, last).
static inline void pack(const Matrix& from, int64_t depth, int64_t columns, float* to,
                        int64_t first_panel, int64_t last_panel) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t start = panel * PANEL;
        const int64_t real = least(PANEL, columns - start);
        const int64_t width = rounded_up(real, WIDTH);
        float* out = to + start * depth;
        if (from.step == 1) {
            for (int64_t k = 0; k < depth; ++k) {
                const float* row = from.data + k * from.row + start;
                for (int64_t j = 0; j < real; ++j) out[k * width + j] = row[j];
                for (int64_t j = real; j < width; ++j) out[k * width + j] = 0.0f;
            }
            continue;
        }
        constexpr int64_t DEPTHS = 16;  // a cache line of every column at a time
        for (int64_t k0 = 0; k0 < depth; k0 += DEPTHS) {
            const int64_t end = least(depth, k0 + DEPTHS);
            for (int64_t j = 0; j < width; ++j) {
                const float* column = from.data + (start + j) * from.step;
                for (int64_t k = k0; k < end; ++k)
                    out[k * width + j] = j < real ? column[k * from.row] : 0.0f;
            }
        }
    }
}

constexpr int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// sums[r][v] += sum over k < depth of a(r, k) b(k, v * WIDTH ...)
template <int ROWS, int VECTORS>
AAM_INLINE void multiply(const Matrix& a, const float* b, int64_t b_row, int64_t depth,
                         Floats (&sums)[ROWS][VECTORS]) {
    const float* left = a.data;
    for (int64_t k = 0; k < depth; ++k) {
        Floats right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + v * WIDTH);
        for (int r = 0; r < ROWS; ++r) {
            const Floats x = all(left[r * a.row]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += x * right[v];
        }
        left += a.step;
        b += b_row;
    }
}

// One block: starts from what `start` gives, ends in what `finish` does.
template <int ROWS, int VECTORS, class Finish>
static inline __attribute__((noinline)) void product_block(
    const Matrix& a, const float* b, int64_t b_row, int64_t depth, int64_t row, int64_t column,
    const Finish& finish) {
    Floats sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Floats{};
    multiply<ROWS, VECTORS>({a.data + row * a.row, a.row, a.step}, b, b_row, depth, sums);
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) finish(row + r, column + v * WIDTH, sums[r][v]);
}

template <int VECTORS, class Finish>
static inline void product_rows(const Matrix& a, int64_t rows, const float* b, int64_t b_row,
                                int64_t depth, int64_t column, const Finish& finish) {
    // Blocks as equal as can be: six rows and one row would run at a fourth of the speed of 4 + 3.
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t row = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t count = (rows - row + blocks - block - 1) / (blocks - block);
        switch (count) {
#define AAM_ROWS(R) \
    case R: product_block<R, VECTORS>(a, b, b_row, depth, row, column, finish); break;
            AAM_ROWS(1) AAM_ROWS(2) AAM_ROWS(3) AAM_ROWS(4) AAM_ROWS(5)
            default: product_block<BLOCK_ROWS, VECTORS>(a, b, b_row, depth, row, column, finish);
#undef AAM_ROWS
        }
        row += count;
    }
}

// finish(row, column, sums) for every row and every WIDTH columns of a (rows, depth) times b.
template <class Finish>
static inline void product(const Matrix& a, int64_t rows, const Panels& b, const Finish& finish) {
    for (int64_t column = 0; column < b.columns; column += PANEL) {
        const float* panel = b.data + column * b.depth;
        const int64_t width = rounded_up(least(PANEL, b.columns - column), WIDTH);
        switch (width / WIDTH) {
#define AAM_VECTORS(V) \
    case V: product_rows<V>(a, rows, panel, width, b.depth, column, finish); break;
#if AAM_PANEL_VECTORS == 4
            AAM_VECTORS(1) AAM_VECTORS(2) AAM_VECTORS(3)
#else
            AAM_VECTORS(1)
#endif
            default:
                product_rows<PANEL_VECTORS>(a, rows, panel, width, b.depth, column, finish);
#undef AAM_VECTORS
        }
    }
}

}  // namespace
