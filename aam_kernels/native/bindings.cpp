// The Python module: `aam_kernels._native`.
//
// Tensors come by DLPack, float32 on the CPU. What is computed, and in which shapes, is written at
// the operations' `cpu.py`; strides of rows and heads are free, the last dimension is dense.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "arguments.hpp"
#include "interface.hpp"
#include "processor.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace aam;
using namespace nanobind::literals;

namespace {

constexpr int64_t LARGEST_HEAD = 128;

int threads_from(int64_t threads) {
    return static_cast<int>(std::min<int64_t>(positive(threads, "threads"), 1024));
}

int64_t head_dim_from(int64_t head_dim) {
    if (head_dim < 1 || head_dim > LARGEST_HEAD)
        throw std::invalid_argument("head_dim: expected 1 to " + std::to_string(LARGEST_HEAD) +
                                    ", got " + std::to_string(head_dim));
    return head_dim;
}

template <class Call>
void run(void (*kernel)(const Call&), const Call& call) {
    const nb::gil_scoped_release released;
    kernel(call);
}

// Query, key and value, and where their sequences are.
struct AttentionInputs {
    AttentionInputs(nb::handle query_, nb::handle key_, nb::handle value_, nb::handle offsets,
                    nb::handle lengths, nb::handle key_offsets, nb::handle key_lengths)
        : query(query_, "query", {ANY, ANY, ANY}, Layout::Rows),
          rows(query.size(0)), heads(query.size(1)), head_dim(head_dim_from(query.size(2))),
          key(key_, "key", {key_offsets.is_none() ? rows : ANY, heads, head_dim}, Layout::Rows),
          key_rows(key.size(0)),
          value(value_, "value", {key_rows, heads, head_dim}, Layout::Rows),
          queries(offsets, lengths, rows) {
        if (key_offsets.is_none()) {
            if (!key_lengths.is_none())
                throw std::invalid_argument("key_lengths: expected None without key_offsets");
            return;
        }
        keys.emplace(key_offsets, key_lengths, key_rows, "key_");
        if (keys->count() != queries.count())
            throw std::invalid_argument("key_offsets: expected " +
                                        std::to_string(queries.count()) + " sequences, got " +
                                        std::to_string(keys->count()));
    }

    Sequences key_sequences() const { return keys ? keys->sequences() : queries.sequences(); }

    Tensor query;
    int64_t rows, heads, head_dim;
    Tensor key;
    int64_t key_rows;
    Tensor value;
    SequenceTensors queries;
    std::optional<SequenceTensors> keys;
};

void attention_forward(nb::handle query, nb::handle key, nb::handle value, nb::handle output_,
                       nb::handle lse_, nb::handle offsets, nb::handle lengths,
                       nb::handle key_offsets, nb::handle key_lengths, float scale,
                       double dropout_p, int64_t seed, int64_t first_row, int64_t first_key_row,
                       int64_t threads) {
    const AttentionInputs in(query, key, value, offsets, lengths, key_offsets, key_lengths);
    const Tensor output(output_, "output", {in.rows, in.heads, in.head_dim}, Layout::Rows);
    const Tensor lse(lse_, "lse", {in.rows, in.heads});
    run(selected().attention_forward,
        AttentionForward{in.query.heads(), in.key.heads(), in.value.heads(), output.heads_out(),
                         lse.floats(), in.queries.sequences(), in.key_sequences(), in.heads,
                         in.head_dim, scale, dropout(dropout_p, seed, first_row, first_key_row),
                         threads_from(threads)});
}

void attention_backward(nb::handle grad_output_, nb::handle query, nb::handle key,
                        nb::handle value, nb::handle output_, nb::handle lse_,
                        nb::handle grad_query_, nb::handle grad_key_, nb::handle grad_value_,
                        nb::handle offsets, nb::handle lengths, nb::handle key_offsets,
                        nb::handle key_lengths, float scale, double dropout_p, int64_t seed,
                        int64_t first_row, int64_t first_key_row, int64_t threads) {
    const AttentionInputs in(query, key, value, offsets, lengths, key_offsets, key_lengths);
    const auto like_query = {in.rows, in.heads, in.head_dim};
    const auto like_key = {in.key_rows, in.heads, in.head_dim};
    const Tensor grad_output(grad_output_, "grad_output", like_query, Layout::Rows);
    const Tensor output(output_, "output", like_query, Layout::Rows);
    const Tensor lse(lse_, "lse", {in.rows, in.heads});
    const Tensor grad_query(grad_query_, "grad_query", like_query, Layout::Rows);
    const Tensor grad_key(grad_key_, "grad_key", like_key, Layout::Rows);
    const Tensor grad_value(grad_value_, "grad_value", like_key, Layout::Rows);
    run(selected().attention_backward,
        AttentionBackward{grad_output.heads(), in.query.heads(), in.key.heads(), in.value.heads(),
                          output.heads(), lse.floats(), grad_query.heads_out(),
                          grad_key.heads_out(), grad_value.heads_out(), in.queries.sequences(),
                          in.key_sequences(), in.heads, in.head_dim, scale,
                          dropout(dropout_p, seed, first_row, first_key_row),
                          threads_from(threads)});
}

void pooling_forward(nb::handle values_, nb::handle scores_, nb::handle pooled_, nb::handle lse_,
                     nb::handle offsets, nb::handle lengths, int64_t threads) {
    const Tensor values(values_, "values", {ANY, ANY}, Layout::Rows);
    const int64_t rows = values.size(0), dim = values.size(1);
    const Tensor scores(scores_, "scores", {rows}, Layout::Strided);
    const SequenceTensors sequences(offsets, lengths, rows);
    const Tensor pooled(pooled_, "pooled", {sequences.count(), dim});
    const Tensor lse(lse_, "lse", {sequences.count()});
    run(selected().pooling_forward,
        PoolingForward{values.floats(), values.stride(0), scores.floats(), scores.stride(0),
                       pooled.floats(), lse.floats(), sequences.sequences(), dim,
                       threads_from(threads)});
}

void pooling_backward(nb::handle grad_pooled_, nb::handle values_, nb::handle scores_,
                      nb::handle pooled_, nb::handle lse_, nb::handle grad_values_,
                      nb::handle grad_scores_, nb::handle offsets, nb::handle lengths,
                      int64_t threads) {
    const Tensor values(values_, "values", {ANY, ANY}, Layout::Rows);
    const int64_t rows = values.size(0), dim = values.size(1);
    const Tensor scores(scores_, "scores", {rows}, Layout::Strided);
    const SequenceTensors sequences(offsets, lengths, rows);
    const Tensor grad_pooled(grad_pooled_, "grad_pooled", {sequences.count(), dim});
    const Tensor pooled(pooled_, "pooled", {sequences.count(), dim});
    const Tensor lse(lse_, "lse", {sequences.count()});
    const Tensor grad_values(grad_values_, "grad_values", {rows, dim});
    const Tensor grad_scores(grad_scores_, "grad_scores", {rows});
    run(selected().pooling_backward,
        PoolingBackward{grad_pooled.floats(), values.floats(), values.stride(0), scores.floats(),
                        scores.stride(0), pooled.floats(), lse.floats(), grad_values.floats(),
                        grad_scores.floats(), sequences.sequences(), dim, threads_from(threads)});
}

// The twelve weights of a layer, or as many gradients (where null is one not asked for).
struct LayerTensors {
    // A hidden width of ANY is taken from the weights.
    LayerTensors(nb::handle list, const char* name, int64_t dim, int64_t hidden, bool optional) {
        const std::vector<nb::handle> given = elements(list, name, COUNT);
        const auto make = [&](size_t place, std::initializer_list<int64_t> shape) {
            if (optional && given[place].is_none()) return;
            const std::string full = std::string(name) + "[" + std::to_string(place) + "]";
            tensors[place].emplace(given[place], full, shape);
        };
        make(0, {dim}), make(1, {dim});
        make(2, {3 * dim, dim}), make(3, {3 * dim});
        make(4, {dim, dim}), make(5, {dim});
        make(6, {dim}), make(7, {dim});
        make(8, {hidden, dim});
        if (hidden == ANY) hidden = tensors[8]->size(0);
        make(9, {hidden});
        make(10, {dim, hidden}), make(11, {dim});
        hidden_width = hidden;
    }

    float* at(size_t place) const { return tensors[place] ? tensors[place]->floats() : nullptr; }

    template <class Pointers>
    Pointers pointers() const {
        return {at(0), at(1), at(2), at(3), at(4),  at(5),
                at(6), at(7), at(8), at(9), at(10), at(11)};
    }

    static constexpr size_t COUNT = 12;
    std::optional<Tensor> tensors[COUNT];
    int64_t hidden_width;
};

// What both passes of a layer are given.
struct LayerInputs {
    LayerInputs(nb::handle x_, nb::handle saved_, nb::handle weights_, nb::handle offsets,
                int64_t heads_)
        : x(x_, "x", {ANY, ANY}, Layout::Rows), rows(x.size(0)), dim(x.size(1)),
          heads(positive(heads_, "heads")), weights(weights_, "weights", dim, ANY, false),
          hidden(weights.hidden_width), sequences(offsets, nb::none(), rows) {
        if (dim % 16 || dim == 0)
            throw std::invalid_argument("x: expected a width that is a multiple of 16, got " +
                                        std::to_string(dim));
        if (dim % heads)
            throw std::invalid_argument("heads: expected a divisor of the width " +
                                        std::to_string(dim) + ", got " + std::to_string(heads));
        head_dim_from(dim / heads);
        if (hidden == 0)
            throw std::invalid_argument("weights[8]: expected at least one hidden feature, got 0");
        if (saved_.is_none()) return;
        const std::vector<nb::handle> given = elements(saved_, "saved", 5);
        const int64_t widths[] = {3 * dim, dim, heads, dim, hidden};
        for (size_t i = 0; i < 5; ++i)
            kept.emplace_back(given[i], "saved[" + std::to_string(i) + "]",
                              std::initializer_list<int64_t>{rows, widths[i]});
    }

    LayerSaved saved() const {
        if (kept.empty()) return {};
        return {kept[0].floats(), kept[1].floats(), kept[2].floats(), kept[3].floats(),
                kept[4].floats()};
    }

    Tensor x;
    int64_t rows, dim, heads;
    LayerTensors weights;
    int64_t hidden;
    SequenceTensors sequences;
    std::vector<Tensor> kept;
};

void layer_forward(nb::handle x, nb::handle output_, nb::handle saved, nb::handle weights,
                   nb::handle offsets, int64_t heads, double dropout_p, int64_t seed,
                   int64_t first_row, int64_t threads) {
    const LayerInputs in(x, saved, weights, offsets, heads);
    const Tensor output(output_, "output", {in.rows, in.dim});
    run(selected().layer_forward,
        LayerForward{in.x.floats(), in.x.stride(0), output.floats(), in.saved(),
                     in.weights.pointers<LayerWeights>(), in.sequences.sequences(), in.dim,
                     in.hidden, in.heads, dropout(dropout_p, seed, first_row, first_row),
                     threads_from(threads)});
}

void layer_backward(nb::handle grad_output_, nb::handle x, nb::handle saved, nb::handle grad_x_,
                    nb::handle grads_, nb::handle weights, nb::handle offsets, int64_t heads,
                    double dropout_p, int64_t seed, int64_t first_row, int64_t threads) {
    const LayerInputs in(x, saved, weights, offsets, heads);
    const Tensor grad_output(grad_output_, "grad_output", {in.rows, in.dim}, Layout::Rows);
    std::optional<Tensor> grad_x;
    if (!grad_x_.is_none())
        grad_x.emplace(grad_x_, "grad_x", std::initializer_list<int64_t>{in.rows, in.dim});
    const LayerTensors grads(grads_, "grads", in.dim, in.hidden, true);
    run(selected().layer_backward,
        LayerBackward{grad_output.floats(), grad_output.stride(0), in.x.floats(), in.x.stride(0),
                      in.saved(), grad_x ? grad_x->floats() : nullptr,
                      grads.pointers<LayerGrads>(), in.weights.pointers<LayerWeights>(),
                      in.sequences.sequences(), in.dim, in.hidden, in.heads,
                      dropout(dropout_p, seed, first_row, first_row), threads_from(threads)});
}

std::vector<std::string> names(const std::vector<const Kernels*>& variants) {
    std::vector<std::string> list;
    for (const Kernels* kernels : variants) list.emplace_back(kernels->name);
    return list;
}

double multiply_adds(int64_t rounds, const std::optional<std::string>& name, int64_t threads) {
    struct Work {
        const Kernels& kernels;
        int64_t rounds;
    } work{name ? variant(*name) : selected(), positive(rounds, "rounds")};
    const int count = threads_from(threads);
    const nb::gil_scoped_release released;
    in_parallel(
        count,
        [](void* context, int) {
            const Work& work = *static_cast<const Work*>(context);
            work.kernels.multiply_adds(work.rounds);
        },
        &work);
    return 10.0 * work.kernels.width * static_cast<double>(rounds) * count;
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "The CPU kernels, compiled: see aam_kernels/native.";
    module.def("attention_forward", &attention_forward, "query"_a, "key"_a, "value"_a, "output"_a,
               "lse"_a, "offsets"_a, "lengths"_a.none(), "key_offsets"_a.none(),
               "key_lengths"_a.none(), "scale"_a, "dropout_p"_a, "seed"_a, "first_row"_a,
               "first_key_row"_a, "threads"_a);
    module.def("attention_backward", &attention_backward, "grad_output"_a, "query"_a, "key"_a,
               "value"_a, "output"_a, "lse"_a, "grad_query"_a, "grad_key"_a, "grad_value"_a,
               "offsets"_a, "lengths"_a.none(), "key_offsets"_a.none(), "key_lengths"_a.none(),
               "scale"_a, "dropout_p"_a, "seed"_a, "first_row"_a, "first_key_row"_a,
               "threads"_a);
    module.def("pooling_forward", &pooling_forward, "values"_a, "scores"_a, "pooled"_a, "lse"_a,
               "offsets"_a, "lengths"_a.none(), "threads"_a);
    module.def("pooling_backward", &pooling_backward, "grad_pooled"_a, "values"_a, "scores"_a,
               "pooled"_a, "lse"_a, "grad_values"_a, "grad_scores"_a, "offsets"_a,
               "lengths"_a.none(), "threads"_a);
    module.def("layer_forward", &layer_forward, "x"_a, "output"_a, "saved"_a.none(), "weights"_a,
               "offsets"_a, "heads"_a, "dropout_p"_a, "seed"_a, "first_row"_a, "threads"_a);
    module.def("layer_backward", &layer_backward, "grad_output"_a, "x"_a, "saved"_a.none(),
               "grad_x"_a.none(), "grads"_a, "weights"_a, "offsets"_a, "heads"_a, "dropout_p"_a,
               "seed"_a, "first_row"_a, "threads"_a);
    module.def(
        "compiled", [] { return names(compiled()); },
        "Names of the variants in this build, best first.");
    module.def(
        "runnable", [] { return names(runnable()); },
        "Names of the variants that this processor runs, best first.");
    module.def(
        "selected", [] { return selected().name; },
        "Name of the variant in use. Raises ValueError when AAM_KERNELS_CPU names none that runs.");
    module.def(
        "width", [] { return selected().width; }, "Floats in a vector of the variant in use.");
    module.def(
        "select", [](const std::optional<std::string>& name) { select(name.value_or("")); },
        "name"_a.none(),
        "Uses a variant from now on; None: what AAM_KERNELS_CPU says, else the best.");
    module.def("threads_of", &threads_of, "Whose threads the kernels run on, in words.");
    module.def("multiply_adds", &multiply_adds, "rounds"_a, "name"_a = nb::none(),
               "threads"_a = 1,
               "Runs multiply-adds that wait for nothing but registers, `rounds` of them on every "
               "thread, and gives their number.");
}
