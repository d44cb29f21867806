// Checks, guarded memory and random numbers of the native tests.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace check {

// What is being checked, for messages; printf style.
void at(const char* format, ...) __attribute__((format(printf, 1, 2)));
const char* where();
void fail(const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
int failures();

#define FAIL(...) check::fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(condition) \
    do { \
        if (!(condition)) FAIL("%s", #condition); \
    } while (0)

// Bits of a NaN that no arithmetic makes: what nobody has written.
constexpr uint32_t UNTOUCHED = 0x7fc0dead;
float untouched();
bool is_untouched(float x);

// Memory of its own between pages that may not be touched, filled with NaN, as is what lies between
// it and those pages. It ends, or starts, where such a page does, so that reading or writing one
// element too far ends the program (and the name of the case is printed).
class Memory {
  public:
    Memory() = default;
    explicit Memory(int64_t bytes, bool at_start = false, int64_t alignment = 4);
    ~Memory();
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return data_; }
    bool guards_intact() const;

  private:
    uint8_t *all_ = nullptr, *data_ = nullptr;
    int64_t mapped_ = 0, bytes_ = 0;
};

// Floats in guarded memory. Where it lies changes from one to the next: at the end of a page (at
// any multiple of 4 bytes) or at the start.
class Floats {
  public:
    explicit Floats(int64_t count = 0);
    float* data() const { return static_cast<float*>(memory_.data()); }
    int64_t size() const { return count_; }
    float& operator[](int64_t i) const { return data()[i]; }
    void forget() const;  // all elements untouched again
    bool guards_intact() const { return memory_.guards_intact(); }

  private:
    Memory memory_;
    int64_t count_ = 0;
};

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t bits();
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    double normal();
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }

  private:
    uint64_t state_;
};

// The largest difference, as a share of the largest expected value (of `floor` where that is more).
// Infinite where an element is not finite although the expected one is, or the other way round.
class Error {
  public:
    explicit Error(double floor = 1e-30) : scale_(floor) {}
    void add(double got, double expected);
    double relative() const { return worst_ / scale_; }

  private:
    double worst_ = 0, scale_;
};

// Fails where the error is over the bound; keeps the largest of each name for the summary.
void bound(const char* file, int line, const char* name, double error, double limit);
#define BOUND(name, error, limit) check::bound(__FILE__, __LINE__, name, error, limit)
void print_largest_errors();

// Ends the program with the name of the case where memory is touched that may not be.
void catch_bad_accesses();

}  // namespace check
