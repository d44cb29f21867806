// Multiply-adds that depend on nothing but registers: what a core can do at most.

#pragma once

#include "vectors.hpp"

namespace {

static double multiply_adds(int64_t rounds) {
    Floats a = all(1.0f), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a;
    Floats factor = all(0.999f), term = all(0.001f);
    for (int64_t round = 0; round < rounds; ++round) {
        a = a * factor + term, b = b * factor + term, c = c * factor + term;
        d = d * factor + term, e = e * factor + term, f = f * factor + term;
        g = g * factor + term, h = h * factor + term, i = i * factor + term;
        j = j * factor + term;
        // The compiler must not see through the loop.
#if defined(__x86_64__)
        asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e));
        asm volatile("" : "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j));
#elif defined(__aarch64__)
        asm volatile("" : "+w"(a), "+w"(b), "+w"(c), "+w"(d), "+w"(e));
        asm volatile("" : "+w"(f), "+w"(g), "+w"(h), "+w"(i), "+w"(j));
#else
        asm volatile("" ::: "memory");
#endif
    }
    volatile float sink = sum_of(a + b + c + d + e + f + g + h + i + j);
    (void)sink;
    return static_cast<double>(rounds) * 10 * WIDTH;
}

}  // namespace
