// Attention backward of one head of one sequence.
//
// For a tile of keys and a block of query rows: probabilities P from the logsumexp, dP = dO V^T,
// dS = P (dP - delta) with delta = rowsum(dO O), then dV += P^T dO, dK += dS^T Q, dQ += dS K.
// The order of every sum is that of the rows: results do not depend on who computes what.

#pragma once

#include "attention_tiles.hpp"

namespace {

struct HeadBackward {
    Matrix grad_output, query, key, value, output;
    const float* lse;
    int64_t lse_row;
    float *grad_query, *grad_key, *grad_value;  // written, rows this far apart
    int64_t grad_query_row, grad_key_row, grad_value_row;
    int64_t length, key_length, head_dim;
    float scale;
    Dropout dropout;
    uint32_t first_query, first_key, head;
    const HeadBackward* next = nullptr;  // fetched meanwhile, see HeadForward

    __attribute__((always_inline)) void bring_near(int64_t from, int64_t to,
                                                   int64_t parts) const {
        Rows{key.data, key.row, key_length, head_dim}.bring_near(from, to, parts);
        Rows{value.data, value.row, key_length, head_dim}.bring_near(from, to, parts);
        Rows{grad_key, grad_key_row, key_length, head_dim}.bring_near(from, to, parts);
        Rows{grad_value, grad_value_row, key_length, head_dim}.bring_near(from, to, parts);
        Rows{query.data, query.row, length, head_dim}.bring_near(from, to, parts);
        Rows{output.data, output.row, length, head_dim}.bring_near(from, to, parts);
        Rows{grad_output.data, grad_output.row, length, head_dim}.bring_near(from, to, parts);
        Rows{grad_query, grad_query_row, length, head_dim}.bring_near(from, to, parts);
    }
};

// Query rows at a time: sums over them are added to dK and dV, which are in memory.
constexpr int64_t GRAD_ROWS = 32;

struct BackwardScratch {
    float *keys_packed, *values_packed, *keys;  // Panels (head_dim, keys) twice; rows `dim` apart
    float *grad_key, *grad_value;               // sums, rows `dim` apart
    int32_t* columns;
    float *query, *grad_output;  // of a block, rows DIM_ROW apart
    float *kept, *grad_scores;   // of a block, rows SCORES_ROW apart
    float *lse, *delta;          // of a block
    int32_t* rows;               // dropout's factors of a block
};

static inline int64_t backward_scratch(Pieces pieces, int64_t key_length, int64_t head_dim,
                                       BackwardScratch& scratch) {
    const int64_t dim = rounded_up(head_dim, WIDTH);
    const int64_t tile = rounded_up(least(key_length, key_tile(key_length)), WIDTH);
    scratch.keys_packed = pieces.take(tile * head_dim);
    scratch.values_packed = pieces.take(tile * head_dim);
    scratch.keys = pieces.take(tile * dim);
    scratch.grad_key = pieces.take(tile * dim);
    scratch.grad_value = pieces.take(tile * dim);
    scratch.columns = reinterpret_cast<int32_t*>(pieces.take(tile));
    scratch.query = pieces.take(GRAD_ROWS * DIM_ROW);
    scratch.grad_output = pieces.take(GRAD_ROWS * DIM_ROW);
    scratch.kept = pieces.take(GRAD_ROWS * SCORES_ROW);
    scratch.grad_scores = pieces.take(GRAD_ROWS * SCORES_ROW);
    scratch.lse = pieces.take(GRAD_ROWS);
    scratch.delta = pieces.take(GRAD_ROWS);
    scratch.rows = reinterpret_cast<int32_t*>(pieces.take(GRAD_ROWS));
    return pieces.used;
}

// Floats of scratch memory (64-byte aligned) that head_backward needs.
static inline int64_t head_backward_scratch(int64_t, int64_t key_length, int64_t head_dim) {
    BackwardScratch scratch;
    return backward_scratch({nullptr}, key_length, head_dim, scratch);
}

// P, negative where dropped and 0 past the last key, whose vector has its keys `inside`. Adds each
// row's P to its total.
template <int ROWS, int VECTORS, bool DROPS>
static __attribute__((noinline)) void probability_tile(const BackwardScratch& scratch,
                                                       const Dropout& dropout, int64_t depth,
                                                       int64_t row, int64_t column, Ints inside,
                                                       Floats* totals) {
    Floats sums[ROWS][VECTORS];
    zero(sums);
    multiply<ROWS, VECTORS>({scratch.query + row * DIM_ROW, DIM_ROW, 1},
                            scratch.keys_packed + column * depth, VECTORS * WIDTH, depth, sums);
    for (int r = 0; r < ROWS; ++r) {
        Floats total = totals[r];
        for (int v = 0; v < VECTORS; ++v) {
            Floats x = exp2_or_zero(sums[r][v] - scratch.lse[row + r]);
            if (v == VECTORS - 1) x = select(inside, x, Floats{});
            total += x;
            if constexpr (DROPS) {
                const Ints columns = load(scratch.columns + column + v * WIDTH);
                x = keep(dropout, scratch.rows[row + r], columns, x + x) - x;
            }
            store(scratch.kept + (row + r) * SCORES_ROW + column + v * WIDTH, x);
        }
        totals[r] = total;
    }
}

// dS without its factor `scale`, and P with 0 where dropped.
template <int ROWS, int VECTORS, bool DROPS>
static __attribute__((noinline)) void grad_score_tile(const BackwardScratch& scratch,
                                                      int64_t depth, int64_t row,
                                                      int64_t column) {
    Floats sums[ROWS][VECTORS];
    zero(sums);
    multiply<ROWS, VECTORS>({scratch.grad_output + row * DIM_ROW, DIM_ROW, 1},
                            scratch.values_packed + column * depth, VECTORS * WIDTH, depth, sums);
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t place = (row + r) * SCORES_ROW + column + v * WIDTH;
            Floats p = load(scratch.kept + place), grad = sums[r][v];
            if constexpr (DROPS) {
                const Ints dropped = bits(p) < 0;
                store(scratch.kept + place, select(dropped, Floats{}, p));
                grad = select(dropped, Floats{}, grad);
                p = absolute(p);
            }
            store(scratch.grad_scores + place, p * (grad - scratch.delta[row + r]));
        }
    }
}

// to (keys, columns) += scores (rows, keys) transposed times b (rows, columns). A block is summed
// by itself first: errors grow with the number of blocks, not of rows.
template <int ROWS, int VECTORS>
static __attribute__((noinline)) void outer_tile(const float* scores, int64_t rows,
                                                 const float* b, float* to, int64_t to_row) {
    Floats sums[ROWS][VECTORS];
    zero(sums);
    multiply<ROWS, VECTORS>({scores, 1, SCORES_ROW}, b, DIM_ROW, rows, sums);
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            float* place = to + r * to_row + v * WIDTH;
            store(place, load(place) + sums[r][v]);
        }
}
static inline void outer(const float* scores, int64_t rows, int64_t keys, const float* b,
                         int64_t dim, float* to) {
    for (int64_t d = 0; d < dim; d += PANEL) {
        exactly<PANEL_VECTORS>(least(PANEL, dim - d) / WIDTH, [&]<int VECTORS>() {
            in_blocks<ROWS_OF<VECTORS>>(keys, [&]<int ROWS>(int64_t key) {
                outer_tile<ROWS, VECTORS>(scores + key, rows, b + d, to + key * dim + d, dim);
            });
        });
    }
}

// to (rows, columns) = scores (rows, keys) times keys, times a factor a row; added where not the
// first.
template <int ROWS, int VECTORS>
static __attribute__((noinline)) void grad_query_tile(const float* scores, const float* keys,
                                                      int64_t keys_row, int64_t count,
                                                      const float* factors,
                                                      bool first, float* to, int64_t to_row,
                                                      int64_t columns) {
    Floats sums[ROWS][VECTORS];
    zero(sums);
    multiply<ROWS, VECTORS>({scores, SCORES_ROW, 1}, keys, keys_row, count, sums);
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) {
            float* place = to + r * to_row + v * WIDTH;
            Floats x = sums[r][v] * factors[r];
            if (!first) x += load_up_to(place, columns - v * WIDTH);
            store_up_to(place, x, columns - v * WIDTH);
        }
    }
}

// What a block of query rows needs beside the keys.
static inline void backward_rows(const HeadBackward& call, const BackwardScratch& scratch,
                                 int64_t row, int64_t rows) {
    copy_rows({call.query.data + row * call.query.row, call.query.row}, rows, call.head_dim,
              call.scale * LOG2_E, scratch.query, DIM_ROW);
    const float kept_scale = call.dropout.on ? call.dropout.scale : 1.0f;
    copy_rows({call.grad_output.data + row * call.grad_output.row, call.grad_output.row}, rows,
              call.head_dim, kept_scale, scratch.grad_output, DIM_ROW);
    for (int64_t r = 0; r < rows; ++r) {
        const float* grad = call.grad_output.data + (row + r) * call.grad_output.row;
        const float* output = call.output.data + (row + r) * call.output.row;
        Floats sum{};
        for (int64_t d = 0; d < call.head_dim; d += WIDTH)
            sum += load_up_to(grad + d, call.head_dim - d) *
                   load_up_to(output + d, call.head_dim - d);
        scratch.delta[r] = sum_everywhere(sum)[0];
        scratch.lse[r] = call.lse[(row + r) * call.lse_row] * LOG2_E;
        if (call.dropout.on)
            scratch.rows[r] = row_factor(
                call.dropout, call.first_query + static_cast<uint32_t>(row + r), call.head);
    }
}

// A row of P adds up to 1 but for the rounding of its logsumexp, an error that all its elements
// share and that sums over queries therefore show. Where all keys are at hand it is mended: not in
// P, but in what P (and dS, which is P times something) will be multiplied with.
static inline float normalise(const BackwardScratch& scratch, int64_t row, int64_t dim,
                              Floats total) {
    const float factor = 1.0f / sum_of(total);
    for (int64_t d = 0; d < dim; d += WIDTH) {
        float *query = scratch.query + row * DIM_ROW + d;
        float *grad_output = scratch.grad_output + row * DIM_ROW + d;
        store(query, load(query) * factor);
        store(grad_output, load(grad_output) * factor);
    }
    return factor;
}

// Query rows [row, row + rows) against a tile of keys.
struct BackwardBlock {
    int64_t row, rows, keys;
    bool first, last;  // tile of keys
};

template <bool DROPS>
static inline void backward_block(const HeadBackward& call, const BackwardScratch& scratch,
                                  const BackwardBlock& block) {
    const int64_t row = block.row, rows = block.rows, keys = block.keys;
    const int64_t head_dim = call.head_dim, dim = rounded_up(head_dim, WIDTH);
    backward_rows(call, scratch, row, rows);
    const int64_t panels = panels_of(keys);
    Floats totals[GRAD_ROWS];
    for (int64_t r = 0; r < rows; ++r) totals[r] = Floats{};
    for (int64_t column = 0; column < keys; column += PANEL) {
        const int64_t real = least(PANEL, keys - column), vectors = (real + WIDTH - 1) / WIDTH;
        const Ints inside = lane_numbers() < static_cast<int32_t>((real - 1) % WIDTH + 1);
        exactly<PANEL_VECTORS>(vectors, [&]<int VECTORS>() {
            in_blocks<BLOCK_ROWS>(rows, [&]<int ROWS>(int64_t r) {
                if (call.next && block.last) {
                    const int64_t part = row * panels + column / PANEL * rows + r;
                    call.next->bring_near(part, part + ROWS, call.length * panels);
                }
                probability_tile<ROWS, VECTORS, DROPS>(scratch, call.dropout, head_dim, r, column,
                                                       inside, totals + r);
            });
            in_blocks<BLOCK_ROWS>(rows, [&]<int ROWS>(int64_t r) {
                grad_score_tile<ROWS, VECTORS, DROPS>(scratch, head_dim, r, column);
            });
        });
    }
    float factors[GRAD_ROWS];
    for (int64_t r = 0; r < rows; ++r) {
        factors[r] = call.scale;
        if (block.first && block.last) factors[r] *= normalise(scratch, r, dim, totals[r]);
    }
    outer(scratch.kept, rows, keys, scratch.grad_output, dim, scratch.grad_value);
    outer(scratch.grad_scores, rows, keys, scratch.query, dim, scratch.grad_key);
    for (int64_t d = 0; d < dim; d += PANEL) {
        exactly<PANEL_VECTORS>(least(PANEL, dim - d) / WIDTH, [&]<int VECTORS>() {
            in_blocks<ROWS_OF<VECTORS>>(rows, [&]<int ROWS>(int64_t r) {
                float* to = call.grad_query + (row + r) * call.grad_query_row + d;
                const int64_t parts = (keys + SUMMED_KEYS - 1) / SUMMED_KEYS;
                for (int64_t part = 0; part < parts; ++part) {
                    const int64_t key = keys * part / parts;
                    grad_query_tile<ROWS, VECTORS>(
                        scratch.grad_scores + r * SCORES_ROW + key, scratch.keys + key * dim + d,
                        dim, keys * (part + 1) / parts - key, factors + r,
                        block.first && part == 0, to, call.grad_query_row, head_dim - d);
                }
            });
        });
    }
}

static inline void write_rows(const float* from, int64_t from_row, int64_t rows, int64_t head_dim,
                              float factor, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < head_dim; d += WIDTH)
            store_up_to(to + i * to_row + d, load(from + i * from_row + d) * factor, head_dim - d);
}

static inline void head_backward(const HeadBackward& call, float* memory) {
    if (call.length == 0 || call.key_length == 0) {
        zero_rows(call.grad_query, call.grad_query_row, call.length, call.head_dim);
        zero_rows(call.grad_key, call.grad_key_row, call.key_length, call.head_dim);
        zero_rows(call.grad_value, call.grad_value_row, call.key_length, call.head_dim);
        return;
    }
    BackwardScratch scratch;
    backward_scratch({memory}, call.key_length, call.head_dim, scratch);
    const int64_t dim = rounded_up(call.head_dim, WIDTH);
    const int64_t blocks = (call.length + GRAD_ROWS - 1) / GRAD_ROWS;
    const int64_t tile = key_tile(call.key_length);
    for (int64_t first = 0; first < call.key_length; first += tile) {
        const int64_t keys = least(tile, call.key_length - first);
        const Matrix key = {call.key.data + first * call.key.row, call.key.row};
        const Matrix value = {call.value.data + first * call.value.row, call.value.row};
        pack_transposed(key, keys, call.head_dim, scratch.keys_packed);
        pack_transposed(value, keys, call.head_dim, scratch.values_packed);
        copy_rows(key, keys, call.head_dim, 1.0f, scratch.keys, dim);
        zero_rows(scratch.grad_key, dim, keys, dim);
        zero_rows(scratch.grad_value, dim, keys, dim);
        if (call.dropout.on)
            column_factors(call.first_key + static_cast<uint32_t>(first),
                           rounded_up(keys, WIDTH), scratch.columns);
        BackwardBlock block{0, 0, keys, first == 0, first + keys == call.key_length};
        for (int64_t left = blocks; left > 0; --left) {
            block.rows = (call.length - block.row + left - 1) / left;
            if (call.dropout.on) backward_block<true>(call, scratch, block);
            else backward_block<false>(call, scratch, block);
            block.row += block.rows;
        }
        // The queries were multiplied by scale * log2(e).
        write_rows(scratch.grad_key, dim, keys, call.head_dim, LN_2,
                   call.grad_key + first * call.grad_key_row, call.grad_key_row);
        write_rows(scratch.grad_value, dim, keys, call.head_dim, 1.0f,
                   call.grad_value + first * call.grad_value_row, call.grad_value_row);
    }
}

}  // namespace
