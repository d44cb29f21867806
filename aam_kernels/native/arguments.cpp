// Tensors as Python gives them, checked into what the kernels take.

#include "arguments.hpp"

#include <math.h>

#include <stdexcept>

namespace nb = nanobind;

namespace aam {

namespace {

std::string type_of(nb::handle object) { return nb::type_name(object.type()).c_str(); }

std::string type_of(const nb::ndarray<>& array) {
    const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    const nb::dlpack::dtype type = array.dtype();
    const std::string kind = type.code < 7 ? kinds[type.code] : "type ";
    return type.code == 6 ? kind : kind + std::to_string(type.bits);
}

std::string shown(const nb::ndarray<>& array, bool strides) {
    std::string text = "(";
    for (size_t i = 0; i < array.ndim(); ++i) {
        if (i) text += ", ";
        text += std::to_string(strides ? array.stride(i) : static_cast<int64_t>(array.shape(i)));
    }
    return text + (array.ndim() == 1 ? ",)" : ")");
}

std::string shown(std::initializer_list<int64_t> shape) {
    std::string text = "(";
    for (int64_t size : shape) {
        if (text.size() > 1) text += ", ";
        text += size == ANY ? "any" : std::to_string(size);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

bool fits(const nb::ndarray<>& array, std::initializer_list<int64_t> shape) {
    if (array.ndim() != shape.size()) return false;
    size_t i = 0;
    for (int64_t size : shape) {
        if (size != ANY && static_cast<int64_t>(array.shape(i)) != size) return false;
        ++i;
    }
    return true;
}

// Dimensions of one element are never stepped along: their strides say nothing.
bool lies(const nb::ndarray<>& array, Layout layout) {
    if (layout == Layout::Strided) return true;
    int64_t expected = 1;
    for (size_t i = array.ndim(); i-- > 0;) {
        const int64_t size = static_cast<int64_t>(array.shape(i));
        if (size == 0) return true;
        if (size > 1 && array.stride(i) != expected) return false;
        if (layout == Layout::Rows) return true;
        expected *= size;
    }
    return true;
}

uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

}  // namespace

Tensor::Tensor(nb::handle from, const std::string& name, std::initializer_list<int64_t> shape,
               Layout layout, bool integers) {
    const std::string type = integers ? "int32" : "float32";
    if (!nb::try_cast(from, array_))
        throw nb::type_error(
            (name + ": expected a " + type + " tensor, got " + type_of(from)).c_str());
    if (array_.device_type() != nb::device::cpu::value)
        throw nb::type_error((name + ": expected a tensor on the CPU").c_str());
    if (array_.dtype() != (integers ? nb::dtype<int32_t>() : nb::dtype<float>()))
        throw nb::type_error((name + ": expected " + type + ", got " + type_of(array_)).c_str());
    if (!fits(array_, shape))
        throw std::invalid_argument(name + ": expected shape " + shown(shape) + ", got " +
                                    shown(array_, false));
    if (!lies(array_, layout))
        throw std::invalid_argument(
            name + (layout == Layout::Rows ? ": expected a last dimension of stride 1"
                                           : ": expected a contiguous tensor") +
            ", got strides " + shown(array_, true) + " for shape " + shown(array_, false));
}

SequenceTensors::SequenceTensors(nb::handle offsets, nb::handle lengths, int64_t rows,
                                 const std::string& prefix)
    : offsets_(offsets, prefix + "offsets", {ANY}, Layout::Contiguous, true) {
    if (offsets_.size(0) < 1)
        throw std::invalid_argument(prefix + "offsets: expected at least one element");
    if (!lengths.is_none())
        lengths_.emplace_back(lengths, prefix + "lengths", std::initializer_list<int64_t>{count()},
                              Layout::Contiguous, true);
    const Sequences all = sequences();
    for (int64_t i = 0; i < all.count; ++i) {
        const int64_t start = all.start(i), length = all.length(i);
        if (start < 0 || length < 0 || start + length > rows)
            throw std::invalid_argument(prefix + "offsets: sequence " + std::to_string(i) +
                                        " has rows " + std::to_string(start) + " to " +
                                        std::to_string(start + length) + ", outside of the " +
                                        std::to_string(rows) + " that there are");
    }
}

Sequences SequenceTensors::sequences() const {
    return {count(), offsets_.integers(), lengths_.empty() ? nullptr : lengths_[0].integers()};
}

std::vector<nb::handle> elements(nb::handle list, const char* name, size_t count) {
    if (!nb::isinstance<nb::list>(list) && !nb::isinstance<nb::tuple>(list))
        throw nb::type_error(
            (std::string(name) + ": expected a list of tensors, got " + type_of(list)).c_str());
    std::vector<nb::handle> found;
    for (nb::handle element : list) found.push_back(element);
    if (found.size() != count)
        throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) +
                                    " tensors, got " + std::to_string(found.size()));
    return found;
}

int64_t positive(int64_t value, const char* name) {
    if (value < 1)
        throw std::invalid_argument(std::string(name) + ": expected at least 1, got " +
                                    std::to_string(value));
    return value;
}

Dropout dropout(double p, int64_t seed, int64_t first_row, int64_t first_key_row) {
    if (!(p >= 0.0 && p < 1.0))
        throw std::invalid_argument("dropout_p: expected a number in [0, 1), got " +
                                    std::to_string(p));
    const uint64_t bits = static_cast<uint64_t>(seed);
    const uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
    const int64_t below = static_cast<int64_t>(floor(p * 4294967296.0)) - (int64_t{1} << 31);
    return {p > 0.0, static_cast<int32_t>(below), static_cast<float>(1.0 / (1.0 - p)),
            mix(low ^ mix(high)), static_cast<uint32_t>(first_row),
            static_cast<uint32_t>(first_key_row)};
}

}  // namespace aam
