// exp2, GELU and its derivative, and the dropout hash, a vector at a time.

#pragma once

#include "interface.hpp"
#include "vectors.hpp"

namespace {

using aam::Dropout;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// 2^x for -126 <= x <= 127, 1.9e-9 from exact before rounding (minimax polynomial of degree 6 on
// [-1/2, 1/2], fitted here). NaN stays NaN.
AAM_INLINE Floats exp2_in_range(Floats x) {
    const Floats shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: its low bits are round(x) + 127
    const Floats part = x - (shifted - 12583039.0f);
    Floats y = all(0.00015345810970757157f);
    y = y * part + 0.0013399930903688073f;
    y = y * part + 0.009618489071726799f;
    y = y * part + 0.05550328642129898f;
    y = y * part + 0.24022646248340607f;
    y = y * part + 0.6931471824645996f;
    y = y * part + 1.0f;
    return y * from_bits(bits(shifted) << 23);
}

// The same for any x <= 127; below -126, where results would be subnormal, it is 2^-126.
AAM_INLINE Floats exp2_of(Floats x) { return exp2_in_range(larger(x, all(-126.0f))); }

// P(N(0, 1) > a) for 0 <= a <= FURTHEST, as 2 to the power of a polynomial (degree 8, absolute
// error 8e-9, fitted here). Beyond FURTHEST it is 3e-9: nothing beside 1.
constexpr float FURTHEST = 5.8f;

AAM_INLINE Floats normal_tail(Floats a) {
    Floats y = all(-2.772053449007217e-06f);
    y = y * a + 3.862079756800085e-05f;
    y = y * a + -0.00018254783935844898f;
    y = y * a + -0.0001458695624023676f;
    y = y * a + 0.007075470872223377f;
    y = y * a + -0.05250502750277519f;
    y = y * a + -0.45920491218566895f;
    y = y * a + -1.1511057615280151f;
    y = y * a + -1.0f;
    return exp2_in_range(y);
}

// x Phi(x) = max(x, 0) - |x| P(N(0, 1) > |x|): exact GELU, without a difference of near numbers.
AAM_INLINE Floats gelu(Floats x) {
    const Floats a = smaller(absolute(x), all(FURTHEST));
    return larger(x, Floats{}) - a * normal_tail(a);
}

// gelu(x), and its derivative Phi(x) + x phi(x).
AAM_INLINE void gelu_and_slope(Floats x, Floats& value, Floats& slope) {
    const Floats a = smaller(absolute(x), all(FURTHEST));
    const Floats tail = normal_tail(a);
    value = larger(x, Floats{}) - a * tail;
    const Floats density = exp2_of(x * x * (-0.5f * LOG2_E)) * 0.3989422804014327f;
    slope = x * density + select(x < 0.0f, tail, 1.0f - tail);
}

// Heads from here on are the sites of dropout on token features.
constexpr uint32_t FEATURE_HEAD = 0x10000;

AAM_INLINE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
AAM_INLINE int32_t row_factor(const Dropout& dropout, uint32_t row, uint32_t head) {
    const uint32_t place = row * 0x9e3779b1u + head * 0x85ebca77u;
    return static_cast<int32_t>((mix(place ^ dropout.word) >> 8) | 0x800001u);
}
AAM_INLINE int32_t column_factor(uint32_t column) {
    uint32_t x = (column & 0xffffffu) * 0x9e3779u;
    x = ((x ^ (x >> 15)) & 0xffffffu) * 0xb5297bu;
    return static_cast<int32_t>((x >> 8) | 0x800001u);
}
// x where kept, else 0. `columns` holds column factors.
AAM_INLINE Floats keep(const Dropout& dropout, int32_t row, Ints columns, Floats x) {
    const Words product = reinterpret_cast<Words>(columns) * static_cast<uint32_t>(row);
    return select(reinterpret_cast<Ints>(product) < dropout.below, Floats{}, x);
}

}  // namespace
