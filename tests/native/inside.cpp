// Compiled as variant.cpp is, once a variant: AAM_INSIDE names the table.

#include "inside.hpp"

#include "functions.hpp"
#include "products.hpp"

namespace {

template <class Function>
static void each(const float* x, float* y, int64_t n, const Function& function) {
    for (int64_t i = 0; i < n; i += WIDTH) store(y + i, function(load(x + i)));
}

static void each_exp2(const float* x, float* y, int64_t n) {
    each(x, y, n, [](Floats v) { return exp2_of(v); });
}
static void each_gelu(const float* x, float* y, int64_t n) {
    each(x, y, n, [](Floats v) { return gelu(v); });
}
static void each_gelu_and_slope(const float* x, float* value, float* slope, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        Floats v, s;
        gelu_and_slope(load(x + i), v, s);
        store(value + i, v);
        store(slope + i, s);
    }
}
static void each_larger(const float* x, const float* than, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) store(y + i, larger(load(x + i), load(than + i)));
}
static void each_smaller(const float* x, const float* than, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) store(y + i, smaller(load(x + i), load(than + i)));
}
static void each_absolute(const float* x, float* y, int64_t n) {
    each(x, y, n, [](Floats v) { return absolute(v); });
}

static float one_sum(const float* x) { return sum_of(load(x)); }
static float one_largest(const float* x) { return largest_of(load(x)); }
static void copy_part(const float* from, float* to, int64_t count) {
    store_part(to, load_part(from, count), count);
}
static void load_whole(const float* from, int64_t count, float* whole) {
    store(whole, load_part(from, count));
}

static void keep_row(const Dropout& dropout, uint32_t row, uint32_t head, const float* x, float* y,
                     int64_t columns) {
    const int32_t factor = row_factor(dropout, row, head);
    for (int64_t j = 0; j < columns; j += WIDTH) {
        Ints factors;
        for (int i = 0; i < WIDTH; ++i) factors[i] = column_factor(static_cast<uint32_t>(j + i));
        store(y + j, keep(dropout, factor, factors, load(x + j)));
    }
}

static int64_t size_of_panels(int64_t depth, int64_t columns) {
    return packed_size(depth, columns);
}
static void pack_panels(const float* from, int64_t row, int64_t step, int64_t depth,
                        int64_t columns, float* to, int64_t first_panel, int64_t last_panel) {
    pack({from, row, step}, depth, columns, to, first_panel, last_panel);
}
static void store_product(const float* a, int64_t a_row, int64_t a_step, int64_t rows,
                          const float* panels, int64_t depth, int64_t columns, float* c,
                          int64_t c_row) {
    product({a, a_row, a_step}, rows, {panels, depth, columns},
            [&](int64_t row, int64_t column, Floats sum) { store(c + row * c_row + column, sum); });
}
static void sum_product(const float* a, int64_t a_row, int64_t a_step, int64_t rows,
                        const float* b, int64_t b_row, int64_t depth, int64_t columns, float* c,
                        int64_t c_row) {
    add_product({a, a_row, a_step}, rows, b, b_row, depth, columns, c, c_row);
}

}  // namespace

namespace aam {

extern const Inside AAM_INSIDE;
const Inside AAM_INSIDE = {
    WIDTH,          PANEL,         BLOCK_ROWS,  each_exp2,   each_gelu,    each_gelu_and_slope,
    each_larger,    each_smaller,  each_absolute, one_sum,   one_largest,  copy_part,
    load_whole,     keep_row,      size_of_panels, pack_panels, store_product, sum_product,
};

}  // namespace aam
