// The encoder layer forward, a chunk of sequences at a time: everything it makes stays in cache.

#pragma once

#include "layer_parts.hpp"

namespace {

struct ForwardBuffers {
    float *qkv, *attended, *lse;                 // of a chunk
    float *normed, *mid, *hidden, *attention;    // of a tile
    int32_t *branch_rows, *hidden_rows, *output_rows;

    ForwardBuffers(Parts& parts, const LayerShape& s, const Chunks& chunks, bool keep) {
        const int64_t rows = chunks.most_rows, tile = least(rows, TILE_ROWS);
        qkv = parts.take(keep ? 0 : rows * s.qkv_row);
        attended = parts.take(keep ? 0 : rows * s.dim);
        lse = parts.take(keep ? 0 : rows * s.heads);
        normed = parts.take(tile * s.dim);
        mid = parts.take(keep ? 0 : tile * s.dim);
        hidden = parts.take(tile * s.hidden_row);
        attention = parts.take(head_forward_scratch(chunks.longest, chunks.longest, s.head_dim));
        branch_rows = parts.take_ints(tile);
        hidden_rows = parts.take_ints(tile);
        output_rows = parts.take_ints(tile);
    }
};

struct ForwardWork {
    const aam::LayerForward& call;
    const LayerShape& shape;
    const Chunks& chunks;
    const LayerPanels& panels;
    float* scratch;
    int64_t scratch_size;  // of a thread
    int64_t next = 0;

    void chunk(int64_t number, const ForwardBuffers& made) const {
        const LayerShape& s = shape;
        const aam::LayerWeights& w = call.weights;
        const bool keep = call.saved.qkv != nullptr;
        const int64_t first = chunks.first[number], last = chunks.first[number + 1];
        const int64_t start = call.sequences.start(first);
        const int64_t rows = call.sequences.start(last) - start;
        float* qkv = keep ? call.saved.qkv + start * s.qkv : made.qkv;
        const int64_t qkv_row = keep ? s.qkv : s.qkv_row;
        float* attended = keep ? call.saved.attended + start * s.dim : made.attended;
        float* lse = keep ? call.saved.lse + start * s.heads : made.lse;
        for (int64_t tile = 0; tile < rows; tile += TILE_ROWS) {
            const int64_t count = least(TILE_ROWS, rows - tile);
            norm_rows({call.x + (start + tile) * call.x_row, call.x_row}, count, s.dim,
                      w.norm1_weight, w.norm1_bias, made.normed, s.dim);
            project({made.normed, s.dim}, count, panels.qkv, w.qkv_bias, qkv + tile * qkv_row,
                    qkv_row);
        }
        attend(s, call.sequences, first, last, call.dropout, {qkv, qkv_row}, attended, lse,
               made.attention);
        for (int64_t tile = 0; tile < rows; tile += TILE_ROWS)
            feed_forward(start + tile, least(TILE_ROWS, rows - tile), attended + tile * s.dim,
                         made);
    }

  private:
    // From attention's output to the layer's, for `count` rows from row `start` on.
    void feed_forward(int64_t start, int64_t count, const float* attended,
                      const ForwardBuffers& made) const {
        const LayerShape& s = shape;
        const aam::LayerWeights& w = call.weights;
        const Dropout& dropout = call.dropout;
        float* mid = call.saved.mid ? call.saved.mid + start * s.dim : made.mid;
        fill_row_factors(dropout, start, count, BRANCH_SITE, made.branch_rows);
        fill_row_factors(dropout, start, count, HIDDEN_SITE, made.hidden_rows);
        fill_row_factors(dropout, start, count, OUTPUT_SITE, made.output_rows);
        project_branch({attended, s.dim}, count, panels.out, w.out_bias,
                       {call.x + start * call.x_row, call.x_row}, dropout, made.branch_rows,
                       panels.columns, mid, s.dim);
        norm_rows({mid, s.dim}, count, s.dim, w.norm2_weight, w.norm2_bias, made.normed, s.dim);
        float* pre = call.saved.hidden_input ? call.saved.hidden_input + start * s.hidden : nullptr;
        product({made.normed, s.dim}, count, panels.ffn_in,
                [&](int64_t row, int64_t column, Floats sum) {
                    const Floats x = sum + load(panels.ffn_in_bias + column);
                    if (pre) {
                        float* to = pre + row * s.hidden + column;
                        if (column + WIDTH <= s.hidden) store(to, x);
                        else store_part(to, x, s.hidden - column);
                    }
                    Floats y = gelu(x);
                    if (dropout.on)
                        y = keep(dropout, made.hidden_rows[row], load(panels.columns + column), y) *
                            dropout.scale;
                    store(made.hidden + row * s.hidden_row + column, y);
                });
        project_branch({made.hidden, s.hidden_row}, count, panels.ffn_out, w.ffn_out_bias,
                       {mid, s.dim}, dropout, made.output_rows, panels.columns,
                       call.output + start * s.dim, s.dim);
    }
};

static void layer_forward(const aam::LayerForward& call) {
    const LayerShape shape(call.dim, call.hidden, call.heads);
    const aam::Scratch cuts(Chunks::memory(call.sequences));
    const Chunks chunks(call.sequences, cuts.data());
    if (chunks.count == 0) return;
    LayerPanels panels;
    Parts sizes{nullptr};
    panels.lay_out(sizes, shape, call.weights, false, true);
    const int64_t packed = sizes.used;
    ForwardBuffers(sizes, shape, chunks, call.saved.qkv != nullptr);
    const int64_t a_thread = sizes.used - packed;
    const int threads = static_cast<int>(least(call.threads, chunks.count));
    const aam::Scratch scratch(packed + a_thread * threads);
    Parts parts{scratch.data()};
    panels.lay_out(parts, shape, call.weights, false, true);
    panels.fill(shape, call.weights, call.dropout, threads);
    ForwardWork work{call, shape, chunks, panels, scratch.data() + packed, a_thread};
    aam::in_parallel(
        threads,
        [](void* context, int thread) {
            ForwardWork& work = *static_cast<ForwardWork*>(context);
            Parts parts{work.scratch + thread * work.scratch_size};
            const ForwardBuffers made(parts, work.shape, work.chunks,
                                      work.call.saved.qkv != nullptr);
            for (;;) {
                const int64_t number = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED);
                if (number >= work.chunks.count) return;
                work.chunk(number, made);
            }
        },
        &work);
}

}  // namespace
