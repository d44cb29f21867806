// Attention of whole calls: one head of one sequence is one piece of work.

#pragma once

#include "attention_backward.hpp"
#include "attention_forward.hpp"

namespace {

// Heads of sequences, handed out one by one. Large ones come first, so that no thread is left with
// a large one at the end.
template <class Call>
struct HeadsOfSequences {
    const Call& call;
    float* memory;
    int64_t memory_each;
    int threads;
    double large;  // scores
    int64_t next = 0;

    double scores(int64_t i) const {
        return static_cast<double>(call.queries.length(i)) *
               static_cast<double>(most(call.keys.length(i), 1));
    }

    // The place of an item in the calling thread's order; `items()` when there is none left.
    int64_t take() {
        for (;;) {
            const int64_t turn = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (turn >= 2 * items()) return items();
            const int64_t item = turn < items() ? turn : turn - items();
            if (is_large(item) == (turn < items())) return item;
        }
    }
    bool is_large(int64_t item) const { return scores(item / call.heads) > large; }
    int64_t items() const { return call.queries.count * call.heads; }
};

// head_of(call, sequence, head) makes what run(head, memory) does. A thread knows its next head
// while it computes one, except where it would keep it from others: large ones, and at the end.
template <class Call, class Make, class Run>
static inline void for_heads(HeadsOfSequences<Call>& heads, int thread, const Make& head_of,
                             const Run& run) {
    float* memory = heads.memory + heads.memory_each * thread;
    const int64_t items = heads.items(), ahead = 8 * heads.threads;
    const auto make = [&](int64_t item) {
        return head_of(heads.call, item / heads.call.heads, item % heads.call.heads);
    };
    int64_t item = heads.take();
    while (item < items) {
        auto head = make(item);
        int64_t next = items;
        const bool early = item + ahead < items && !heads.is_large(item);
        if (early) next = heads.take();
        auto next_head = head;
        if (next < items) {
            next_head = make(next);
            head.next = &next_head;
        }
        run(head, memory);
        item = early ? next : heads.take();
    }
}

// size(length, key_length, head_dim): scratch memory of a head.
template <class Call, class Size>
static inline void run_heads(const Call& call, const Size& size,
                             void (*run)(void* context, int thread)) {
    const int64_t items = call.queries.count * call.heads;
    if (items == 0) return;
    int64_t largest = 0;
    HeadsOfSequences<Call> heads{call, nullptr, 0, 1, 0.0};
    double scores = 0.0;
    for (int64_t i = 0; i < call.queries.count; ++i) {
        largest = most(largest, size(call.queries.length(i), call.keys.length(i), call.head_dim));
        scores += heads.scores(i);
    }
    const int threads = static_cast<int>(most(1, least(call.threads, items)));
    heads.threads = threads;
    heads.large = 2.0 * scores / static_cast<double>(call.queries.count);
    heads.memory_each = rounded_up(largest, CACHE_LINE);
    const aam::Scratch scratch(heads.memory_each * threads);
    heads.memory = scratch.data();
    aam::in_parallel(threads, run, &heads);
}

static inline HeadForward head_of(const aam::AttentionForward& call, int64_t sequence,
                                   int64_t head) {
    const int64_t query = call.queries.start(sequence), key = call.keys.start(sequence);
    const auto rows = [&](const aam::Heads& x, int64_t start) {
        return Matrix{x.data + start * x.row + head * x.head, x.row};
    };
    HeadForward work;
    work.query = rows(call.query, query);
    work.key = rows(call.key, key);
    work.value = rows(call.value, key);
    work.output = call.output.data + query * call.output.row + head * call.output.head;
    work.output_row = call.output.row;
    work.lse = call.lse + query * call.heads + head;
    work.lse_row = call.heads;
    work.length = call.queries.length(sequence);
    work.key_length = call.keys.length(sequence);
    work.head_dim = call.head_dim;
    work.scale = call.scale;
    work.dropout = call.dropout;
    work.first_query = call.dropout.first_row + static_cast<uint32_t>(query);
    work.first_key = call.dropout.first_key_row + static_cast<uint32_t>(key);
    work.head = static_cast<uint32_t>(head);
    return work;
}

static void attention_forward(const aam::AttentionForward& call) {
    run_heads(call, head_forward_scratch, [](void* context, int thread) {
        for_heads(
            *static_cast<HeadsOfSequences<aam::AttentionForward>*>(context), thread,
            [](const auto& call, int64_t i, int64_t head) { return head_of(call, i, head); },
            head_forward);
    });
}

static inline HeadBackward head_of(const aam::AttentionBackward& call, int64_t sequence,
                                   int64_t head) {
    const int64_t query = call.queries.start(sequence), key = call.keys.start(sequence);
    const auto rows = [&](const aam::Heads& x, int64_t start) {
        return Matrix{x.data + start * x.row + head * x.head, x.row};
    };
    const auto out = [&](const aam::HeadsOut& x, int64_t start) {
        return x.data + start * x.row + head * x.head;
    };
    HeadBackward work;
    work.grad_output = rows(call.grad_output, query);
    work.query = rows(call.query, query);
    work.key = rows(call.key, key);
    work.value = rows(call.value, key);
    work.output = rows(call.output, query);
    work.lse = call.lse + query * call.heads + head;
    work.lse_row = call.heads;
    work.grad_query = out(call.grad_query, query);
    work.grad_key = out(call.grad_key, key);
    work.grad_value = out(call.grad_value, key);
    work.grad_query_row = call.grad_query.row;
    work.grad_key_row = call.grad_key.row;
    work.grad_value_row = call.grad_value.row;
    work.length = call.queries.length(sequence);
    work.key_length = call.keys.length(sequence);
    work.head_dim = call.head_dim;
    work.scale = call.scale;
    work.dropout = call.dropout;
    work.first_query = call.dropout.first_row + static_cast<uint32_t>(query);
    work.first_key = call.dropout.first_key_row + static_cast<uint32_t>(key);
    work.head = static_cast<uint32_t>(head);
    return work;
}

static void attention_backward(const aam::AttentionBackward& call) {
    run_heads(call, head_backward_scratch, [](void* context, int thread) {
        for_heads(
            *static_cast<HeadsOfSequences<aam::AttentionBackward>*>(context), thread,
            [](const auto& call, int64_t i, int64_t head) { return head_of(call, i, head); },
            head_backward);
    });
}

}  // namespace
