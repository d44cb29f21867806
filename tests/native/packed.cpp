#include "packed.hpp"

#include <algorithm>

Packed::Packed(const std::vector<int64_t>& lengths, bool gaps, int64_t after)
    : count_(static_cast<int64_t>(lengths.size())), gaps_(gaps), offsets_((count_ + 1) * 4),
      lengths_(count_ * 4) {
    auto* offset = static_cast<int32_t*>(offsets_.data());
    auto* length = static_cast<int32_t*>(lengths_.data());
    for (int64_t i = 0; i < count_; ++i) {
        offset[i] = static_cast<int32_t>(rows_);
        length[i] = static_cast<int32_t>(lengths[i]);
        inside_.insert(inside_.end(), static_cast<size_t>(lengths[i]), true);
        if (gaps) inside_.insert(inside_.end(), static_cast<size_t>((i * 2 + 1) % 4), false);
        rows_ = static_cast<int64_t>(inside_.size());
    }
    offset[count_] = static_cast<int32_t>(rows_);
    rows_ += after;
    inside_.resize(static_cast<size_t>(rows_), false);
}

aam::Sequences Packed::sequences() const {
    return {count_, static_cast<const int32_t*>(offsets_.data()),
            gaps_ ? static_cast<const int32_t*>(lengths_.data()) : nullptr};
}

static int64_t row_of(const Packed&, int64_t heads, int64_t head_dim, Layout layout) {
    if (layout == Layout::HEADS_FIRST) return head_dim;
    return layout == Layout::DENSE ? heads * head_dim : heads * (head_dim + 5) + 3;
}

static int64_t head_of(const Packed& packed, int64_t head_dim, Layout layout) {
    if (layout == Layout::HEADS_FIRST) return head_dim * packed.rows();
    return layout == Layout::DENSE ? head_dim : head_dim + 5;
}

HeadsTensor::HeadsTensor(const Packed& packed, int64_t heads, int64_t head_dim, Layout layout)
    : packed_(packed), heads_(heads), head_dim_(head_dim),
      row_(row_of(packed, heads, head_dim, layout)), head_(head_of(packed, head_dim, layout)),
      data_(packed.rows() ? (packed.rows() - 1) * row_ + (heads - 1) * head_ + head_dim : 0) {}

template <class Function>
void HeadsTensor::each(const Function& function) const {
    for (int64_t i = 0; i < packed_.rows(); ++i)
        if (packed_.holds(i))
            for (int64_t h = 0; h < heads_; ++h)
                for (int64_t d = 0; d < head_dim_; ++d)
                    function(data_[i * row_ + h * head_ + d], (i * heads_ + h) * head_dim_ + d);
}

void HeadsTensor::fill(check::Random& random, double size) const {
    each([&](float& x, int64_t) { x = static_cast<float>(random.normal() * size); });
}

double HeadsTensor::error(const reference::Numbers& expected) const {
    check::Error error;
    std::vector<bool> inside(static_cast<size_t>(data_.size()));
    int64_t unwritten = 0;
    each([&](float& x, int64_t at) {
        inside[static_cast<size_t>(&x - data_.data())] = true;
        unwritten += check::is_untouched(x);
        error.add(x, expected[static_cast<size_t>(at)]);
    });
    if (unwritten) FAIL("%d elements were not written", static_cast<int>(unwritten));
    for (int64_t i = 0; i < data_.size(); ++i)
        if (!inside[static_cast<size_t>(i)] && !check::is_untouched(data_[i])) {
            FAIL("written outside every sequence, at element %d", static_cast<int>(i));
            break;
        }
    if (!data_.guards_intact()) FAIL("written beside the tensor");
    return error.relative();
}

std::vector<float> HeadsTensor::copy() const {
    return {data_.data(), data_.data() + data_.size()};
}
