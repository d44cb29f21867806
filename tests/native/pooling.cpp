// Attention pooling, forward and backward.

#include <cmath>

#include "packed.hpp"
#include "variants.hpp"

namespace {

struct Case {
    const char* name;
    std::vector<int64_t> lengths;
    int64_t dim = 128;
    bool gaps = false, spread = false;
    double size = 1;  // of scores
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * 4) == 0);
}

std::vector<float> copy(const check::Floats& x) { return {x.data(), x.data() + x.size()}; }

// The error of a tensor that has a row a sequence, empty ones too.
double error(const check::Floats& x, const reference::Numbers& expected) {
    check::Error error;
    for (int64_t i = 0; i < x.size(); ++i) error.add(x[i], expected[static_cast<size_t>(i)]);
    CHECK(x.guards_intact());
    return error.relative();
}

void run(const Case& test) {
    static int64_t number = 0;
    check::Random random(static_cast<uint64_t>(++number));
    const int64_t dim = test.dim, count = static_cast<int64_t>(test.lengths.size());
    const Packed packed(test.lengths, test.gaps, test.gaps ? 2 : 0);
    const HeadsTensor values = matrix(packed, dim, test.spread), grad_values = matrix(packed, dim);
    const HeadsTensor scores = matrix(packed, 1, test.spread), grad_scores = matrix(packed, 1);
    const check::Floats grad_pooled(count * dim), pooled(count * dim), lse(count);
    values.fill(random);
    scores.fill(random, test.size);
    for (int64_t i = 0; i < count * dim; ++i) grad_pooled[i] = static_cast<float>(random.normal());
    aam::PoolingBackward back{
        grad_pooled.data(), values.in().data, values.in().row,       scores.in().data,
        scores.in().row,    pooled.data(),    lse.data(),            grad_values.out().data,
        grad_scores.out().data, packed.sequences(), dim, 1};
    const reference::Pooling expected = reference::pooling(back, packed.rows());
    for (const Variant& variant : variants()) {
        std::vector<float> first[4];
        for (int threads = 1; threads <= 3; ++threads) {
            check::at("pooling, %s, %s, dim %d, %d threads", test.name, variant.kernels->name,
                      static_cast<int>(dim), threads);
            for (const HeadsTensor* written : {&grad_values, &grad_scores}) written->forget();
            for (const check::Floats* written : {&pooled, &lse}) written->forget();
            variant.kernels->pooling_forward({values.in().data, values.in().row, scores.in().data,
                                              scores.in().row, pooled.data(), lse.data(),
                                              packed.sequences(), dim, threads});
            back.threads = threads;
            variant.kernels->pooling_backward(back);
            const std::vector<float> results[] = {copy(pooled), copy(lse), grad_values.copy(),
                                                  grad_scores.copy()};
            for (int i = 0; i < 4; ++i) {
                if (threads == 1) {
                    first[i] = results[i];
                } else if (!same(first[i], results[i])) {
                    FAIL("result %d differs from that of one thread", i);
                }
            }
            if (threads > 1) continue;
            // p is right to the error of a float32 score of 100.
            const bool large = test.size > 1;
            BOUND(large ? "pooling, large scores" : "pooling, pooled",
                  error(pooled, expected.pooled), large ? 1e-5 : 5e-7);
            BOUND("pooling, lse", error(lse, expected.lse), 5e-7);
            BOUND(large ? "pooling, large scores" : "pooling, grad_values",
                  grad_values.error(expected.grad_values), large ? 1e-5 : 5e-7);
            BOUND(large ? "pooling, large scores" : "pooling, grad_scores",
                  grad_scores.error(expected.grad_scores), large ? 5e-5 : 3e-6);
        }
    }
}

}  // namespace

void test_pooling() {
    const std::vector<int64_t> lengths{0, 1, 2, 7, 0, 15, 16, 17, 63, 64, 65, 101, 151, 1025, 0};
    run({"lengths", lengths});
    run({"gaps", lengths, 48, true});
    run({"spread", lengths, 33, true, true});
    for (const int64_t dim :
         {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 63, 65, 100, 127, 129, 160, 513, 1152})
        run({"dim", {9, 0, 40, 1}, dim, false, dim % 2 == 0});
    run({"long", {4096, 3, 2100}, 32});
    run({"large scores", {40, 300}, 24, false, false, 30});
    run({"one short and one long", {1, 5000}, 8});
    run({"no sequences", {}});
    run({"only empty ones", {0, 0}});
    run({"many short ones", std::vector<int64_t>(300, 4), 16});
}
