// Threads and memory of the kernels: torch's own threads where they can be had.
//
// Two pools of threads on the same cores would take turns at best, so no OpenMP is linked: the
// runtime that torch itself has loaded is looked up in the running process.

#include "threads.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "interface.hpp"

#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

namespace {

// The part of OpenMP's binary interface that GCC's, Clang's and Intel's runtimes share.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
    int (*thread_number)();
    int (*team_size)();
};

std::mutex runtime_mutex;
OpenMP openmp{};
std::string openmp_name;
std::atomic<bool> openmp_found{false};
// A child of fork() has none of its parent's threads, and GCC's runtime waits for them forever.
std::atomic<bool> forked{false};

bool is_torch(const char* path) { return path && strstr(path, "libtorch_cpu"); }

#if defined(__APPLE__)
std::string torch_library() {
    for (uint32_t i = 0; i < _dyld_image_count(); ++i)
        if (is_torch(_dyld_get_image_name(i))) return _dyld_get_image_name(i);
    return {};
}
#else
std::string torch_library() {
    std::string found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
            if (!is_torch(info->dlpi_name)) return 0;
            *static_cast<std::string*>(result) = info->dlpi_name;
            return 1;
        },
        &found);
    return found;
}
#endif

// Whether torch's OpenMP can be used; looked for until torch is there.
bool find_openmp() {
    if (openmp_found.load(std::memory_order_acquire)) return true;
    const std::lock_guard<std::mutex> lock(runtime_mutex);
    if (openmp_found.load(std::memory_order_relaxed)) return true;
    const std::string torch = torch_library();
    if (torch.empty()) return false;
    void* library = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return false;
    // dlsym looks through what the library depends on: other packages bring runtimes of their own.
    OpenMP found{};
    void* parallel = dlsym(library, "GOMP_parallel");
    found.parallel = reinterpret_cast<decltype(found.parallel)>(parallel);
    found.thread_number =
        reinterpret_cast<decltype(found.thread_number)>(dlsym(library, "omp_get_thread_num"));
    found.team_size =
        reinterpret_cast<decltype(found.team_size)>(dlsym(library, "omp_get_num_threads"));
    if (!found.parallel || !found.thread_number || !found.team_size) return false;
    Dl_info info{};
    if (dladdr(parallel, &info) && info.dli_fname) {
        const char* slash = strrchr(info.dli_fname, '/');
        openmp_name = slash ? slash + 1 : info.dli_fname;
    }
    openmp = found;
    openmp_found.store(true, std::memory_order_release);
    return true;
}

struct Work {
    void (*function)(void*, int);
    void* context;
    int threads;
};

void team_member(void* data) {
    const Work& work = *static_cast<const Work*>(data);
    // A team may be smaller than asked for: inside another region, or under a limit.
    const int team = openmp.team_size();
    for (int thread = openmp.thread_number(); thread < work.threads; thread += team)
        work.function(work.context, thread);
}

void on_own_threads(const Work& work) {
    std::vector<std::thread> started;
    started.reserve(static_cast<size_t>(work.threads));
    int next = 1;
    try {
        for (; next < work.threads; ++next) started.emplace_back(work.function, work.context, next);
    } catch (const std::system_error&) {
        // No more threads to be had: this one does what is left.
    }
    work.function(work.context, 0);
    for (; next < work.threads; ++next) work.function(work.context, next);
    for (std::thread& thread : started) thread.join();
}

constexpr size_t ALIGNMENT = 64, LARGE_PAGE = size_t{2} << 20;
constexpr size_t KEPT_BLOCKS = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t KEPT_BYTES = 0;  // what is kept cannot be seen to be misused
constexpr size_t LARGE = SIZE_MAX;
#else
constexpr size_t KEPT_BYTES = size_t{64} << 20;
constexpr size_t LARGE = size_t{1} << 20;  // large pages: 1.1x in the backward pass of wide layers
#endif

// Memory for `bytes`, which becomes what there really is. Throws std::bad_alloc.
float* allocate(size_t& bytes) {
    const bool large = bytes >= LARGE;
    if (large) bytes = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    void* data = nullptr;
    if (posix_memalign(&data, large ? LARGE_PAGE : ALIGNMENT, bytes)) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (large) madvise(data, bytes, MADV_HUGEPAGE);  // a wish: pages of any size will do
#endif
    return static_cast<float*>(data);
}

struct Block {
    float* data;
    size_t bytes;
};

std::mutex pool_mutex;
std::vector<Block> pool;
size_t pool_bytes = 0;

}  // namespace

namespace aam {

void in_parallel(int threads, void (*work)(void* context, int thread), void* context) {
    if (threads <= 1) {
        work(context, 0);
        return;
    }
    Work shared{work, context, threads};
    if (!forked.load(std::memory_order_relaxed) && find_openmp())
        openmp.parallel(team_member, &shared, static_cast<unsigned>(threads), 0);
    else
        on_own_threads(shared);
}

std::string threads_of() {
    if (forked.load(std::memory_order_relaxed))
        return "own threads, started for every call (this process was forked)";
    if (find_openmp()) return "torch's OpenMP threads (" + openmp_name + ")";
    return "own threads, started for every call (torch's OpenMP runtime was not found)";
}

Scratch::Scratch(int64_t floats) : data_(nullptr), floats_(0) {
    if (floats <= 0) return;
    size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    {
        // The smallest block that is large enough and not much too large.
        const std::lock_guard<std::mutex> lock(pool_mutex);
        size_t best = pool.size();
        for (size_t i = 0; i < pool.size(); ++i)
            if (pool[i].bytes >= bytes && pool[i].bytes / 4 <= bytes &&
                (best == pool.size() || pool[i].bytes < pool[best].bytes))
                best = i;
        if (best != pool.size()) {
            data_ = pool[best].data;
            floats_ = static_cast<int64_t>(pool[best].bytes / sizeof(float));
            pool_bytes -= pool[best].bytes;
            pool[best] = pool.back();
            pool.pop_back();
            return;
        }
    }
    data_ = allocate(bytes);
    floats_ = static_cast<int64_t>(bytes / sizeof(float));
}

Scratch::~Scratch() {
    if (!data_) return;
    const size_t bytes = static_cast<size_t>(floats_) * sizeof(float);
    {
        const std::lock_guard<std::mutex> lock(pool_mutex);
        if (pool_bytes + bytes <= KEPT_BYTES && pool.size() < KEPT_BLOCKS) {
            pool.push_back({data_, bytes});
            pool_bytes += bytes;
            return;
        }
    }
    free(data_);
}

}  // namespace aam

namespace {

// A lock that another thread holds at the moment of fork() would be held forever in the child.
const bool fork_handled = [] {
    pool.reserve(KEPT_BLOCKS);  // giving a block back never throws
    pthread_atfork(
        [] {
            runtime_mutex.lock();
            pool_mutex.lock();
        },
        [] {
            pool_mutex.unlock();
            runtime_mutex.unlock();
        },
        [] {
            pool_mutex.unlock();
            runtime_mutex.unlock();
            forked.store(true, std::memory_order_relaxed);
        });
    return true;
}();

}  // namespace
