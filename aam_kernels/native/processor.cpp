// Which of the compiled kernels this processor runs, and which are used.

#include "processor.hpp"

#include <stdlib.h>

#include <atomic>
#include <initializer_list>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace aam {

#if defined(__x86_64__)
extern const Kernels x86_64_v4, x86_64_v3, x86_64;
#elif defined(__aarch64__)
extern const Kernels neon;
#else
extern const Kernels generic;
#endif

namespace {

#if defined(__x86_64__)

// Levels of the x86-64 psABI. Asked of the processor itself: the compilers' own queries differ in
// what they know, and none of GCC 11 to Clang 14 knows levels.
int level() {
    struct {
        unsigned a = 0, b = 0, c = 0, d = 0;
    } basic, extended, amd;
    if (!__get_cpuid(1, &basic.a, &basic.b, &basic.c, &basic.d)) return 1;
    if (!__get_cpuid_count(7, 0, &extended.a, &extended.b, &extended.c, &extended.d)) return 1;
    if (!__get_cpuid(0x80000001u, &amd.a, &amd.b, &amd.c, &amd.d)) return 1;
    const auto has = [](unsigned word, std::initializer_list<int> bits) {
        for (int bit : bits)
            if (!(word >> bit & 1)) return false;
        return true;
    };
    // SSE3, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, OSXSAVE, AVX, F16C
    const bool v3 = has(basic.c, {0, 9, 12, 13, 19, 20, 22, 23, 27, 28, 29}) &&
                    has(extended.b, {3, 5, 8}) &&  // BMI1, AVX2, BMI2
                    has(amd.c, {0, 5});            // LAHF, LZCNT
    if (!v3) return 1;
    // Registers that the operating system saves: SSE and AVX; masks and both parts of AVX-512.
    unsigned low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!has(low, {1, 2})) return 1;
    // AVX512F, DQ, CD, BW, VL
    return has(extended.b, {16, 17, 28, 30, 31}) && has(low, {5, 6, 7}) ? 4 : 3;
}

#endif

std::vector<const Kernels*> find_runnable() {
#if defined(__x86_64__)
    const int found = level();
    if (found >= 4) return {&x86_64_v4, &x86_64_v3, &x86_64};
    if (found >= 3) return {&x86_64_v3, &x86_64};
    return {&x86_64};
#else
    return compiled();
#endif
}

std::string names(const std::vector<const Kernels*>& variants) {
    std::string list;
    for (const Kernels* kernels : variants)
        list += (list.empty() ? "" : ", ") + std::string(kernels->name);
    return list;
}

const Kernels* find(const std::vector<const Kernels*>& variants, const std::string& name) {
    for (const Kernels* kernels : variants)
        if (name == kernels->name) return kernels;
    return nullptr;
}

const Kernels& by_name(const std::string& name, const std::string& asked_by) {
    if (const Kernels* kernels = find(runnable(), name)) return *kernels;
    const char* why = find(compiled(), name) ? " cannot run on this processor; it runs "
                                             : " is not in this build; this processor runs ";
    throw std::invalid_argument(asked_by + "'" + name + "'" + why + names(runnable()));
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const std::vector<const Kernels*>& compiled() {
#if defined(__x86_64__)
    static const std::vector<const Kernels*> variants{&x86_64_v4, &x86_64_v3, &x86_64};
#elif defined(__aarch64__)
    static const std::vector<const Kernels*> variants{&neon};
#else
    static const std::vector<const Kernels*> variants{&generic};
#endif
    return variants;
}

const std::vector<const Kernels*>& runnable() {
    static const std::vector<const Kernels*> variants = find_runnable();
    return variants;
}

const Kernels& selected() {
    if (const Kernels* kernels = in_use.load(std::memory_order_acquire)) return *kernels;
    const char* wanted = getenv("AAM_KERNELS_CPU");
    const Kernels& kernels =
        wanted && *wanted ? by_name(wanted, "AAM_KERNELS_CPU: ") : *runnable().front();
    in_use.store(&kernels, std::memory_order_release);
    return kernels;
}

const Kernels& variant(const std::string& name) { return by_name(name, ""); }

void select(const std::string& name) {
    in_use.store(name.empty() ? nullptr : &variant(name), std::memory_order_release);
}

}  // namespace aam
