// The whole encoder layer, forward and backward: recomputed and kept, with and without dropout.

#include <cmath>

#include "packed.hpp"
#include "variants.hpp"

namespace {

using check::Floats;
using Lengths = std::vector<int64_t>;

struct Case {
    const char* name;
    Lengths lengths;
    int64_t dim = 128, hidden = 512, heads = 4;
    double p = 0;
    uint64_t seed = 0;
    bool spread = false;
    int most_threads = 3;
    int64_t first_row = 0;
};

// The twelve weights, or their gradients, in the order of aam::LayerWeights and LayerGrads.
struct Twelve {
    std::vector<Floats> parts;

    Twelve(int64_t dim, int64_t hidden) {
        for (const int64_t size : {dim, dim, 3 * dim * dim, 3 * dim, dim * dim, dim, dim, dim,
                                   hidden * dim, hidden, dim * hidden, dim})
            parts.emplace_back(size);
    }
    void fill(int64_t dim, int64_t hidden, check::Random& random) const {
        const double sizes[] = {0.3, 0.3, 1 / std::sqrt(dim), 0.3, 1 / std::sqrt(dim), 0.3, 0.3,
                                0.3, 1 / std::sqrt(dim), 0.5, 1 / std::sqrt(hidden), 0.3};
        for (size_t i = 0; i < parts.size(); ++i)
            for (int64_t j = 0; j < parts[i].size(); ++j)
                parts[i][j] = static_cast<float>(random.normal() * sizes[i] + (i == 0 || i == 6));
    }
    template <class Struct>
    Struct pointers(uint32_t without = 0) const {
        float* list[12];
        for (size_t i = 0; i < 12; ++i) list[i] = without >> i & 1 ? nullptr : parts[i].data();
        Struct result;
        static_assert(sizeof result == sizeof list);
        memcpy(&result, list, sizeof list);
        return result;
    }
};

std::vector<float> copy(const Floats& x) { return {x.data(), x.data() + x.size()}; }

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * 4) == 0);
}

// Everything that the backward pass gives.
struct Gradients {
    HeadsTensor x;
    Twelve weights;
    Gradients(const Packed& packed, int64_t dim, int64_t hidden)
        : x(matrix(packed, dim)), weights(dim, hidden) {}

    void forget() const {
        x.forget();
        for (const Floats& part : weights.parts) part.forget();
    }
    std::vector<std::vector<float>> copies() const {
        std::vector<std::vector<float>> all{x.copy()};
        for (const Floats& part : weights.parts) all.push_back(copy(part));
        return all;
    }
    void compare(const reference::Layer& r) const {
        BOUND("layer, grad_x", x.error(r.grad_x), 2e-6);
        const reference::Numbers* expected[] = {
            &r.norm1_weight,  &r.norm1_bias,  &r.qkv_weight,     &r.qkv_bias,
            &r.out_weight,    &r.out_bias,    &r.norm2_weight,   &r.norm2_bias,
            &r.ffn_in_weight, &r.ffn_in_bias, &r.ffn_out_weight, &r.ffn_out_bias};
        for (int i = 0; i < 12; ++i) {
            const Floats& part = weights.parts[static_cast<size_t>(i)];
            check::Error error(1e-3);
            for (int64_t j = 0; j < part.size(); ++j)
                error.add(part[j], (*expected[i])[static_cast<size_t>(j)]);
            if (!(error.relative() <= 3e-6)) FAIL("gradient of weight %d", i);
            BOUND("layer, gradients of weights", error.relative(), 3e-6);
            CHECK(part.guards_intact());
        }
    }
};

void run(const Case& test) {
    static int64_t number = 0;
    check::Random random(static_cast<uint64_t>(++number));
    const int64_t dim = test.dim, hidden = test.hidden, heads = test.heads;
    const Packed packed(test.lengths, false, test.spread ? 3 : 0);
    const HeadsTensor x = matrix(packed, dim, test.spread), output = matrix(packed, dim);
    const HeadsTensor grad_output = matrix(packed, dim, test.spread);
    const HeadsTensor qkv = matrix(packed, 3 * dim), attended = matrix(packed, dim);
    const HeadsTensor lse = matrix(packed, heads), mid = matrix(packed, dim);
    const HeadsTensor hidden_input = matrix(packed, hidden);
    const HeadsTensor* saved[] = {&qkv, &attended, &lse, &mid, &hidden_input};
    const Twelve weights(dim, hidden);
    const Gradients grads(packed, dim, hidden);
    x.fill(random);
    grad_output.fill(random);
    weights.fill(dim, hidden, random);
    const reference::Mask mask{test.p, test.seed, test.first_row, test.first_row};
    const aam::LayerSaved all_saved{qkv.out().data, attended.out().data, lse.out().data,
                                    mid.out().data, hidden_input.out().data};
    const auto pointers = weights.pointers<aam::LayerWeights>();
    aam::LayerForward forward{x.in().data, x.in().row, output.out().data, {}, pointers,
                              packed.sequences(), dim, hidden, heads, mask.for_kernels(), 1};
    aam::LayerBackward backward{
        grad_output.in().data, grad_output.in().row, x.in().data, x.in().row, {},
        grads.x.out().data, grads.weights.pointers<aam::LayerGrads>(), pointers,
        packed.sequences(), dim, hidden, heads, mask.for_kernels(), 1};
    const reference::Layer expected = reference::layer(backward, mask);
    for (const Variant& variant : variants()) {
        std::vector<std::vector<float>> first;
        std::vector<float> first_output;
        for (int threads = 1; threads <= test.most_threads; ++threads)
            for (const bool keep : {false, true}) {
                check::at("layer, %s, %s, dim %d, hidden %d, heads %d, %s, %d threads", test.name,
                          variant.kernels->name, static_cast<int>(dim), static_cast<int>(hidden),
                          static_cast<int>(heads), keep ? "kept" : "recomputed", threads);
                for (const HeadsTensor* kept : saved) kept->forget();
                output.forget();
                grads.forget();
                forward.threads = backward.threads = threads;
                forward.saved = backward.saved = keep ? all_saved : aam::LayerSaved{};
                variant.kernels->layer_forward(forward);
                variant.kernels->layer_backward(backward);
                if (first.empty()) {
                    first = grads.copies();
                    first_output = output.copy();
                    BOUND("layer, output", output.error(expected.output), 1e-6);
                    grads.compare(expected);
                }
                // However it is cut among threads, and whatever is kept.
                if (!same(first_output, output.copy())) FAIL("another output");
                const auto again = grads.copies();
                for (size_t i = 0; i < first.size(); ++i)
                    if (!same(first[i], again[i])) FAIL("another gradient %d", static_cast<int>(i));
                if (!keep || threads > 1) continue;
                BOUND("layer, qkv", qkv.error(expected.qkv), 1e-6);
                BOUND("layer, attended", attended.error(expected.attended), 2e-6);
                BOUND("layer, lse", lse.error(expected.lse), 1e-6);
                BOUND("layer, mid", mid.error(expected.mid), 1e-6);
                BOUND("layer, hidden_input", hidden_input.error(expected.hidden_input), 1.5e-6);
            }
        // Any gradient alone, and all but it, are the same.
        for (uint32_t which = 0; which < 13 && test.most_threads > 2; ++which)
            for (const bool alone : {true, false}) {
                const uint32_t only = 1u << which, without = (alone ? ~only : only) & 0x1fff;
                check::at("layer, %s, %s, without gradients %x", test.name, variant.kernels->name,
                          without);
                grads.forget();
                backward.saved = {};
                backward.threads = 1;
                backward.grad_x = without & 0x1000 ? nullptr : grads.x.out().data;
                backward.grads = grads.weights.pointers<aam::LayerGrads>(without);
                variant.kernels->layer_backward(backward);
                const auto again = grads.copies();
                for (uint32_t i = 0; i < 13; ++i) {
                    const size_t at = i == 12 ? 0 : i + 1;
                    if (without >> i & 1) {
                        for (const float value : again[at])
                            if (!check::is_untouched(value)) {
                                FAIL("gradient %u was written", i);
                                break;
                            }
                    } else if (!same(first[at], again[at])) {
                        FAIL("gradient %u is another", i);
                    }
                }
                backward.grad_x = grads.x.out().data;
                backward.grads = grads.weights.pointers<aam::LayerGrads>();
            }
    }
}

}  // namespace

void test_layer() {
    const Lengths lengths{0, 1, 5, 0, 17, 33, 2, 0}, few{9, 0, 30};
    run({"lengths", lengths, 32, 64, 4});
    run({"the usual widths", {101, 40, 0, 151}, 128, 512, 4, 0.1, 7});
    run({"dim 48", few, 48, 7, 3, 0.2, 1, true});
    run({"dim 48, head_dim 8", few, 48, 65, 6});
    run({"dim 80", few, 80, 129, 2, 0.1, ~uint64_t{0}, false, 2});
    run({"dim 96, head_dim 12", few, 96, 33, 8, 0, 0, false, 2});
    run({"dim 112, head_dim 14", few, 112, 250, 8, 0, 0, true, 2});
    run({"dim 128, one head", few, 128, 130, 1, 0.5, 3, false, 2});
    run({"dim 160", lengths, 160, 333, 5, 0.1, 9, true, 2});
    run({"dim 176, head_dim 88", few, 176, 44, 2, 0, 0, false, 2});
    run({"dim 256", {20}, 256, 1030, 2, 0, 0, false, 1});
    run({"hidden 1", few, 32, 1, 2, 0.1, 2, false, 2});
    run({"long", {700, 3, 300}, 32, 48, 1, 0.1, 4, false, 2});
    run({"many short ones", Lengths(120, 3), 32, 40, 2, 0.1, 5, false, 3});
    // Pieces of gradients that are finished long before the first one.
    Lengths uneven(12, 160);
    uneven[0] = 1000;
    run({"pieces out of order", uneven, 32, 16, 4, 0, 0, false, 2});
    run({"dim 16", few, 16, 32, 2, 0, 0, false, 2});
    run({"first row", lengths, 32, 48, 2, 0.2, 6, false, 2, (int64_t{1} << 32) - 30});
    run({"no sequences", {}, 32, 64, 4});
    run({"only empty ones", {0, 0}, 32, 64, 4});
}
