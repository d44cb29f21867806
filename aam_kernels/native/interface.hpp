// What the kernels of one kind of processor are given and give: plain data, no templates.
//
// All tensors are float32 with consecutive elements in their last dimension. Rows of sequence i
// are offsets[i] to offsets[i] + lengths[i] (without `lengths`: to offsets[i + 1]); rows outside
// every sequence are neither read nor written.

#pragma once

#include <stdint.h>

namespace aam {

// Dropout is a hash of where an element stands: see aam_kernels/_runtime/dropout.py, which is the
// specification. An element goes where the product of its row's and column's factors is `below`.
struct Dropout {
    bool on;
    int32_t below;  // floor(p * 2^32) - 2^31
    float scale;    // 1 / (1 - p)
    uint32_t word;  // mix(low32(seed) ^ mix(high32(seed)))
    // The rows of a larger packed batch that the first row of queries (or tokens) and of keys are.
    uint32_t first_row, first_key_row;
};

struct Sequences {
    int64_t count;
    const int32_t* offsets;  // (count + 1,)
    const int32_t* lengths;  // (count,), or null

    // Always inline: a function of its own would be one for all variants, of any one of them.
    __attribute__((always_inline)) int64_t start(int64_t i) const { return offsets[i]; }
    __attribute__((always_inline)) int64_t length(int64_t i) const {
        return lengths ? lengths[i] : offsets[i + 1] - offsets[i];
    }
};

// (rows, heads, head_dim): element (i, h, d) at data[i * row + h * head + d].
struct Heads {
    const float* data;
    int64_t row, head;
};
struct HeadsOut {
    float* data;
    int64_t row, head;
};

struct AttentionForward {
    Heads query, key, value;
    HeadsOut output;
    float* lse;               // (rows, heads)
    Sequences queries, keys;  // the same for self-attention
    int64_t heads, head_dim;
    float scale;
    Dropout dropout;
    int threads;
};

struct AttentionBackward {
    Heads grad_output, query, key, value, output;
    const float* lse;
    HeadsOut grad_query, grad_key, grad_value;
    Sequences queries, keys;
    int64_t heads, head_dim;
    float scale;
    Dropout dropout;
    int threads;
};

struct PoolingForward {
    const float* values;  // element (i, d) at values[i * values_row + d]
    int64_t values_row;
    const float* scores;  // element i at scores[i * scores_row]
    int64_t scores_row;
    float* pooled;  // (count, dim)
    float* lse;     // (count,)
    Sequences sequences;
    int64_t dim;
    int threads;
};

struct PoolingBackward {
    const float* grad_pooled;  // (count, dim)
    const float* values;
    int64_t values_row;
    const float* scores;
    int64_t scores_row;
    const float* pooled;  // (count, dim)
    const float* lse;     // (count,)
    float* grad_values;   // (rows, dim)
    float* grad_scores;   // (rows,)
    Sequences sequences;
    int64_t dim;
    int threads;
};

// Weights as torch has them: a linear layer's weight is (out, in). All contiguous.
struct LayerWeights {
    const float *norm1_weight, *norm1_bias;
    const float *qkv_weight, *qkv_bias;          // (3 dim, dim), (3 dim,)
    const float *out_weight, *out_bias;          // (dim, dim), (dim,)
    const float *norm2_weight, *norm2_bias;
    const float *ffn_in_weight, *ffn_in_bias;    // (hidden, dim), (hidden,)
    const float *ffn_out_weight, *ffn_out_bias;  // (dim, hidden), (dim,)
};

// Gradients in the same shapes; null where not asked for.
struct LayerGrads {
    float *norm1_weight, *norm1_bias;
    float *qkv_weight, *qkv_bias;
    float *out_weight, *out_bias;
    float *norm2_weight, *norm2_bias;
    float *ffn_in_weight, *ffn_in_bias;
    float *ffn_out_weight, *ffn_out_bias;
};

// What is kept for the backward pass: all, or null everywhere. All contiguous.
struct LayerSaved {
    float* qkv;           // (rows, 3 dim)
    float* attended;      // (rows, dim)
    float* lse;           // (rows, heads)
    float* mid;           // (rows, dim)
    float* hidden_input;  // (rows, hidden)
};

struct LayerForward {
    const float* x;  // (rows, dim), element (i, d) at x[i * x_row + d]
    int64_t x_row;
    float* output;  // (rows, dim)
    LayerSaved saved;
    LayerWeights weights;
    Sequences sequences;
    int64_t dim, hidden, heads;  // dim a multiple of 16
    Dropout dropout;
    int threads;
};

struct LayerBackward {
    const float* grad_output;
    int64_t grad_output_row;
    const float* x;
    int64_t x_row;
    LayerSaved saved;  // null: made again from x
    float* grad_x;     // (rows, dim), or null
    LayerGrads grads;
    LayerWeights weights;
    Sequences sequences;
    int64_t dim, hidden, heads;
    Dropout dropout;
    int threads;
};

// The kernels compiled for one kind of processor.
struct Kernels {
    const char* name;  // "x86-64-v4", "x86-64-v3", "x86-64", "neon" or "generic"
    int width;         // floats in a vector
    void (*attention_forward)(const AttentionForward&);
    void (*attention_backward)(const AttentionBackward&);
    void (*pooling_forward)(const PoolingForward&);
    void (*pooling_backward)(const PoolingBackward&);
    void (*layer_forward)(const LayerForward&);
    void (*layer_backward)(const LayerBackward&);
    double (*multiply_adds)(int64_t rounds);  // runs independent multiply-adds, gives their number
};

// Calls work(context, thread) for every thread in [0, threads), on the threads that torch uses.
void in_parallel(int threads, void (*work)(void* context, int thread), void* context);

// Memory for intermediate results, 64-byte aligned, kept for later calls where it is small: pages
// that a kernel has touched once need not be asked for again. Throws std::bad_alloc.
class Scratch {
  public:
    explicit Scratch(int64_t floats);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* data() const { return data_; }

  private:
    float* data_;
    int64_t floats_;
};

}  // namespace aam
