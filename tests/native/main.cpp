// Runs every variant of the kernels that this processor can run against references in double
// precision. Arguments: names of tests, or nothing for all.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>

#include "check.hpp"
#include "processor.hpp"
#include "variants.hpp"

// Threads and scratch memory as this program provides them to the kernels: every thread is one of
// its own, scratch memory is full of NaN and ends before a page that may not be touched, and taking
// it inside a parallel region is a failure.
namespace {

std::atomic<bool> parallel{false};
std::vector<std::pair<const float*, std::unique_ptr<check::Memory>>> scratches;

}  // namespace

namespace aam {

void in_parallel(int threads, void (*work)(void* context, int thread), void* context) {
    if (parallel.exchange(true)) FAIL("a parallel region inside another");
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, context, thread);
    work(context, 0);
    for (std::thread& other : others) other.join();
    parallel = false;
}

Scratch::Scratch(int64_t floats) : floats_(floats) {
    if (parallel) FAIL("scratch memory taken inside a parallel region");
    scratches.emplace_back(nullptr, std::make_unique<check::Memory>(floats * 4, false, 64));
    data_ = static_cast<float*>(scratches.back().second->data());
    scratches.back().first = data_;
}

Scratch::~Scratch() {
    for (size_t i = scratches.size(); i-- > 0;)
        if (scratches[i].first == data_) {
            if (!scratches[i].second->guards_intact())
                FAIL("written beside scratch memory of %lld floats",
                     static_cast<long long>(floats_));
            scratches.erase(scratches.begin() + static_cast<int64_t>(i));
            return;
        }
}

#if defined(__x86_64__)
extern const Inside inside_x86_64_v4, inside_x86_64_v3, inside_x86_64;
#elif defined(__aarch64__)
extern const Inside inside_neon;
#else
extern const Inside inside_generic;
#endif

}  // namespace aam

static const aam::Inside& inside_of(const char* name) {
#if defined(__x86_64__)
    if (strcmp(name, "x86-64-v4") == 0) return aam::inside_x86_64_v4;
    if (strcmp(name, "x86-64-v3") == 0) return aam::inside_x86_64_v3;
    return aam::inside_x86_64;
#elif defined(__aarch64__)
    (void)name;
    return aam::inside_neon;
#else
    (void)name;
    return aam::inside_generic;
#endif
}

const std::vector<Variant>& variants() {
    static const std::vector<Variant> found = [] {
        std::vector<Variant> result;
        const char* only = getenv("AAM_KERNELS_CPU");
        for (const aam::Kernels* kernels : aam::runnable())
            if (!only || strcmp(only, kernels->name) == 0)
                result.push_back({kernels, &inside_of(kernels->name)});
        return result;
    }();
    return found;
}

int main(int count, char** arguments) {
    const struct {
        const char* name;
        void (*run)();
    } tests[] = {{"functions", test_functions}, {"dropout", test_dropout},
                 {"products", test_products},   {"attention", test_attention},
                 {"pooling", test_pooling},     {"layer", test_layer}};
    check::catch_bad_accesses();
    printf("variants:");
    for (const Variant& variant : variants()) printf(" %s", variant.kernels->name);
    printf("\n");
    if (variants().empty()) FAIL("no variant to test");
    for (const auto& test : tests) {
        bool wanted = count == 1;
        for (int i = 1; i < count; ++i) wanted |= strcmp(arguments[i], test.name) == 0;
        if (!wanted) continue;
        const int before = check::failures();
        const auto start = std::chrono::steady_clock::now();
        test.run();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        printf("%-10s %s, %.1f s\n", test.name,
               check::failures() == before ? "passed" : "FAILED", seconds.count());
        fflush(stdout);
    }
    check::print_largest_errors();
    return check::failures() ? 1 : 0;
}
