// Attention of one head of one sequence, forward and backward, and of whole calls.
#pragma once
#include "functions.hpp"
#include "products.hpp"
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
    uint32_t first_query, first_key, head;  // where they stand in the packed tensors: dropout's coordinates
};

struct HeadBackward {
    Matrix grad_output, query, key, value, output;
    const float* lse;
    int64_t lse_row;
    float *grad_query, *grad_key, *grad_value;  // written, rows grad_row apart
    int64_t grad_query_row, grad_key_row, grad_value_row;
    int64_t length, key_length, head_dim;
    float scale;
    Dropout dropout;
    uint32_t first_query, first_key, head;
};

// Floats of scratch memory (64-byte aligned) that the functions below need.
static inline int64_t head_forward_scratch(int64_t length, int64_t key_length, int64_t head_dim) { return 0; }
static inline int64_t head_backward_scratch(int64_t length, int64_t key_length, int64_t head_dim) { return 0; }
static inline void head_forward(const HeadForward& call, float* scratch) {}
static inline void head_backward(const HeadBackward& call, float* scratch) {}

static void attention_forward(const aam::AttentionForward& call) {}
static void attention_backward(const aam::AttentionBackward& call) {}

}  // namespace
