// The encoder layer backward, a chunk of sequences at a time. What the forward pass did not keep
// is made again by the same functions. Gradients of the weights are summed a piece (a run of
// chunks) at a time, and the pieces in order, so that the number of threads changes no bit.

#pragma once

#include "layer_parts.hpp"
#include "ordered_sum.hpp"

namespace {

// Where the gradient of each weight lies in a sum; null in `wanted` what nobody asked for.
struct GradParts {
    float *norm1_weight, *norm1_bias, *qkv_weight, *qkv_bias, *out_weight, *out_bias;
    float *norm2_weight, *norm2_bias, *ffn_in_weight, *ffn_in_bias, *ffn_out_weight, *ffn_out_bias;

    GradParts(Parts& parts, const LayerShape& s) {
        norm1_weight = parts.take(s.dim);
        norm1_bias = parts.take(s.dim);
        qkv_weight = parts.take(s.qkv * s.dim);
        qkv_bias = parts.take(s.qkv);
        out_weight = parts.take(s.dim * s.dim);
        out_bias = parts.take(s.dim);
        norm2_weight = parts.take(s.dim);
        norm2_bias = parts.take(s.dim);
        ffn_in_weight = parts.take(s.hidden * s.dim);
        ffn_in_bias = parts.take(s.hidden_wide);
        ffn_out_weight = parts.take(s.dim * s.hidden_wide);
        ffn_out_bias = parts.take(s.dim);
    }
};

struct BackwardBuffers {
    float *qkv, *attended, *lse, *mid, *grad_attended, *grad_mid, *grad_qkv;  // of a chunk
    float *normed, *dropped, *pre, *hidden, *grad_hidden, *grad_normed, *attention;  // of a tile
    int32_t *branch_rows, *hidden_rows, *output_rows;

    BackwardBuffers(Parts& parts, const LayerShape& s, const Chunks& chunks, bool kept,
                    bool dropping) {
        const int64_t rows = chunks.most_rows, tile = least(rows, TILE_ROWS);
        qkv = parts.take(kept ? 0 : rows * s.qkv_row);
        attended = parts.take(kept ? 0 : rows * s.dim);
        lse = parts.take(kept ? 0 : rows * s.heads);
        mid = parts.take(kept ? 0 : tile * s.dim);
        grad_attended = parts.take(rows * s.dim);
        grad_mid = parts.take(rows * s.dim);
        grad_qkv = parts.take(rows * s.qkv_row);
        normed = parts.take(tile * s.dim);
        dropped = parts.take(dropping ? tile * s.dim : 0);
        pre = parts.take(kept ? 0 : tile * s.hidden_row);
        hidden = parts.take(tile * s.hidden_row);
        grad_hidden = parts.take(tile * s.hidden_row);
        grad_normed = parts.take(tile * s.dim);
        attention = parts.take(most(
            head_forward_scratch(chunks.longest, chunks.longest, s.head_dim),
            head_backward_scratch(chunks.longest, chunks.longest, s.head_dim)));
        branch_rows = parts.take_ints(tile);
        hidden_rows = parts.take_ints(tile);
        output_rows = parts.take_ints(tile);
    }
};

struct BackwardWork {
    const aam::LayerBackward& call;
    const LayerShape& shape;
    const Chunks& chunks;
    const LayerPanels& panels;
    OrderedSum& sum;
    float* scratch;
    int64_t scratch_size;  // of a thread
    int64_t next = 0;

    bool kept() const { return call.saved.qkv != nullptr; }

    void chunk(int64_t number, const BackwardBuffers& made, const GradParts& total) const {
        const LayerShape& s = shape;
        const int64_t first = chunks.first[number], last = chunks.first[number + 1];
        const int64_t start = call.sequences.start(first);
        const int64_t rows = call.sequences.start(last) - start;
        float* qkv = kept() ? call.saved.qkv + start * s.qkv : made.qkv;
        const int64_t qkv_row = kept() ? s.qkv : s.qkv_row;
        float* attended = kept() ? call.saved.attended + start * s.dim : made.attended;
        float* lse = kept() ? call.saved.lse + start * s.heads : made.lse;
        if (!kept()) {
            for (int64_t tile = 0; tile < rows; tile += TILE_ROWS) {
                const int64_t count = least(TILE_ROWS, rows - tile);
                norm1(start + tile, count, made);
                project({made.normed, s.dim}, count, panels.qkv, call.weights.qkv_bias,
                        qkv + tile * qkv_row, qkv_row);
            }
            attend(s, call.sequences, first, last, call.dropout, {qkv, qkv_row}, attended, lse,
                   made.attention);
        }
        for (int64_t tile = 0; tile < rows; tile += TILE_ROWS)
            feed_forward(start + tile, least(TILE_ROWS, rows - tile), attended + tile * s.dim,
                         made.grad_attended + tile * s.dim, made.grad_mid + tile * s.dim, made,
                         total);
        attention(first, last, {qkv, qkv_row}, attended, lse, made);
        for (int64_t tile = 0; tile < rows; tile += TILE_ROWS)
            projection(start + tile, least(TILE_ROWS, rows - tile),
                       made.grad_qkv + tile * s.qkv_row, made.grad_mid + tile * s.dim, made,
                       total);
    }

  private:
    Matrix x_rows(int64_t start) const { return {call.x + start * call.x_row, call.x_row}; }

    void norm1(int64_t start, int64_t count, const BackwardBuffers& made) const {
        norm_rows(x_rows(start), count, shape.dim, call.weights.norm1_weight,
                  call.weights.norm1_bias, made.normed, shape.dim);
    }

    // x where kept, scaled; the rows themselves when nothing is dropped.
    Matrix drop(Matrix x, int64_t count, const int32_t* factors, float* to) const {
        if (!call.dropout.on) return x;
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < shape.dim; i += WIDTH) {
                const Floats value = load(x.data + row * x.row + i);
                const Ints columns = load(panels.columns + i);
                store(to + row * shape.dim + i,
                      keep(call.dropout, factors[row], columns, value) * call.dropout.scale);
            }
        return {to, shape.dim};
    }

    // weight (out, in) += grad^T x; bias (out,) += column sums of grad. `out` is as wide as rows
    // of the sums are apart.
    static void add_weight(Matrix grad, Matrix x, int64_t count, int64_t outs, int64_t ins,
                           float* weight, float* bias, bool want_weight, bool want_bias) {
        if (want_weight)
            add_product({grad.data, 1, grad.row}, outs, x.data, x.row, count, ins, weight,
                        rounded_up(ins, 16));
        if (want_bias) add_columns(grad, count, outs, bias);
    }

    // From the gradient of the layer's output to those of `mid` and of attention's output.
    void feed_forward(int64_t start, int64_t count, const float* attended, float* grad_attended,
                      float* grad_mid, const BackwardBuffers& made, const GradParts& total) const {
        const LayerShape& s = shape;
        const aam::LayerWeights& w = call.weights;
        const aam::LayerGrads& want = call.grads;
        const Dropout& dropout = call.dropout;
        fill_row_factors(dropout, start, count, BRANCH_SITE, made.branch_rows);
        fill_row_factors(dropout, start, count, HIDDEN_SITE, made.hidden_rows);
        fill_row_factors(dropout, start, count, OUTPUT_SITE, made.output_rows);
        const float* mid = kept() ? call.saved.mid + start * s.dim : made.mid;
        if (!kept())
            project_branch({attended, s.dim}, count, panels.out, w.out_bias, x_rows(start),
                           dropout, made.branch_rows, panels.columns, made.mid, s.dim);
        norm_rows({mid, s.dim}, count, s.dim, w.norm2_weight, w.norm2_bias, made.normed, s.dim);
        if (!kept())
            project({made.normed, s.dim}, count, panels.ffn_in, panels.ffn_in_bias, made.pre,
                    s.hidden_row);
        activate(count,
                 kept() ? Matrix{call.saved.hidden_input + start * s.hidden, s.hidden}
                        : Matrix{made.pre, s.hidden_row},
                 made);

        const Matrix grad_output{call.grad_output + start * call.grad_output_row,
                                 call.grad_output_row};
        Matrix grad = drop(grad_output, count, made.output_rows, made.dropped);
        add_weight(grad, {made.hidden, s.hidden_row}, count, s.dim, s.hidden,
                   total.ffn_out_weight, total.ffn_out_bias, want.ffn_out_weight,
                   want.ffn_out_bias);
        product(grad, count, panels.ffn_out_back, [&](int64_t row, int64_t column, Floats sum) {
            float* place = made.grad_hidden + row * s.hidden_row + column;
            store(place, sum * load(place));  // where `activate` has left the slope
        });
        const Matrix grad_hidden{made.grad_hidden, s.hidden_row};
        add_weight(grad_hidden, {made.normed, s.dim}, count, s.hidden, s.dim,
                   total.ffn_in_weight, total.ffn_in_bias, want.ffn_in_weight, want.ffn_in_bias);
        product(grad_hidden, count, panels.ffn_in_back,
                [&](int64_t row, int64_t column, Floats sum) {
                    store(made.grad_normed + row * s.dim + column, sum);
                });
        norm_backward_rows({made.grad_normed, s.dim}, {mid, s.dim}, grad_output, count, s.dim,
                           w.norm2_weight, grad_mid, s.dim, total.norm2_weight,
                           total.norm2_bias);
        grad = drop({grad_mid, s.dim}, count, made.branch_rows, made.dropped);
        add_weight(grad, {attended, s.dim}, count, s.dim, s.dim, total.out_weight,
                   total.out_bias, want.out_weight, want.out_bias);
        product(grad, count, panels.out_back, [&](int64_t row, int64_t column, Floats sum) {
            store(grad_attended + row * s.dim + column, sum);
        });
    }

    // hidden = drop(gelu(pre)); its slope goes where the gradient will be.
    void activate(int64_t count, Matrix pre, const BackwardBuffers& made) const {
        const LayerShape& s = shape;
        const Dropout& dropout = call.dropout;
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < s.hidden_wide; i += WIDTH) {
                const float* from = pre.data + row * pre.row + i;
                const Floats x = i + WIDTH <= s.hidden ? load(from)
                                 : i < s.hidden        ? load_part(from, s.hidden - i)
                                                       : Floats{};
                Floats value, slope;
                gelu_and_slope(x, value, slope);
                if (dropout.on) {
                    const Ints columns = load(panels.columns + i);
                    const int32_t factor = made.hidden_rows[row];
                    value = keep(dropout, factor, columns, value) * dropout.scale;
                    slope = keep(dropout, factor, columns, slope) * dropout.scale;
                }
                store(made.hidden + row * s.hidden_row + i, value);
                store(made.grad_hidden + row * s.hidden_row + i, slope);
            }
    }

    void attention(int64_t first, int64_t last, Matrix qkv, const float* attended,
                   const float* lse, const BackwardBuffers& made) const {
        const LayerShape& s = shape;
        const int64_t start = call.sequences.start(first);
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = call.sequences.start(i) - start;
            const int64_t length = call.sequences.length(i);
            if (length == 0) continue;
            for (int64_t head = 0; head < s.heads; ++head) {
                const int64_t at = head * s.head_dim;
                const float* query = qkv.data + row * qkv.row + at;
                HeadBackward part{};
                part.grad_output = {made.grad_attended + row * s.dim + at, s.dim};
                part.query = {query, qkv.row};
                part.key = {query + s.dim, qkv.row};
                part.value = {query + 2 * s.dim, qkv.row};
                part.output = {attended + row * s.dim + at, s.dim};
                part.lse = lse + row * s.heads + head;
                part.lse_row = s.heads;
                part.grad_query = made.grad_qkv + row * s.qkv_row + at;
                part.grad_key = part.grad_query + s.dim;
                part.grad_value = part.grad_query + 2 * s.dim;
                part.grad_query_row = part.grad_key_row = part.grad_value_row = s.qkv_row;
                part.length = part.key_length = length;
                part.head_dim = s.head_dim;
                part.scale = 1.0f / sqrtf(static_cast<float>(s.head_dim));
                part.dropout = call.dropout;
                part.first_query = part.first_key =
                    call.dropout.first_row + static_cast<uint32_t>(start + row);
                part.head = static_cast<uint32_t>(head);
                head_backward(part, made.attention);
            }
        }
    }

    // From the gradient of queries, keys and values to that of x.
    void projection(int64_t start, int64_t count, const float* grad_qkv, const float* grad_mid,
                    const BackwardBuffers& made, const GradParts& total) const {
        const LayerShape& s = shape;
        const aam::LayerGrads& want = call.grads;
        const Matrix grad{grad_qkv, s.qkv_row};
        norm1(start, count, made);
        add_weight(grad, {made.normed, s.dim}, count, s.qkv, s.dim, total.qkv_weight,
                   total.qkv_bias, want.qkv_weight, want.qkv_bias);
        if (!call.grad_x && !want.norm1_weight && !want.norm1_bias) return;
        product(grad, count, panels.qkv_back, [&](int64_t row, int64_t column, Floats sum) {
            store(made.grad_normed + row * s.dim + column, sum);
        });
        float* grad_x = call.grad_x ? call.grad_x + start * s.dim : made.grad_normed;
        norm_backward_rows({made.grad_normed, s.dim}, x_rows(start), {grad_mid, s.dim}, count,
                           s.dim, call.weights.norm1_weight, grad_x, s.dim, total.norm1_weight,
                           total.norm1_bias);
    }
};

// What has been summed, without the padding of its rows, to where it was asked for.
static void give_grads(const LayerShape& s, const GradParts& total, const aam::LayerGrads& to) {
    const auto give = [](const float* from, int64_t from_row, float* grad, int64_t rows,
                         int64_t columns) {
        for (int64_t row = 0; grad && row < rows; ++row)
            memcpy(grad + row * columns, from + row * from_row,
                   static_cast<size_t>(columns) * sizeof(float));
    };
    give(total.norm1_weight, s.dim, to.norm1_weight, 1, s.dim);
    give(total.norm1_bias, s.dim, to.norm1_bias, 1, s.dim);
    give(total.qkv_weight, s.dim, to.qkv_weight, s.qkv, s.dim);
    give(total.qkv_bias, s.qkv, to.qkv_bias, 1, s.qkv);
    give(total.out_weight, s.dim, to.out_weight, s.dim, s.dim);
    give(total.out_bias, s.dim, to.out_bias, 1, s.dim);
    give(total.norm2_weight, s.dim, to.norm2_weight, 1, s.dim);
    give(total.norm2_bias, s.dim, to.norm2_bias, 1, s.dim);
    give(total.ffn_in_weight, s.dim, to.ffn_in_weight, s.hidden, s.dim);
    give(total.ffn_in_bias, s.hidden_wide, to.ffn_in_bias, 1, s.hidden);
    give(total.ffn_out_weight, s.hidden_wide, to.ffn_out_weight, s.dim, s.hidden);
    give(total.ffn_out_bias, s.dim, to.ffn_out_bias, 1, s.dim);
}

static void backward_thread(void* context, int thread) {
    BackwardWork& work = *static_cast<BackwardWork*>(context);
    Parts parts{work.scratch + thread * work.scratch_size};
    const BackwardBuffers made(parts, work.shape, work.chunks, work.kept(), work.call.dropout.on);
    for (;;) {
        const int place = work.sum.take();
        const int64_t piece = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED);
        if (piece >= work.chunks.pieces) {
            work.sum.give_back(place);
            return;
        }
        Parts grads{work.sum.place_data(place)};
        const GradParts total(grads, work.shape);
        const int64_t end = work.chunks.piece[piece + 1];
        for (int64_t chunk = work.chunks.piece[piece]; chunk < end; ++chunk)
            work.chunk(chunk, made, total);
        work.sum.finished(piece, place);
    }
}

static void layer_backward(const aam::LayerBackward& call) {
    const LayerShape shape(call.dim, call.hidden, call.heads);
    const bool kept = call.saved.qkv != nullptr;
    const aam::Scratch cuts(Chunks::memory(call.sequences));
    const Chunks chunks(call.sequences, cuts.data());
    const int threads = static_cast<int>(most(1, least(call.threads, chunks.pieces)));

    LayerPanels panels;
    Parts sizes{nullptr};
    panels.lay_out(sizes, shape, call.weights, true, !kept);
    const int64_t packed = sizes.used;
    BackwardBuffers(sizes, shape, chunks, kept, call.dropout.on);
    const int64_t a_thread = sizes.used - packed;
    Parts grad_sizes{nullptr};
    GradParts(grad_sizes, shape);
    const int64_t summed = OrderedSum::size(grad_sizes.used, threads);
    const aam::Scratch scratch(packed + a_thread * threads + summed + chunks.pieces);
    Parts parts{scratch.data()};
    panels.lay_out(parts, shape, call.weights, true, !kept);
    float* a_threads = parts.take(a_thread * threads);
    float* sums = parts.take(summed);
    OrderedSum sum(sums, grad_sizes.used, threads, parts.take_ints(chunks.pieces), chunks.pieces);
    if (chunks.pieces > 0) {
        panels.fill(shape, call.weights, call.dropout, threads);
        BackwardWork work{call, shape, chunks, panels, sum, a_threads, a_thread};
        aam::in_parallel(threads, backward_thread, &work);
    }
    Parts grads{sum.total()};
    give_grads(shape, GradParts(grads, shape), call.grads);
}

}  // namespace
