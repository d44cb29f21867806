#include "check.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdlib>
#include <map>

#if defined(__SANITIZE_ADDRESS__)
#define AAM_ADDRESSES_CHECKED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AAM_ADDRESSES_CHECKED 1
#endif
#endif

namespace check {

namespace {

char place[512] = "start";
int failed = 0;
std::map<std::string, std::pair<double, double>> largest_errors;  // error, limit

#ifndef AAM_ADDRESSES_CHECKED
void bad_access(int number) {
    // Only what a signal handler may do.
    const char message[] = "\nFAILED: memory touched that may not be, or a bad instruction, at: ";
    (void)!write(2, message, sizeof message - 1);
    (void)!write(2, place, strlen(place));
    (void)!write(2, "\n", 1);
    signal(number, SIG_DFL);
    raise(number);
}
#endif

}  // namespace

void at(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(place, sizeof place, format, arguments);
    va_end(arguments);
}

const char* where() { return place; }

void fail(const char* file, int line, const char* format, ...) {
    ++failed;
    if (failed > 40) {
        fprintf(stderr, "too many failures\n");
        exit(1);
    }
    const char* name = strrchr(file, '/');
    fprintf(stderr, "FAILED %s:%d [%s] ", name ? name + 1 : file, line, place);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
}

int failures() { return failed; }

float untouched() {
    float x;
    memcpy(&x, &UNTOUCHED, sizeof x);
    return x;
}

bool is_untouched(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits == UNTOUCHED;
}

static void fill(uint8_t* from, uint8_t* to) {
    for (; from + 4 <= to; from += 4) memcpy(from, &UNTOUCHED, 4);
}

static bool filled(const uint8_t* from, const uint8_t* to) {
    for (; from + 4 <= to; from += 4)
        if (memcmp(from, &UNTOUCHED, 4) != 0) return false;
    return true;
}

Memory::Memory(int64_t bytes, bool at_start, int64_t alignment) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (bytes + page - 1) / page * page + page;
    mapped_ = inner + 2 * page;
    void* made = mmap(nullptr, static_cast<size_t>(mapped_), PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) abort();
    all_ = static_cast<uint8_t*>(made);
    uint8_t *first = all_ + page, *last = first + inner;
    if (mprotect(first, static_cast<size_t>(inner), PROT_READ | PROT_WRITE) != 0) abort();
    data_ = at_start ? first : last - (bytes + alignment - 1) / alignment * alignment;
    fill(first, last);
}

Memory::~Memory() {
    if (all_) munmap(all_, static_cast<size_t>(mapped_));
}

Memory& Memory::operator=(Memory&& other) noexcept {
    std::swap(all_, other.all_);
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

bool Memory::guards_intact() const {
    const int64_t page = sysconf(_SC_PAGESIZE);
    return filled(all_ + page, data_) && filled(data_ + bytes_, all_ + mapped_ - page);
}

Floats::Floats(int64_t count) : count_(count) {
    static int made = 0;
    memory_ = Memory(count * 4, ++made % 4 == 0);
}

void Floats::forget() const { std::fill_n(data(), count_, untouched()); }

uint64_t Random::bits() {  // splitmix64
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

double Random::normal() {  // a sum of uniform numbers: close enough, and quick
    double sum = -6;
    for (int i = 0; i < 12; i += 4) {
        const uint64_t x = bits();
        for (int part = 0; part < 64; part += 16)
            sum += static_cast<double>((x >> part) & 0xffff) / 65536.0;
    }
    return sum;
}

void Error::add(double got, double expected) {
    if (std::isfinite(got) && std::isfinite(expected)) {
        worst_ = std::max(worst_, std::fabs(got - expected));
        scale_ = std::max(scale_, std::fabs(expected));
    } else if (!(got == expected)) {
        worst_ = INFINITY;
    }
}

void bound(const char* file, int line, const char* name, double error, double limit) {
    auto& [largest, its_limit] = largest_errors[name];
    if (!(error <= largest)) largest = error;
    its_limit = std::max(its_limit, limit);
    if (!(error <= limit)) fail(file, line, "%s: error %.3g, at most %.3g", name, error, limit);
}

void print_largest_errors() {
    for (const auto& [name, values] : largest_errors)
        printf("%-32s largest error %9.3g, allowed %9.3g\n", name.c_str(), values.first,
               values.second);
}

void catch_bad_accesses() {
#ifndef AAM_ADDRESSES_CHECKED  // which says more itself
    for (const int number : {SIGSEGV, SIGBUS, SIGILL}) signal(number, bad_access);
#endif
}

}  // namespace check
