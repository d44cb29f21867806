// Vectors of floats in the compiler's own vector types (GCC, Clang): arithmetic is written once
// and compiled for each kind of processor. AAM_WIDTH floats make a vector: 16, 8 or 4.
//
// Each kind of processor is one translation unit, and everything here has internal linkage: the
// linker must never merge a function compiled for one processor with that of another.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>  // masked loads and stores: vector types have none
#endif

#ifndef AAM_WIDTH
#error "AAM_WIDTH, the floats of a vector, is set where a variant is compiled"
#endif

#define AAM_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int WIDTH = AAM_WIDTH;
// A panel of a packed matrix: as many vectors as leave registers for six rows of sums.
constexpr int PANEL_VECTORS = AAM_PANEL_VECTORS;
constexpr int PANEL = WIDTH * PANEL_VECTORS;
constexpr int BLOCK_ROWS = AAM_BLOCK_ROWS;

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef float FloatsAnywhere __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t IntsAnywhere __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

AAM_INLINE Floats load(const float* from) { return *reinterpret_cast<const FloatsAnywhere*>(from); }
AAM_INLINE Ints load(const int32_t* from) { return *reinterpret_cast<const IntsAnywhere*>(from); }
AAM_INLINE void store(float* to, Floats x) { *reinterpret_cast<FloatsAnywhere*>(to) = x; }
AAM_INLINE void store(int32_t* to, Ints x) { *reinterpret_cast<IntsAnywhere*>(to) = x; }

AAM_INLINE Floats all(float x) { return x - Floats{}; }
AAM_INLINE Ints all(int32_t x) { return x - Ints{}; }

// The first `count` (1 to WIDTH) elements; the others read as 0 and are not touched in memory.
#if AAM_WIDTH == 16 && defined(__AVX512F__)
AAM_INLINE Floats load_part(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
AAM_INLINE void store_part(float* to, Floats x, int64_t count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
}
#elif AAM_WIDTH == 8 && defined(__AVX__)
AAM_INLINE __m256i first_lanes(int64_t count) {
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    return reinterpret_cast<__m256i>(lanes < static_cast<int32_t>(count));
}
AAM_INLINE Floats load_part(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, first_lanes(count));
}
AAM_INLINE void store_part(float* to, Floats x, int64_t count) {
    _mm256_maskstore_ps(to, first_lanes(count), x);
}
#else
AAM_INLINE Floats load_part(const float* from, int64_t count) {
    Floats x{};
    memcpy(&x, from, static_cast<size_t>(count) * sizeof(float));
    return x;
}
AAM_INLINE void store_part(float* to, Floats x, int64_t count) {
    memcpy(to, &x, static_cast<size_t>(count) * sizeof(float));
}
#endif

AAM_INLINE Ints bits(Floats x) { return reinterpret_cast<Ints>(x); }
AAM_INLINE Floats from_bits(Ints x) { return reinterpret_cast<Floats>(x); }
// A comparison gives 0 or -1 an element.
AAM_INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
// NaN in x stays: it is what "not smaller" keeps.
AAM_INLINE Floats larger(Floats x, Floats than) { return x < than ? than : x; }
AAM_INLINE Floats smaller(Floats x, Floats than) { return x > than ? than : x; }
AAM_INLINE Floats absolute(Floats x) { return from_bits(bits(x) & 0x7fffffff); }

#if defined(__clang__)
AAM_INLINE Floats shuffled(Floats x, Ints from) {
    Floats y;
    for (int i = 0; i < WIDTH; ++i) y[i] = x[from[i]];
    return y;
}
#else
AAM_INLINE Floats shuffled(Floats x, Ints from) { return __builtin_shuffle(x, from); }
#endif

AAM_INLINE Ints lane_numbers() {
    Ints x;
    for (int i = 0; i < WIDTH; ++i) x[i] = i;
    return x;
}

// Upper half onto lower half, in halves: always in the same order.
template <int HALF, class Combine>
AAM_INLINE Floats halves(Floats x, const Combine& combine) {
    if constexpr (HALF == 0) return x;
    else {
        Ints to;
        for (int i = 0; i < WIDTH; ++i) to[i] = i ^ HALF;
        return halves<HALF / 2>(combine(x, shuffled(x, to)), combine);
    }
}
AAM_INLINE float sum_of(Floats x) {
    return halves<WIDTH / 2>(x, [](Floats a, Floats b) { return a + b; })[0];
}
AAM_INLINE float largest_of(Floats x) {
    return halves<WIDTH / 2>(x, [](Floats a, Floats b) { return larger(a, b); })[0];
}

constexpr int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace
