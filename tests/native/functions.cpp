// The functions of one vector: exp2, the normal distribution, GELU, reductions, dropout's hash.

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.hpp"
#include "references.hpp"
#include "variants.hpp"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t POINTS = 1 << 17;  // of a range; a multiple of every width

// The distance of neighbouring floats at x.
double spacing(double x) {
    const float at = static_cast<float>(std::fabs(x));
    return static_cast<double>(std::nextafter(at, INF)) - at;
}

std::vector<float> range(double from, double to) {
    std::vector<float> x(POINTS);
    for (int64_t i = 0; i < POINTS; ++i)
        x[i] = static_cast<float>(from + (to - from) * static_cast<double>(i) / (POINTS - 1));
    return x;
}

float one(void (*function)(const float*, float*, int64_t), float x) {
    float in[64], out[64];
    std::fill_n(in, 64, x);
    function(in, out, 64);
    for (int i = 1; i < 64; ++i)
        if (memcmp(&out[i], &out[0], 4) != 0) FAIL("elements of equal vectors differ at %g", x);
    return out[0];
}

void exponentials(const aam::Inside& inside) {
    std::vector<float> y(POINTS);
    for (const double from : {-126.0, -30.0, -1.0, 0.0, 126.0}) {
        const std::vector<float> x = range(from, from + (from == -126.0 ? 96.0 : 1.0));
        inside.exp2_of(x.data(), y.data(), POINTS);
        double worst = 0;
        for (int64_t i = 0; i < POINTS; ++i) {
            const double exact = std::exp2(static_cast<double>(x[i]));
            const double error = std::fabs(y[i] - exact) / spacing(exact);
            if (!(error <= worst)) worst = error;
        }
        BOUND("exp2, ulp", worst, 1.5);
    }
    CHECK(one(inside.exp2_of, 0.0f) == 1.0f);
    for (int power = -126; power <= 127; ++power)
        CHECK(one(inside.exp2_of, static_cast<float>(power)) == std::ldexp(1.0f, power));
    for (const float x : {std::nextafter(-126.0f, -INF), -127.0f, -149.0f, -1e6f, -3e38f, -INF})
        CHECK(one(inside.exp2_of, x) >= 0.0f && one(inside.exp2_of, x) <= 0x1p-126f);
    CHECK(one(inside.exp2_of, 1e-42f) == 1.0f && one(inside.exp2_of, -1e-42f) == 1.0f);
    CHECK(std::isnan(one(inside.exp2_of, NOT_A_NUMBER)));
}

void gelus(const aam::Inside& inside) {
    std::vector<float> value(POINTS), again(POINTS), slope(POINTS);
    for (const double most : {0.01, 1.0, 7.0, 100.0}) {
        const std::vector<float> x = range(-most, most);
        inside.gelu(x.data(), value.data(), POINTS);
        inside.gelu_and_slope(x.data(), again.data(), slope.data(), POINTS);
        double errors[2] = {};
        for (int64_t i = 0; i < POINTS; ++i) {
            const double at = x[i];
            const double found[2] = {
                std::fabs(value[i] - reference::gelu(at)) / std::max(1.0, at),
                std::fabs(slope[i] - reference::gelu_slope(at)),
            };
            for (int k = 0; k < 2; ++k)
                if (!(found[k] <= errors[k])) errors[k] = found[k];
            if (value[i] != again[i]) FAIL("gelu differs beside its slope at %g", at);
        }
        BOUND("gelu, share of max(1, x)", errors[0], 1.2e-7);
        BOUND("gelu slope, absolute", errors[1], 2.5e-7);
    }
    for (const float x : {0.0f, 1e-42f, -1e-42f, 1e-38f, -1e-30f}) {
        const double half = 0.5 * static_cast<double>(x);
        CHECK(std::fabs(one(inside.gelu, x) - half) <= std::fabs(half) * 2e-7 + 1.5e-45);
    }
    for (const float x : {10.0f, 1e4f, 1e20f, INF}) {
        CHECK(std::fabs(one(inside.gelu, x) - x) <= x * 1e-7f || one(inside.gelu, x) == x);
        CHECK(std::fabs(one(inside.gelu, -x)) < 2e-8f);
    }
    CHECK(std::isnan(one(inside.gelu, NOT_A_NUMBER)));
    float x[64], value_of[64], slope_of[64];
    std::fill_n(x, 64, NOT_A_NUMBER);
    inside.gelu_and_slope(x, value_of, slope_of, 64);
    CHECK(std::isnan(value_of[0]) && std::isnan(slope_of[0]));
    for (const float large : {50.0f, 1e10f, 1e30f}) {  // where x * x overflows too
        std::fill_n(x, 64, large);
        inside.gelu_and_slope(x, value_of, slope_of, 64);
        CHECK(slope_of[0] == 1.0f);
        std::fill_n(x, 64, -large);
        inside.gelu_and_slope(x, value_of, slope_of, 64);
        CHECK(std::fabs(slope_of[0]) < 1e-8f);
    }
}

void comparisons(const aam::Inside& inside) {
    constexpr int64_t COUNT = 64;
    float x[COUNT], than[COUNT], y[COUNT];
    check::Random random(5);
    for (int64_t i = 0; i < COUNT; ++i) {
        x[i] = static_cast<float>(random.normal());
        than[i] = static_cast<float>(random.normal());
    }
    x[3] = NOT_A_NUMBER;
    inside.larger(x, than, y, COUNT);
    for (int64_t i = 0; i < COUNT; ++i)
        CHECK(i == 3 ? std::isnan(y[i]) : y[i] == std::max(x[i], than[i]));
    inside.smaller(x, than, y, COUNT);
    for (int64_t i = 0; i < COUNT; ++i)
        CHECK(i == 3 ? std::isnan(y[i]) : y[i] == std::min(x[i], than[i]));
    inside.absolute(x, y, COUNT);
    for (int64_t i = 0; i < COUNT; ++i)
        CHECK(i == 3 ? std::isnan(y[i]) : y[i] == std::fabs(x[i]));
    x[3] = 0.25f;
    double sum = 0;
    for (int i = 0; i < inside.width; ++i) sum += x[i];
    CHECK(std::fabs(inside.sum_of(x) - sum) < 1e-5);
    CHECK(inside.largest_of(x) == *std::max_element(x, x + inside.width));
    for (int64_t count = 1; count <= inside.width; ++count) {
        check::at("parts of vectors: %lld", static_cast<long long>(count));
        for (int lying = 0; lying < 4; ++lying) {  // at the end and at the start of a page
            check::Floats from(count), to(count);
            std::copy_n(x, count, from.data());
            inside.copy_part(from.data(), to.data(), count);
            CHECK(std::equal(x, x + count, to.data()) && to.guards_intact());
            inside.load_part(from.data(), count, y);
            for (int64_t i = 0; i < inside.width; ++i) CHECK(y[i] == (i < count ? x[i] : 0.0f));
        }
    }
}

}  // namespace

void test_functions() {
    for (const Variant& variant : variants()) {
        check::at("functions, %s", variant.kernels->name);
        CHECK(variant.kernels->width == variant.inside->width);
        exponentials(*variant.inside);
        gelus(*variant.inside);
        comparisons(*variant.inside);
        CHECK(variant.kernels->multiply_adds(10) == 100.0 * variant.kernels->width);
    }
}

void test_dropout() {
    check::at("dropout, the reference");  // numbers that aam_kernels/_runtime/dropout.py gives
    CHECK(reference::row_factor(0, 0, 3) == 0xd1d84f);
    CHECK(reference::row_factor(7, 5, 3) == 0xf333eb);
    CHECK(reference::row_factor(123456789123456789u, 2147483646, 3) == 0xcb5aa1);
    CHECK(reference::row_factor(~uint64_t{0}, 1, 0x10002) == 0xf80117);
    CHECK(reference::row_factor(uint64_t{1} << 40, 0, 0x10002) == 0x98f579);
    CHECK(reference::column_factor(0) == 0x800001 && reference::column_factor(255) == 0xf6e2f1);
    CHECK(reference::column_factor(16777215) == 0x88cced);
    CHECK(reference::column_factor(2147483646) == 0xa40ebd);
    const char* lost = "0011101100100010100010000110100001100110001000101110001011000010";
    for (int64_t j = 0; j < 64; ++j)  // of seed, row 11, head 1, columns from 5 on
        CHECK(reference::Mask({0.3, 123456789123456789u}).keeps(11, 5 + j, 1) == (lost[j] == '0'));
    // A product that equals the bound stays; it goes as soon as p is 2^-32 larger.
    const uint32_t product = reference::row_factor(7, 3, 1) * reference::column_factor(5);
    const double edge = (static_cast<double>(static_cast<int32_t>(product)) + 0x1p31) * 0x1p-32;
    constexpr int64_t COLUMNS = 192;
    float x[COLUMNS], y[COLUMNS];
    for (int64_t j = 0; j < COLUMNS; ++j) x[j] = static_cast<float>(j + 1);
    for (const Variant& variant : variants()) {
        check::at("dropout, %s, at the bound", variant.kernels->name);
        variant.inside->keep(reference::Mask{edge, 7}.for_kernels(), 3, 1, x, y, COLUMNS);
        CHECK(y[5] == x[5]);
        variant.inside->keep(reference::Mask{edge + 0x1p-32, 7}.for_kernels(), 3, 1, x, y, COLUMNS);
        CHECK(y[5] == 0.0f);
        for (const double p : {0.1, 0.5, 0.999, 1e-3})
            for (const uint64_t seed : {uint64_t{0}, uint64_t{7}, ~uint64_t{0}, uint64_t{1} << 40})
                for (const uint32_t head : {0u, 3u, 0x10001u, 0x10003u}) {
                    check::at("dropout, %s, p %g, head %u", variant.kernels->name, p, head);
                    const reference::Mask mask{p, seed};
                    const aam::Dropout dropout = mask.for_kernels();
                    for (const int64_t row : {int64_t{0}, int64_t{1}, int64_t{2147483646}}) {
                        variant.inside->keep(dropout, static_cast<uint32_t>(row), head, x, y,
                                             COLUMNS);
                        for (int64_t j = 0; j < COLUMNS; ++j)
                            CHECK(y[j] == (mask.keeps(row, j, head) ? x[j] : 0.0f));
                    }
                }
    }
}
