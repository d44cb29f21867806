// Tensors as Python gives them, checked into what the kernels take.
//
// Whatever does not fit is refused here, by the name of the argument: past this file nothing is
// checked any more.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "interface.hpp"

namespace aam {

constexpr int64_t ANY = -1;  // as an expected size

enum class Layout {
    Contiguous,
    Rows,     // any strides but the last, which is 1
    Strided,  // any strides
};

// A tensor on the CPU that stays alive as long as this does.
class Tensor {
  public:
    // Throws TypeError where it is no tensor of that type on a CPU, ValueError where its shape or
    // strides are others.
    Tensor(nanobind::handle from, const std::string& name, std::initializer_list<int64_t> shape,
           Layout layout = Layout::Contiguous, bool integers = false);

    int64_t size(size_t dimension) const { return static_cast<int64_t>(array_.shape(dimension)); }
    int64_t stride(size_t dimension) const { return array_.stride(dimension); }
    float* floats() const { return static_cast<float*>(array_.data()); }
    const int32_t* integers() const { return static_cast<const int32_t*>(array_.data()); }

    Heads heads() const { return {floats(), stride(0), stride(1)}; }
    HeadsOut heads_out() const { return {floats(), stride(0), stride(1)}; }

  private:
    nanobind::ndarray<> array_;
};

// Offsets and, where there are any, lengths; none of them leaves `rows`.
class SequenceTensors {
  public:
    SequenceTensors(nanobind::handle offsets, nanobind::handle lengths, int64_t rows,
                    const std::string& prefix = "");
    Sequences sequences() const;
    int64_t count() const { return offsets_.size(0) - 1; }

  private:
    Tensor offsets_;
    std::vector<Tensor> lengths_;  // one or none
};

// The `count` elements of a list. Throws TypeError or ValueError.
std::vector<nanobind::handle> elements(nanobind::handle list, const char* name, size_t count);

// A count of threads or heads. Throws ValueError below 1.
int64_t positive(int64_t value, const char* name);

// Throws ValueError where p is outside [0, 1). Rows count modulo 2^32.
Dropout dropout(double p, int64_t seed, int64_t first_row, int64_t first_key_row);

}  // namespace aam
