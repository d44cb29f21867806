// What the encoder layer's forward and backward passes share: sizes, packed weights, how a batch
// is cut, and the steps that are computed again, to the bit, in the backward pass.

#pragma once

#include "attention.hpp"
#include "norm.hpp"

namespace {

constexpr uint32_t BRANCH_SITE = 1, HIDDEN_SITE = 2, OUTPUT_SITE = 3;

// Rows 1,024 bytes apart share few sets of a cache: a line more between them, then.
constexpr int64_t spaced(int64_t width) {
    const int64_t wide = rounded_up(width, 16);
    return wide % 256 == 0 ? wide + 16 : wide;
}

struct LayerShape {
    int64_t dim, hidden, heads;
    int64_t head_dim, qkv, qkv_row, hidden_wide, hidden_row;

    LayerShape(int64_t dim, int64_t hidden, int64_t heads)
        : dim(dim), hidden(hidden), heads(heads), head_dim(dim / heads), qkv(3 * dim),
          qkv_row(spaced(3 * dim)), hidden_wide(rounded_up(hidden, 16)),
          hidden_row(spaced(hidden)) {}
};

// Hands out consecutive parts of one block of memory; without a block it only counts.
struct Parts {
    float* base;
    int64_t used = 0;

    float* take(int64_t floats) {
        float* part = base ? base + used : nullptr;
        used += rounded_up(floats, 16);
        return part;
    }
    int32_t* take_ints(int64_t count) { return reinterpret_cast<int32_t*>(take(count)); }
};

// The weights as panels; those of the backward pass are of the transposed products.
struct LayerPanels {
    Panels qkv, out, ffn_in, ffn_out;
    Panels qkv_back, out_back, ffn_in_back, ffn_out_back;
    float* ffn_in_bias;  // with zeros to hidden_wide
    int32_t* columns;    // column factors of the features, when dropping

    struct Job {
        Matrix from;
        Panels* panels;
        int64_t depth, columns;
    };
    static constexpr int MOST_JOBS = 8;
    Job jobs[MOST_JOBS];
    int job_count = 0;

    void add(Parts& parts, Panels& panels, Matrix from, int64_t depth, int64_t columns) {
        panels = {parts.take(packed_size(depth, columns)), depth, columns};
        jobs[job_count++] = {from, &panels, depth, columns};
    }
    void lay_out(Parts& parts, const LayerShape& s, const aam::LayerWeights& w, bool backward,
                 bool recompute) {
        job_count = 0;
        if (!backward || recompute) {
            add(parts, qkv, {w.qkv_weight, 1, s.dim}, s.dim, s.qkv);
            add(parts, out, {w.out_weight, 1, s.dim}, s.dim, s.dim);
            add(parts, ffn_in, {w.ffn_in_weight, 1, s.dim}, s.dim, s.hidden);
        }
        if (!backward) add(parts, ffn_out, {w.ffn_out_weight, 1, s.hidden}, s.hidden, s.dim);
        if (backward) {
            add(parts, qkv_back, {w.qkv_weight, s.dim}, s.qkv, s.dim);
            add(parts, out_back, {w.out_weight, s.dim}, s.dim, s.dim);
            add(parts, ffn_in_back, {w.ffn_in_weight, s.dim}, s.hidden, s.dim);
            add(parts, ffn_out_back, {w.ffn_out_weight, s.hidden}, s.dim, s.hidden);
        }
        ffn_in_bias = parts.take(s.hidden_wide);
        columns = parts.take_ints(s.hidden_wide < s.dim ? s.dim : s.hidden_wide);
    }
    void fill(const LayerShape& s, const aam::LayerWeights& w, const Dropout& dropout,
              int threads) {
        memset(ffn_in_bias, 0, static_cast<size_t>(s.hidden_wide) * sizeof(float));
        memcpy(ffn_in_bias, w.ffn_in_bias, static_cast<size_t>(s.hidden) * sizeof(float));
        const int64_t features = most(s.dim, s.hidden_wide);
        for (int64_t j = 0; dropout.on && j < features; ++j)
            columns[j] = column_factor(static_cast<uint32_t>(j));
        next_ = 0;
        aam::in_parallel(threads, pack_some, this);
    }

  private:
    int64_t next_ = 0;

    static void pack_some(void* context, int) {
        LayerPanels& all_panels = *static_cast<LayerPanels*>(context);
        for (;;) {
            int64_t panel = __atomic_fetch_add(&all_panels.next_, 1, __ATOMIC_RELAXED);
            const Job *job = all_panels.jobs, *end = job + all_panels.job_count;
            while (job != end && panel >= panels_of(job->columns))
                panel -= panels_of((job++)->columns);
            if (job == end) return;
            pack(job->from, job->depth, job->columns, const_cast<float*>(job->panels->data),
                 panel, panel + 1);
        }
    }
};

// Consecutive sequences that go through the layer together, and of these what adds up to one
// piece of the weights' gradients. How a batch is cut depends on its offsets alone.
constexpr int64_t CHUNK_ROWS = 128;
constexpr int64_t TILE_ROWS = 256;
constexpr int64_t LEAST_PIECE_ROWS = 320, MOST_PIECE_ROWS = 2048;

struct Chunks {
    int64_t count = 0;       // of chunks
    int64_t pieces = 0;      // of runs of chunks
    int64_t most_rows = 0;   // in one chunk
    int64_t longest = 0;     // sequence
    int64_t* first;          // (count + 1,) sequence where a chunk starts
    int64_t* piece;          // (pieces + 1,) chunk where a piece starts

    static int64_t memory(const aam::Sequences& sequences) {
        return 4 * (sequences.count + 2);  // two arrays of 64-bit numbers, as floats
    }
    Chunks(const aam::Sequences& sequences, float* memory) {
        first = reinterpret_cast<int64_t*>(memory);
        piece = first + sequences.count + 2;
        int64_t rows = 0, piece_rows = 0, left = sequences.offsets[sequences.count];
        first[0] = piece[0] = 0;
        for (int64_t i = 0; i < sequences.count; ++i) {
            const int64_t length = sequences.length(i);
            if (rows > 0 && rows + length > CHUNK_ROWS + CHUNK_ROWS / 2)
                close(i, rows, piece_rows, left);
            rows += length;
            longest = most(longest, length);
            if (rows >= CHUNK_ROWS) close(i + 1, rows, piece_rows, left);
        }
        if (rows > 0) close(sequences.count, rows, piece_rows, left);
        if (piece_rows > 0) piece[++pieces] = count;
    }

  private:
    void close(int64_t sequence, int64_t& rows, int64_t& piece_rows, int64_t& left) {
        first[++count] = sequence;
        most_rows = most(most_rows, rows);
        piece_rows += rows;
        left -= rows;
        rows = 0;
        // Smaller and smaller pieces: the threads end at nearly the same time.
        const int64_t sixth = (left + piece_rows) / 6;
        const int64_t target = most(LEAST_PIECE_ROWS, least(MOST_PIECE_ROWS, sixth));
        if (piece_rows >= target) {
            piece[++pieces] = count;
            piece_rows = 0;
        }
    }
};

// Row factors of one dropout site for `rows` tokens from `first` on.
static inline void fill_row_factors(const Dropout& dropout, int64_t first, int64_t rows,
                                    uint32_t site, int32_t* factors) {
    const uint32_t place = dropout.first_row + static_cast<uint32_t>(first);
    for (int64_t row = 0; dropout.on && row < rows; ++row)
        factors[row] =
            row_factor(dropout, place + static_cast<uint32_t>(row), FEATURE_HEAD + site);
}

// out = a panels + bias
static void project(const Matrix& a, int64_t rows, const Panels& panels, const float* bias,
                    float* out, int64_t out_row) {
    product(a, rows, panels, [&](int64_t row, int64_t column, Floats sum) {
        store(out + row * out_row + column, sum + load(bias + column));
    });
}

// out = residual + drop(a panels + bias)
static void project_branch(const Matrix& a, int64_t rows, const Panels& panels, const float* bias,
                           const Matrix& residual, const Dropout& dropout, const int32_t* factors,
                           const int32_t* columns, float* out, int64_t out_row) {
    product(a, rows, panels, [&](int64_t row, int64_t column, Floats sum) {
        Floats x = sum + load(bias + column);
        if (dropout.on) x = keep(dropout, factors[row], load(columns + column), x) * dropout.scale;
        store(out + row * out_row + column, load(residual.data + row * residual.row + column) + x);
    });
}

// Attention of every sequence and head of a chunk, from the rows of its queries, keys and values.
static void attend(const LayerShape& s, const aam::Sequences& sequences, int64_t first,
                   int64_t last, const Dropout& dropout, Matrix qkv, float* attended, float* lse,
                   float* scratch) {
    const int64_t start = sequences.start(first);
    for (int64_t i = first; i < last; ++i) {
        const int64_t row = sequences.start(i) - start, length = sequences.length(i);
        if (length == 0) continue;
        for (int64_t head = 0; head < s.heads; ++head) {
            const float* query = qkv.data + row * qkv.row + head * s.head_dim;
            HeadForward call{};
            call.query = {query, qkv.row};
            call.key = {query + s.dim, qkv.row};
            call.value = {query + 2 * s.dim, qkv.row};
            call.output = attended + row * s.dim + head * s.head_dim;
            call.output_row = s.dim;
            call.lse = lse + row * s.heads + head;
            call.lse_row = s.heads;
            call.length = call.key_length = length;
            call.head_dim = s.head_dim;
            call.scale = 1.0f / sqrtf(static_cast<float>(s.head_dim));
            call.dropout = dropout;
            call.first_query = call.first_key =
                dropout.first_row + static_cast<uint32_t>(sequences.start(i));
            call.head = static_cast<uint32_t>(head);
            head_forward(call, scratch);
        }
    }
}

}  // namespace
