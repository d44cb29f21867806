// Attention, forward and backward.

#include <cmath>

#include "packed.hpp"
#include "variants.hpp"

namespace {

using Lengths = std::vector<int64_t>;

struct Case {
    const char* name;
    Lengths lengths, key_lengths;  // the latter empty: self-attention
    int64_t heads = 2, head_dim = 32;
    bool gaps = false;
    double p = 0;
    uint64_t seed = 0;
    double size = 1;  // of queries and keys
    double scale = 0;  // 0: head_dim ** -0.5
    int most_threads = 3;
    int64_t first_row = 0, first_key_row = 0;
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * 4) == 0);
}

Layout layout_of(int64_t number) { return static_cast<Layout>(number % 3); }

void run(const Case& test) {
    static int64_t number = 0;
    ++number;
    check::Random random(static_cast<uint64_t>(number));
    const bool self = test.key_lengths.empty();
    const int64_t heads = test.heads, head_dim = test.head_dim;
    const Packed queries(test.lengths, test.gaps, test.gaps ? 2 : 0);
    const Packed other(test.key_lengths, test.gaps, test.gaps ? 1 : 0);
    const Packed& keys = self ? queries : other;
    const auto tensor = [&](const Packed& packed, int64_t which) {
        return HeadsTensor(packed, heads, head_dim, layout_of(number + which));
    };
    const HeadsTensor query = tensor(queries, 0), key = tensor(keys, 0), value = tensor(keys, 0);
    const HeadsTensor grad_output = tensor(queries, 1), output = tensor(queries, 1);
    const HeadsTensor grad_query = tensor(queries, 2), grad_key = tensor(keys, 2);
    const HeadsTensor grad_value = tensor(keys, 2), lse(queries, heads, 1, Layout::DENSE);
    const HeadsTensor* results[] = {&output, &lse, &grad_query, &grad_key, &grad_value};
    query.fill(random, test.size);
    key.fill(random, test.size);
    value.fill(random);
    grad_output.fill(random);
    const reference::Mask mask{test.p, test.seed, test.first_row, test.first_key_row};
    const double scale = test.scale ? test.scale : 1 / std::sqrt(static_cast<double>(head_dim));
    aam::AttentionBackward back{
        grad_output.in(),  query.in(),         key.in(),          value.in(),       output.in(),
        lse.in().data,     grad_query.out(),   grad_key.out(),    grad_value.out(),
        queries.sequences(), keys.sequences(), heads,             head_dim,
        static_cast<float>(scale), mask.for_kernels(), 1};
    const reference::Attention expected =
        reference::attention(back, queries.rows(), keys.rows(), mask);
    for (const Variant& variant : variants()) {
        std::vector<float> first[5];
        for (int threads = 1; threads <= test.most_threads; ++threads) {
            check::at("attention, %s, %s, head_dim %d, %d threads", test.name,
                      variant.kernels->name, static_cast<int>(head_dim), threads);
            for (const HeadsTensor* written : results) written->forget();
            variant.kernels->attention_forward({query.in(), key.in(), value.in(), output.out(),
                                                lse.out().data, queries.sequences(),
                                                keys.sequences(), heads, head_dim, back.scale,
                                                back.dropout, threads});
            back.threads = threads;
            const std::vector<float> kept_output = output.copy(), kept_lse = lse.copy();
            variant.kernels->attention_backward(back);
            CHECK(same(kept_output, output.copy()) && same(kept_lse, lse.copy()));
            int which = 0;
            for (const HeadsTensor* written : results) {
                if (threads == 1) {
                    first[which] = written->copy();
                } else if (!same(first[which], written->copy())) {
                    FAIL("result %d differs from that of one thread", which);
                }
                ++which;
            }
            if (threads > 1) continue;
            // A float32 logit of 60 is right to 4e-6, and so are its exponential and the rest.
            if (test.size > 1) {
                BOUND("attention, large logits", output.error(expected.output), 2e-5);
                BOUND("attention, large logits", lse.error(expected.lse), 1e-6);
                BOUND("attention, large logits", grad_query.error(expected.grad_query), 3e-5);
                BOUND("attention, large logits", grad_key.error(expected.grad_key), 3e-5);
                BOUND("attention, large logits", grad_value.error(expected.grad_value), 2e-5);
            } else {
                BOUND("attention, output", output.error(expected.output), 2e-6);
                BOUND("attention, lse", lse.error(expected.lse), 5e-7);
                BOUND("attention, grad_query", grad_query.error(expected.grad_query), 3e-6);
                BOUND("attention, grad_key", grad_key.error(expected.grad_key), 3e-6);
                BOUND("attention, grad_value", grad_value.error(expected.grad_value), 3e-6);
            }
            CHECK(queries.guards_intact() && keys.guards_intact());
        }
    }
}

}  // namespace

void test_attention() {
    const Lengths lengths{0, 1, 2, 7, 0, 15, 16, 17, 63, 64, 65, 101, 0};
    run({"lengths", lengths, {}});
    run({"lengths and dropout", lengths, {}, 2, 32, true, 0.1, 7});
    run({"lengths and gaps", lengths, {}, 3, 16, true});
    run({"151", {151, 3, 151}, {}, 2, 32, false, 0.3, ~uint64_t{0}});
    run({"256", {255, 256, 257}, {}, 1, 24});
    run({"1,024", {1023, 1024, 1025}, {}, 1, 8, false, 0.1, 3, 1, 0, 1});
    run({"4,096", {4096}, {}, 1, 8, false, 0, 0, 1, 0, 1});
    run({"4,096 keys", {5, 33}, {4096, 2100}, 1, 32, true, 0.2, 9});
    run({"4,096 queries", {4096, 7}, {3, 700}, 1, 16, false, 0, 0, 1, 0, 2});
    const Lengths some{0, 5, 40, 9, 1, 0, 70}, keys{4, 0, 77, 33, 1, 0, 16};
    run({"cross", some, keys, 2, 40});
    run({"cross, gaps, dropout", some, keys, 3, 64, true, 0.5, uint64_t{1} << 40});
    for (const int64_t head_dim :
         {8, 9, 12, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 72, 80, 96, 100, 112, 127, 128})
        run({"head_dim", {37, 0, 6, 130}, {}, head_dim < 64 ? 3 : 2, head_dim, head_dim % 48 == 0,
             head_dim % 3 ? 0.0 : 0.1, 5, 1, 0, head_dim % 32 ? 1 : 2});
    const int64_t wraps = (int64_t{1} << 32) - 50, far = int64_t{5} << 40;
    run({"first rows", lengths, {}, 2, 32, false, 0.2, 6, 1, 0, 3, wraps, wraps});
    run({"cross, first rows", some, keys, 2, 40, true, 0.2, 6, 1, 0, 3, far + 7, wraps});
    run({"large logits", {65, 31}, {}, 2, 32, false, 0, 0, 8});
    run({"scale", {20, 31}, {}, 2, 32, false, 0, 0, 1, 0.7});
    run({"almost all dropped", {20, 90}, {}, 2, 32, false, 0.99, 1});
    run({"no sequences", {}, {}});
    run({"only empty ones", {0, 0, 0}, {}});
    run({"many short ones", Lengths(200, 3), {}, 1, 16});
}
