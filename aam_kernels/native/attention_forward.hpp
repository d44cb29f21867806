// Attention forward of one head of one sequence.
//
// A block of query rows meets a tile of keys: scores (which stay in the first-level cache), their
// maximum, exp2, their sum, and the product with the values. Only the logsumexp is kept. Rows with
// more than one tile of keys carry maximum, sum and unscaled output from tile to tile.

#pragma once

#include "attention_tiles.hpp"

namespace {

// One head of one sequence. Output rows are written, not added to.
struct HeadForward {
    Matrix query, key, value;  // (length, head_dim), (key_length, head_dim) twice; step 1
    float* output;             // (length, head_dim), rows output_row apart
    int64_t output_row;
    float* lse;  // (length,), lse_row apart: natural logarithm, -inf without keys
    int64_t lse_row;
    int64_t length, key_length, head_dim;
    float scale;
    Dropout dropout;
    // Where they stand in the packed tensors: what dropout is a function of.
    uint32_t first_query, first_key, head;
    // The head that comes after this one, whose rows are fetched meanwhile, or null. Nothing else
    // hides the way to memory: a head's rows are far from each other.
    const HeadForward* next = nullptr;

    __attribute__((always_inline)) void bring_near(int64_t from, int64_t to,
                                                   int64_t parts) const {
        Rows{key.data, key.row, key_length, head_dim}.bring_near(from, to, parts);
        Rows{value.data, value.row, key_length, head_dim}.bring_near(from, to, parts);
        Rows{query.data, query.row, length, head_dim}.bring_near(from, to, parts);
        Rows{output, output_row, length, head_dim}.bring_near(from, to, parts);
    }
};

struct ForwardScratch {
    float *keys, *values;  // of a tile: Panels (head_dim, keys), and rows `dim` apart
    int32_t* columns;      // dropout's factors
    float *query, *scores;  // of a block, rows DIM_ROW and SCORES_ROW apart
    // Carried from tile to tile, where there are several: output rows `dim` apart.
    float *output, *largest, *total;
};

static inline int64_t forward_scratch(Pieces pieces, int64_t length, int64_t key_length,
                                      int64_t head_dim, ForwardScratch& scratch) {
    const int64_t dim = rounded_up(head_dim, WIDTH);
    const int64_t tile = rounded_up(least(key_length, key_tile(key_length)), WIDTH);
    const int64_t carried = key_length > KEY_TILE ? length : 0;
    scratch.keys = pieces.take(tile * head_dim);
    scratch.values = pieces.take(tile * dim);
    scratch.columns = reinterpret_cast<int32_t*>(pieces.take(tile));
    scratch.query = pieces.take(QUERY_ROWS * DIM_ROW);
    scratch.scores = pieces.take(QUERY_ROWS * SCORES_ROW);
    scratch.output = pieces.take(carried * dim);
    scratch.largest = pieces.take(carried);
    scratch.total = pieces.take(carried);
    return pieces.used;
}

// Floats of scratch memory (64-byte aligned) that head_forward needs.
static inline int64_t head_forward_scratch(int64_t length, int64_t key_length, int64_t head_dim) {
    ForwardScratch scratch;
    return forward_scratch({nullptr}, length, key_length, head_dim, scratch);
}

// Query rows [row, row + rows) and keys [first_key, first_key + keys).
struct ForwardBlock {
    int64_t row, rows, first_key, keys;
    bool first, last;  // tile of keys
};

// `inside`: the elements of the last vector that are keys.
template <int ROWS, int VECTORS, bool PARTIAL>
static __attribute__((noinline)) void score_tile(const float* query, const float* panel,
                                                 int64_t depth, Ints inside, float* scores,
                                                 Floats* largest) {
    Floats sums[ROWS][VECTORS];
    zero(sums);
    multiply<ROWS, VECTORS>({query, DIM_ROW, 1}, panel, VECTORS * WIDTH, depth, sums);
    for (int r = 0; r < ROWS; ++r) {
        Floats top = largest[r];
        for (int v = 0; v < VECTORS; ++v) {
            Floats x = sums[r][v];
            if (PARTIAL && v == VECTORS - 1) x = select(inside, x, all(-INFINITY));
            store(scores + r * SCORES_ROW + v * WIDTH, x);
            top = larger(top, x);
        }
        largest[r] = top;
    }
}

// Scores become what multiplies the values: exp2(score - largest), 0 where dropped. Their sum.
AAM_INLINE Floats exponentials(float* scores, int64_t width, Floats largest) {
    Floats sum{};
    for (int64_t j = 0; j < width; j += WIDTH) {
        const Floats x = exp2_or_zero(load(scores + j) - largest);
        sum += x;
        store(scores + j, x);
    }
    return sum;
}
AAM_INLINE Floats exponentials_kept(float* scores, int64_t width, Floats largest,
                                    const Dropout& dropout, int32_t row, const int32_t* columns) {
    Floats sum{};
    for (int64_t j = 0; j < width; j += WIDTH) {
        const Floats x = exp2_or_zero(load(scores + j) - largest);
        sum += x;
        store(scores + j, keep(dropout, row, load(columns + j), x));
    }
    return sum;
}

// What becomes of a tile of output: sums start as `from` times a factor a row (or 0), and go to
// `to` times a factor a row.
struct ValueTile {
    const float* values;
    int64_t values_row, keys;
    const float* from;  // or null
    int64_t from_row;
    const float* before;
    float* to;
    int64_t to_row, columns;  // columns: those from here that exist in `to`
    const float* after;
};

template <int ROWS, int VECTORS>
static __attribute__((noinline)) void value_tile(const float* scores, int64_t row,
                                                 const ValueTile& tile) {
    Floats sums[ROWS][VECTORS];
    zero(sums);
    const float* left = scores + row * SCORES_ROW;
    const int64_t rest = (tile.keys - 1) % SUMMED_KEYS + 1;
    const int64_t before = tile.keys - rest;
    if (tile.from || before > 0) {
        alignas(64) float waiting[ROWS * VECTORS * WIDTH];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                Floats x{};
                if (tile.from)
                    x = load(tile.from + (row + r) * tile.from_row + v * WIDTH) *
                        tile.before[row + r];
                store(waiting + (r * VECTORS + v) * WIDTH, x);
            }
        const auto collect = [&](bool store_back) {
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v) {
                    float* place = waiting + (r * VECTORS + v) * WIDTH;
                    sums[r][v] += load(place);
                    if (store_back) store(place, sums[r][v]);
                }
        };
        for (int64_t key = 0; key < before; key += SUMMED_KEYS) {
            multiply<ROWS, VECTORS>({left + key, SCORES_ROW, 1},
                                    tile.values + key * tile.values_row, tile.values_row,
                                    SUMMED_KEYS, sums);
            collect(true);
            zero(sums);
        }
        multiply<ROWS, VECTORS>({left + before, SCORES_ROW, 1},
                                tile.values + before * tile.values_row, tile.values_row, rest,
                                sums);
        collect(false);
    } else {
        multiply<ROWS, VECTORS>({left, SCORES_ROW, 1}, tile.values, tile.values_row, rest, sums);
    }
    float* to = tile.to + row * tile.to_row;
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            store_up_to(to + r * tile.to_row + v * WIDTH, sums[r][v] * tile.after[row + r],
                        tile.columns - v * WIDTH);
}

// Scalars of the rows of a block: the logsumexp and the factor of the output, or what is carried.
constexpr int64_t ROWS_SPACE = rounded_up(QUERY_ROWS, WIDTH);

static inline void finish_rows(const HeadForward& call, const ForwardScratch& scratch,
                               const ForwardBlock& block, const float* tops, const float* totals,
                               float* after) {
    if (!block.last) {
        for (int64_t r = 0; r < block.rows; ++r) {
            scratch.largest[block.row + r] = tops[r];
            scratch.total[block.row + r] = totals[r];
            after[r] = 1.0f;
        }
        return;
    }
    const float scale = call.dropout.on ? call.dropout.scale : 1.0f;
    float* lse = call.lse + block.row * call.lse_row;
    for (int64_t first = 0; first < block.rows; first += WIDTH) {
        const Floats total = load(totals + first);
        store(after + first, scale / total);
        const Floats x = (load(tops + first) + log2_of(total)) * LN_2;
        for (int64_t r = first; r < least(block.rows, first + WIDTH); ++r)
            lse[r * call.lse_row] = x[r - first];
    }
}

static inline void forward_block(const HeadForward& call, const ForwardScratch& scratch,
                                 const ForwardBlock& block) {
    const int64_t dim = rounded_up(call.head_dim, WIDTH);
    // Everything is in units of log2.
    copy_rows({call.query.data + block.row * call.query.row, call.query.row}, block.rows,
              call.head_dim, call.scale * LOG2_E, scratch.query, DIM_ROW);

    Floats largest[QUERY_ROWS];
    for (int r = 0; r < QUERY_ROWS; ++r) largest[r] = all(-INFINITY);
    for (int64_t column = 0; column < block.keys; column += PANEL) {
        const int64_t real = least(PANEL, block.keys - column);
        const int64_t last = (real - 1) % WIDTH + 1;
        const Ints inside = lane_numbers() < static_cast<int32_t>(last);
        exactly<PANEL_VECTORS>((real + WIDTH - 1) / WIDTH, [&]<int VECTORS>() {
            in_blocks<BLOCK_ROWS>(block.rows, [&]<int ROWS>(int64_t row) {
                const auto tile = last == WIDTH ? score_tile<ROWS, VECTORS, false>
                                                : score_tile<ROWS, VECTORS, true>;
                tile(scratch.query + row * DIM_ROW, scratch.keys + column * call.head_dim,
                     call.head_dim, inside, scratch.scores + row * SCORES_ROW + column,
                     largest + row);
            });
        });
    }

    float tops[ROWS_SPACE] = {}, totals[ROWS_SPACE] = {}, before[ROWS_SPACE], after[ROWS_SPACE];
    const int64_t width = rounded_up(block.keys, WIDTH);
    for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t row = block.row + r;
        Rows{call.query.data + (row + block.rows) * call.query.row, 0,
             row + block.rows < call.length, call.head_dim}
            .bring_near(0, 1, 1);
        if (call.next && block.last) call.next->bring_near(row, row + 1, call.length);
        Floats top = largest_everywhere(largest[r]);
        if (!block.first) top = larger(top, all(scratch.largest[row]));
        // A tile whose scores are all -inf adds nothing, where -inf - -inf would be NaN.
        const Floats shift = select(top == -INFINITY, Floats{}, top);
        float* scores = scratch.scores + r * SCORES_ROW;
        Floats sum;
        if (call.dropout.on) {
            const uint32_t place = call.first_query + static_cast<uint32_t>(row);
            sum = exponentials_kept(scores, width, shift, call.dropout,
                                    row_factor(call.dropout, place, call.head), scratch.columns);
        } else {
            sum = exponentials(scores, width, shift);
        }
        tops[r] = top[0];
        totals[r] = sum_of(sum);
        if (!block.first) {
            before[r] = exp2_or_zero(all(scratch.largest[row]) - shift)[0];
            totals[r] += scratch.total[row] * before[r];
        }
    }
    finish_rows(call, scratch, block, tops, totals, after);

    for (int64_t d = 0; d < dim; d += PANEL) {
        ValueTile tile;
        tile.values = scratch.values + d;
        tile.values_row = dim;
        tile.keys = block.keys;
        tile.from = block.first ? nullptr : scratch.output + block.row * dim + d;
        tile.from_row = dim;
        tile.before = before;
        tile.to = block.last ? call.output + block.row * call.output_row + d
                             : scratch.output + block.row * dim + d;
        tile.to_row = block.last ? call.output_row : dim;
        tile.columns = (block.last ? call.head_dim : dim) - d;
        tile.after = after;
        exactly<PANEL_VECTORS>(least(PANEL, dim - d) / WIDTH, [&]<int VECTORS>() {
            in_blocks<ROWS_OF<VECTORS>>(block.rows, [&]<int ROWS>(int64_t row) {
                value_tile<ROWS, VECTORS>(scratch.scores, row, tile);
            });
        });
    }
}

static inline void head_forward(const HeadForward& call, float* memory) {
    if (call.key_length == 0) {
        zero_rows(call.output, call.output_row, call.length, call.head_dim);
        for (int64_t i = 0; i < call.length; ++i) call.lse[i * call.lse_row] = -INFINITY;
        return;
    }
    ForwardScratch scratch;
    forward_scratch({memory}, call.length, call.key_length, call.head_dim, scratch);
    const int64_t dim = rounded_up(call.head_dim, WIDTH);
    const int64_t blocks = (call.length + QUERY_ROWS - 1) / QUERY_ROWS;
    const int64_t tile = key_tile(call.key_length);
    for (int64_t first = 0; first < call.key_length; first += tile) {
        const int64_t keys = least(tile, call.key_length - first);
        const Matrix key = {call.key.data + first * call.key.row, call.key.row};
        const Matrix value = {call.value.data + first * call.value.row, call.value.row};
        pack_transposed(key, keys, call.head_dim, scratch.keys);
        copy_rows(value, keys, call.head_dim, 1.0f, scratch.values, dim);
        if (call.dropout.on)
            column_factors(call.first_key + static_cast<uint32_t>(first),
                           rounded_up(keys, WIDTH), scratch.columns);
        ForwardBlock block{0, 0, first, keys, first == 0, first + keys == call.key_length};
        for (int64_t left = blocks; left > 0; --left) {
            block.rows = (call.length - block.row + left - 1) / left;
            forward_block(call, scratch, block);
            block.row += block.rows;
        }
    }
}

}  // namespace
