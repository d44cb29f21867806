// Packing and products: every number of rows, every tail of columns, transposes, deep sums.

#include <cmath>

#include "check.hpp"
#include "references.hpp"
#include "variants.hpp"

namespace {

using check::Floats;

Floats random_floats(int64_t count, check::Random& random) {
    Floats x(count);
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(random.normal());
    return x;
}

// Element (i, j) of a matrix that may lie transposed in memory.
struct Stored {
    Floats data;
    int64_t row, step;

    Stored(int64_t rows, int64_t columns, bool transposed, check::Random& random)
        : data(rows * columns), row(transposed ? 1 : columns), step(transposed ? rows : 1) {
        for (int64_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(random.normal());
    }
    double operator()(int64_t i, int64_t j) const { return data[i * row + j * step]; }
};

void bound(const check::Error& error, int64_t depth) {
    const bool deep = depth > 1000;
    BOUND(deep ? "product, deep" : "product", error.relative(), 1e-6);
}

int64_t rounded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A product by packed panels, and that it touches no more than it may.
void packed(const Variant& variant, int64_t rows, int64_t depth, int64_t columns, bool transposed,
            check::Random& random) {
    const aam::Inside& inside = *variant.inside;
    check::at("product, %s, %lld rows, depth %lld, %lld columns, %s", variant.kernels->name,
              static_cast<long long>(rows), static_cast<long long>(depth),
              static_cast<long long>(columns), transposed ? "transposed" : "as it lies");
    const Stored a(rows, depth, transposed, random), b(depth, columns, !transposed, random);
    const Floats panels(inside.packed_size(depth, columns));
    const int64_t count = (columns + inside.panel - 1) / inside.panel;
    for (int64_t panel = 0; panel < count; ++panel)  // in any pieces
        inside.pack(b.data.data(), b.row, b.step, depth, columns, panels.data(), panel, panel + 1);
    for (int64_t i = 0; i < panels.size(); ++i)
        if (check::is_untouched(panels[i]))
            return FAIL("element %d not packed", static_cast<int>(i));
    const int64_t row = rounded(columns, inside.width) + 3;
    const Floats c(rows * row - 3);
    inside.product(a.data.data(), a.row, a.step, rows, panels.data(), depth, columns, c.data(),
                   row);
    check::Error error;
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < row && i * row + j < c.size(); ++j) {
            double sum = 0;
            for (int64_t k = 0; j < columns && k < depth; ++k) sum += a(i, k) * b(k, j);
            if (j < rounded(columns, inside.width)) {
                error.add(c[i * row + j], sum);  // 0 where the panel was filled up
            } else if (!check::is_untouched(c[i * row + j])) {
                FAIL("written beside the result");
            }
        }
    }
    bound(error, depth);
    CHECK(panels.guards_intact() && c.guards_intact());
}

// c += a times b as it lies in memory.
void added(const Variant& variant, int64_t rows, int64_t depth, int64_t columns, bool transposed,
           check::Random& random) {
    const aam::Inside& inside = *variant.inside;
    check::at("add_product, %s, %lld rows, depth %lld, %lld columns", variant.kernels->name,
              static_cast<long long>(rows), static_cast<long long>(depth),
              static_cast<long long>(columns));
    const int64_t readable = rounded(columns, inside.width), row = readable + 1;
    const Stored a(rows, depth, transposed, random);
    const Floats b = random_floats(depth * row, random), c = random_floats(rows * row, random);
    std::vector<double> expected(static_cast<size_t>(rows * row));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < row; ++j) {
            double sum = c[i * row + j];
            for (int64_t k = 0; j < readable && k < depth; ++k) sum += a(i, k) * b[k * row + j];
            expected[i * row + j] = sum;
        }
    inside.add_product(a.data.data(), a.row, a.step, rows, b.data(), row, depth, columns, c.data(),
                       row);
    check::Error error;
    for (int64_t i = 0; i < c.size(); ++i) error.add(c[i], expected[i]);
    bound(error, depth);
    for (int64_t i = 0; i < rows; ++i) CHECK(c[i * row + readable] == expected[i * row + readable]);
    CHECK(b.guards_intact() && c.guards_intact());
}

// A row's result does not depend on the rows that it is computed with.
void same_whatever_the_rows(const Variant& variant, int64_t depth, check::Random& random) {
    const aam::Inside& inside = *variant.inside;
    check::at("product row by row, %s, depth %lld", variant.kernels->name,
              static_cast<long long>(depth));
    const int64_t columns = inside.panel + 2 * inside.width, rows = 61;
    const Floats a = random_floats(rows * depth, random);
    const Floats b = random_floats(depth * columns, random);
    const Floats panels(inside.packed_size(depth, columns)), c(rows * columns), one(columns);
    inside.pack(b.data(), columns, 1, depth, columns, panels.data(), 0,
                (columns + inside.panel - 1) / inside.panel);
    inside.product(a.data(), depth, 1, rows, panels.data(), depth, columns, c.data(), columns);
    for (int64_t i = 0; i < rows; ++i) {
        inside.product(&a[i * depth], depth, 1, 1, panels.data(), depth, columns, one.data(),
                       columns);
        if (memcmp(one.data(), &c[i * columns], static_cast<size_t>(columns) * 4) != 0)
            return FAIL("row %d differs from itself alone", static_cast<int>(i));
    }
}

}  // namespace

void test_products() {
    check::Random random(3);
    for (const Variant& variant : variants()) {
        const int64_t width = variant.inside->width, panel = variant.inside->panel;
        for (int64_t rows = 1; rows <= 13; ++rows)
            for (int64_t vectors = 1; vectors <= panel / width; ++vectors)
                packed(variant, rows, 1 + (rows * 7 + vectors) % 37, vectors * width, rows % 2,
                       random);
        for (int64_t panels = 0; panels <= 3; ++panels)
            for (const int64_t extra : {int64_t{1}, width - 1, width, width + 1, panel - 1}) {
                const int64_t columns = panels * panel + extra;
                packed(variant, 1 + (panels * 5 + extra) % 13, 17, columns, extra % 2, random);
                added(variant, 1 + (panels * 3 + extra) % 13, 19, columns, extra % 2, random);
            }
        for (const int64_t depth : {1, 2, 16, 33, 127, 128, 129, 151, 257, 1025, 2049})
            for (const bool transposed : {false, true}) {
                const int64_t rows = depth == 257 ? 100 : 7;  // over what goes together
                packed(variant, rows, depth, panel + width + 1, transposed, random);
                added(variant, rows, depth, width + 1, transposed, random);
            }
        for (const int64_t depth : {33, 2500}) same_whatever_the_rows(variant, depth, random);
    }
}
