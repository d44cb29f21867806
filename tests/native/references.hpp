// The operations in double precision, written from the specification (aam_kernels/*/reference.py
// and _runtime/dropout.py) and sharing no line with the kernels.

#pragma once

#include <cstdint>
#include <vector>

#include "interface.hpp"

namespace reference {

using Numbers = std::vector<double>;

// Which elements dropout keeps, and by what they are multiplied.
struct Mask {
    double p = 0;
    uint64_t seed = 0;
    // The rows of a larger packed batch that the first row of queries (or tokens) and of keys are.
    int64_t first_row = 0, first_key_row = 0;

    bool keeps(int64_t row, int64_t column, uint32_t head) const;
    double factor(int64_t row, int64_t column, uint32_t head) const {
        return p == 0 ? 1.0 : keeps(row, column, head) ? 1.0 / (1.0 - p) : 0.0;
    }
    aam::Dropout for_kernels() const;
};

// Row factor of (row, head) and column factor of a column.
uint32_t row_factor(uint64_t seed, int64_t row, uint32_t head);
uint32_t column_factor(int64_t column);

double normal_distribution(double x);
double gelu(double x);
double gelu_slope(double x);

// (rows, heads, head_dim) and (rows, heads), dense; NaN in rows that belong to no sequence.
struct Attention {
    Numbers output, lse, grad_query, grad_key, grad_value;
};
// Reads query, key, value and (where not null) grad_output of `call`.
Attention attention(const aam::AttentionBackward& call, int64_t query_rows, int64_t key_rows,
                    const Mask& mask);

// (count, dim), (count,), (rows, dim), (rows,).
struct Pooling {
    Numbers pooled, lse, grad_values, grad_scores;
};
// Reads values, scores and grad_pooled of `call`.
Pooling pooling(const aam::PoolingBackward& call, int64_t rows);

// In the shapes of aam::LayerForward, LayerSaved and LayerGrads; `end` rows.
struct Layer {
    Numbers output, qkv, attended, lse, mid, hidden_input, grad_x;
    Numbers norm1_weight, norm1_bias, qkv_weight, qkv_bias, out_weight, out_bias;
    Numbers norm2_weight, norm2_bias, ffn_in_weight, ffn_in_bias, ffn_out_weight, ffn_out_bias;
};
Layer layer(const aam::LayerBackward& call, const Mask& mask);

}  // namespace reference
