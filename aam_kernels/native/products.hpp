// Matrix products of a tile of rows that stays in cache, with sums held in registers.
//
// A block of up to six rows times a panel of PANEL columns is summed over the whole depth in
// registers; what happens to the finished sums (bias, dropout, residual, ...) is a function given
// by the caller, so that no intermediate result goes through memory. The order in which an element
// is summed depends on the depth alone: results do not depend on how rows are cut.

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
    // Told that the loop runs, the compiler keeps no sums in memory for the case that it doesn't.
    if (depth < 1) __builtin_unreachable();
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

// One block of rows and one panel.
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

// Rows [row, end) in blocks as equal as can be: six rows and one would run at a fourth of the
// speed of four and three.
template <int VECTORS, class Finish>
static inline void product_rows(const Matrix& a, int64_t row, int64_t end, const float* b,
                                int64_t b_row, int64_t depth, int64_t column,
                                const Finish& finish) {
    for (int64_t blocks = (end - row + BLOCK_ROWS - 1) / BLOCK_ROWS; blocks > 0; --blocks) {
        const int64_t count = (end - row + blocks - 1) / blocks;
        switch (count) {
#define AAM_ROWS(R) \
    case R: \
        product_block<R, VECTORS>(a, b, b_row, depth, row, column, finish); \
        break;
            AAM_ROWS(1)
            AAM_ROWS(2)
            AAM_ROWS(3)
            AAM_ROWS(4)
            AAM_ROWS(5)
#undef AAM_ROWS
            default:
                product_block<BLOCK_ROWS, VECTORS>(a, b, b_row, depth, row, column, finish);
        }
        row += count;
    }
}

// A sum of many terms is made of sums of this many: its error grows with the root of a part and
// not of the whole. A part of a panel also fits a core's L1, and so do the sums that wait for the
// next part, of as many rows as go together.
constexpr int64_t DEPTH_PART = 128;
constexpr int64_t ROWS_OF_PARTS = 48;

template <int VECTORS, class Finish>
static inline void product_panel(const Matrix& a, int64_t rows, const float* b, int64_t b_row,
                                 int64_t depth, int64_t column, const Finish& finish) {
    if (depth < 2 * DEPTH_PART) {
        product_rows<VECTORS>(a, 0, rows, b, b_row, depth, column, finish);
        return;
    }
    alignas(64) float waiting[ROWS_OF_PARTS * PANEL];
    for (int64_t first = 0; first < rows; first += ROWS_OF_PARTS) {
        const int64_t end = least(rows, first + ROWS_OF_PARTS);
        const auto wait = [&](int64_t row, int64_t at, Floats sum) {
            store(waiting + (row - first) * PANEL + at - column, sum);
        };
        const auto add = [&](int64_t row, int64_t at, Floats sum) {
            float* place = waiting + (row - first) * PANEL + at - column;
            store(place, load(place) + sum);
        };
        product_rows<VECTORS>(a, first, end, b, b_row, DEPTH_PART, column, wait);
        int64_t part = DEPTH_PART;
        for (; part + 2 * DEPTH_PART <= depth; part += DEPTH_PART)
            product_rows<VECTORS>({a.data + part * a.step, a.row, a.step}, first, end,
                                  b + part * b_row, b_row, DEPTH_PART, column, add);
        const auto last = [&](int64_t row, int64_t at, Floats sum) {
            finish(row, at, load(waiting + (row - first) * PANEL + at - column) + sum);
        };
        product_rows<VECTORS>({a.data + part * a.step, a.row, a.step}, first, end,
                              b + part * b_row, b_row, depth - part, column, last);
    }
}

template <class Finish>
static inline void product_any_panel(const Matrix& a, int64_t rows, const float* b, int64_t b_row,
                                     int64_t depth, int64_t column, int64_t width,
                                     const Finish& finish) {
    switch (width / WIDTH) {
#if AAM_PANEL_VECTORS == 4
        case 2:
            product_panel<2>(a, rows, b, b_row, depth, column, finish);
            break;
        case 3:
            product_panel<3>(a, rows, b, b_row, depth, column, finish);
            break;
#endif
        case 1:
            product_panel<1>(a, rows, b, b_row, depth, column, finish);
            break;
        default:
            product_panel<PANEL_VECTORS>(a, rows, b, b_row, depth, column, finish);
    }
}

// finish(row, column, sums) for every row and every WIDTH columns of a (rows, depth) times b.
template <class Finish>
static inline void product(const Matrix& a, int64_t rows, const Panels& b, const Finish& finish) {
    for (int64_t column = 0; column < b.columns; column += PANEL) {
        const int64_t width = rounded_up(least(PANEL, b.columns - column), WIDTH);
        product_any_panel(a, rows, b.data + column * b.depth, width, b.depth, column, width,
                          finish);
    }
}

// c (rows, columns) += a times b, with a and b as they lie in memory: b's rows are dense and
// readable to the next multiple of WIDTH columns, and c is written that far.
static inline void add_product(const Matrix& a, int64_t rows, const float* b, int64_t b_row,
                               int64_t depth, int64_t columns, float* c, int64_t c_row) {
    const auto add = [&](int64_t row, int64_t column, Floats sum) {
        float* place = c + row * c_row + column;
        store(place, load(place) + sum);
    };
    for (int64_t column = 0; column < columns; column += PANEL) {
        const int64_t width = rounded_up(least(PANEL, columns - column), WIDTH);
        product_any_panel(a, rows, b + column, b_row, depth, column, width, add);
    }
}

}  // namespace
