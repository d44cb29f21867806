// A sum of large arrays that threads make side by side, added in one order whoever made them.

#pragma once

#include <sched.h>

#include "vectors.hpp"

namespace {

// Pieces are numbered. A thread takes a place first and a number then, so that the next piece in
// order always has one; a piece that is finished before its turn waits in its place.
class OrderedSum {
  public:
    // `memory` holds size() floats; `owners` a number a piece.
    OrderedSum(float* memory, int64_t length, int threads, int32_t* owners, int64_t pieces)
        : memory_(memory), owners_(owners), length_(length), pieces_(pieces),
          places_(places_of(threads)) {
        memset(memory_, 0, static_cast<size_t>(length) * sizeof(float));
        for (int64_t i = 0; i < pieces; ++i) owners_[i] = -1;
        for (int i = 0; i < places_; ++i) free_[i] = true;
    }
    static int places_of(int threads) {
        const int places = threads == 1 ? 1 : threads + 2;
        return places < MOST_PLACES ? places : MOST_PLACES;
    }
    static int64_t size(int64_t length, int threads) { return length * (places_of(threads) + 1); }

    float* total() { return memory_; }
    float* place_data(int place) { return memory_ + (place + 1) * length_; }

    // A place filled with zeros.
    int take() {
        for (;;) {
            lock();
            for (int place = 0; place < places_; ++place)
                if (free_[place]) {
                    free_[place] = false;
                    unlock();
                    memset(place_data(place), 0, static_cast<size_t>(length_) * sizeof(float));
                    return place;
                }
            unlock();
            sched_yield();
        }
    }

    void give_back(int place) {
        lock();
        free_[place] = true;
        unlock();
    }

    void finished(int64_t piece, int place) {
        lock();
        owners_[piece] = place;
        while (next_ < pieces_ && owners_[next_] >= 0) {
            const int ready = owners_[next_++];
            const float* from = place_data(ready);
            for (int64_t i = 0; i < length_; i += WIDTH)
                store(memory_ + i, load(memory_ + i) + load(from + i));
            free_[ready] = true;
        }
        unlock();
    }

  private:
    static constexpr int MOST_PLACES = 256;

    void lock() {
        for (int tries = 0; __atomic_test_and_set(&locked_, __ATOMIC_ACQUIRE); ++tries)
            if (tries > 64) sched_yield();
    }
    void unlock() { __atomic_clear(&locked_, __ATOMIC_RELEASE); }

    float* memory_;
    int32_t* owners_;
    int64_t length_, pieces_, next_ = 0;
    int places_;
    bool free_[MOST_PLACES];
    bool locked_ = false;
};

}  // namespace
