// What the kernels are made of, as plain functions over arrays: one table a variant.

#pragma once

#include <stdint.h>

#include "interface.hpp"

namespace aam {

struct Inside {
    int width, panel, block_rows;

    // Over n elements, a multiple of the width.
    void (*exp2_of)(const float* x, float* y, int64_t n);
    void (*gelu)(const float* x, float* y, int64_t n);
    void (*gelu_and_slope)(const float* x, float* value, float* slope, int64_t n);
    void (*larger)(const float* x, const float* than, float* y, int64_t n);
    void (*smaller)(const float* x, const float* than, float* y, int64_t n);
    void (*absolute)(const float* x, float* y, int64_t n);

    // Of one vector; the parts touch `count` elements of memory.
    float (*sum_of)(const float* x);
    float (*largest_of)(const float* x);
    void (*copy_part)(const float* from, float* to, int64_t count);
    void (*load_part)(const float* from, int64_t count, float* whole);

    // x where kept, else 0; columns a multiple of the width.
    void (*keep)(const Dropout& dropout, uint32_t row, uint32_t head, const float* x, float* y,
                 int64_t columns);

    int64_t (*packed_size)(int64_t depth, int64_t columns);
    void (*pack)(const float* from, int64_t row, int64_t step, int64_t depth, int64_t columns,
                 float* to, int64_t first_panel, int64_t last_panel);
    // c (rows, columns rounded up to the width) = a times the packed panels.
    void (*product)(const float* a, int64_t a_row, int64_t a_step, int64_t rows,
                    const float* panels, int64_t depth, int64_t columns, float* c, int64_t c_row);
    // c += a times b as it lies in memory.
    void (*add_product)(const float* a, int64_t a_row, int64_t a_step, int64_t rows,
                        const float* b, int64_t b_row, int64_t depth, int64_t columns, float* c,
                        int64_t c_row);
};

}  // namespace aam
