// Packed sequences and tensors over them, as a call of the kernels is given them.

#pragma once

#include <vector>

#include "check.hpp"
#include "interface.hpp"
#include "references.hpp"

// Offsets in guarded memory. With gaps, up to three rows between sequences belong to none, and
// `lengths` says so. `after`: rows after the last sequence, which belong to none either way; without
// them a tensor ends with the last sequence, and reading past that ends the program.
class Packed {
  public:
    Packed(const std::vector<int64_t>& lengths, bool gaps, int64_t after);

    int64_t rows() const { return rows_; }
    aam::Sequences sequences() const;
    bool holds(int64_t row) const { return inside_[static_cast<size_t>(row)]; }
    bool guards_intact() const { return offsets_.guards_intact() && lengths_.guards_intact(); }

  private:
    int64_t rows_ = 0, count_;
    bool gaps_;
    check::Memory offsets_, lengths_;  // int32
    std::vector<bool> inside_;
};

enum class Layout { DENSE, SPREAD, HEADS_FIRST };

// (rows, heads, head_dim) with no element of memory beyond the last. What belongs to no sequence,
// and what lies between rows and heads, is NaN.
class HeadsTensor {
  public:
    HeadsTensor(const Packed& packed, int64_t heads, int64_t head_dim, Layout layout);

    void fill(check::Random& random, double size = 1) const;
    void forget() const { data_.forget(); }
    aam::Heads in() const { return {data_.data(), row_, head_}; }
    aam::HeadsOut out() const { return {data_.data(), row_, head_}; }
    // The error of what the sequences hold; fails where anything else was written.
    double error(const reference::Numbers& expected) const;
    std::vector<float> copy() const;

  private:
    template <class Function>
    void each(const Function& function) const;  // function(element, its number where dense)

    const Packed& packed_;
    int64_t heads_, head_dim_, row_, head_;
    check::Floats data_;
};

// The same for (rows, columns), rows `row` apart.
inline HeadsTensor matrix(const Packed& packed, int64_t columns, bool spread = false) {
    return {packed, 1, columns, spread ? Layout::SPREAD : Layout::DENSE};
}
