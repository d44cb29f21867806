// Threads and scratch memory as the kernels really get them (threads.cpp of the kernels, on threads
// of its own because no torch is loaded here), and kernels called from many threads at once.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.hpp"
#include "interface.hpp"
#include "processor.hpp"

namespace {

struct Visits {
    std::vector<std::atomic<int>> times;
    explicit Visits(size_t threads) : times(threads) {}
};

void every_thread_works_once() {
    for (const int threads : {1, 2, 3, 8, 40}) {
        check::at("in_parallel with %d threads", threads);
        Visits visits(static_cast<size_t>(threads));
        aam::in_parallel(
            threads,
            [](void* context, int thread) {
                ++static_cast<Visits*>(context)->times[static_cast<size_t>(thread)];
            },
            &visits);
        for (const std::atomic<int>& times : visits.times) CHECK(times == 1);
    }
}

void scratch_is_aligned_and_ones_own() {
    check::at("scratch memory");
    const auto use = [](int number) {
        for (int round = 0; round < 200; ++round) {
            const int64_t size = 1 + (number * 7919 + round * 104729) % 60000;
            const aam::Scratch one(size), two(size / 2 + 1);
            CHECK(reinterpret_cast<uintptr_t>(one.data()) % 64 == 0);
            CHECK(reinterpret_cast<uintptr_t>(two.data()) % 64 == 0);
            std::fill_n(one.data(), size, static_cast<float>(number));
            std::fill_n(two.data(), size / 2 + 1, -1.0f);
            CHECK(std::count(one.data(), one.data() + size, static_cast<float>(number)) == size);
        }
    };
    std::vector<std::thread> users;
    for (int number = 1; number <= 4; ++number) users.emplace_back(use, number);
    for (std::thread& user : users) user.join();
}

// Self-attention and a layer of many short sequences; returns all that they give.
std::vector<float> results(const aam::Kernels& kernels, int threads) {
    constexpr int64_t COUNT = 400, DIM = 32, HIDDEN = 48, HEADS = 2;
    std::vector<int32_t> offsets{0};
    for (int64_t i = 0; i < COUNT; ++i)
        offsets.push_back(offsets.back() + static_cast<int32_t>(i * 7 % 13));
    const int64_t rows = offsets.back();
    check::Random random(1);
    const auto made = [&](int64_t count) {
        std::vector<float> x(static_cast<size_t>(count));
        for (float& value : x) value = static_cast<float>(random.normal() * 0.2);
        return x;
    };
    const int64_t sizes[12] = {DIM, DIM, 3 * DIM * DIM, 3 * DIM, DIM * DIM,    DIM,
                               DIM, DIM, HIDDEN * DIM,  HIDDEN,  DIM * HIDDEN, DIM};
    std::vector<std::vector<float>> weights, grads;
    const float* weight[12];
    float* grad[12];
    for (int i = 0; i < 12; ++i) {
        weights.push_back(made(sizes[i]));
        grads.emplace_back(static_cast<size_t>(sizes[i]));
    }
    for (int i = 0; i < 12; ++i) {
        weight[i] = weights[static_cast<size_t>(i)].data();
        grad[i] = grads[static_cast<size_t>(i)].data();
    }
    const std::vector<float> x = made(rows * DIM), grad_output = made(rows * DIM);
    std::vector<float> output(x.size()), grad_x(x.size());
    aam::LayerForward forward{};
    forward.x = x.data(), forward.x_row = DIM, forward.output = output.data();
    memcpy(&forward.weights, weight, sizeof weight);
    forward.sequences = {COUNT, offsets.data(), nullptr};
    forward.dim = DIM, forward.hidden = HIDDEN, forward.heads = HEADS, forward.threads = threads;
    kernels.layer_forward(forward);
    aam::LayerBackward backward{};
    backward.grad_output = grad_output.data(), backward.grad_output_row = DIM;
    backward.x = x.data(), backward.x_row = DIM, backward.grad_x = grad_x.data();
    memcpy(&backward.grads, grad, sizeof grad);
    backward.weights = forward.weights, backward.sequences = forward.sequences;
    backward.dim = DIM, backward.hidden = HIDDEN, backward.heads = HEADS;
    backward.threads = threads;
    kernels.layer_backward(backward);
    for (const std::vector<float>* more : {&output, &grad_x})
        grads.push_back(*more);
    std::vector<float> all;
    for (const std::vector<float>& part : grads) all.insert(all.end(), part.begin(), part.end());
    return all;
}

void kernels_on_threads() {
    for (const aam::Kernels* kernels : aam::runnable()) {
        check::at("kernels on threads, %s", kernels->name);
        const std::vector<float> one = results(*kernels, 1);
        for (const float value : one)
            if (!std::isfinite(value)) return FAIL("not finite");
        for (int round = 0; round < 2; ++round)
            for (const int threads : {2, 3, 8}) CHECK(results(*kernels, threads) == one);
        std::vector<std::thread> callers;  // each call with threads of its own
        for (int caller = 0; caller < 3; ++caller)
            callers.emplace_back([&] { CHECK(results(*kernels, 2) == one); });
        for (std::thread& caller : callers) caller.join();
    }
}

void variants_are_chosen_by_name() {
    check::at("select");
    for (const aam::Kernels* kernels : aam::runnable()) {
        aam::select(kernels->name);
        CHECK(&aam::selected() == kernels);
    }
    aam::select("");
    CHECK(&aam::selected() == aam::runnable().front());
    try {
        aam::select("x86-64-v9");
        FAIL("an unknown variant was accepted");
    } catch (const std::invalid_argument& error) {
        CHECK(strstr(error.what(), aam::runnable().front()->name));
    }
}

}  // namespace

int main() {
    check::catch_bad_accesses();
    every_thread_works_once();
    scratch_is_aligned_and_ones_own();
    kernels_on_threads();
    variants_are_chosen_by_name();
    printf("threads    %s\n", check::failures() ? "FAILED" : "passed");
    return check::failures() ? 1 : 0;
}
