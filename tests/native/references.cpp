#include "references.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace reference {

namespace {

const double NEVER = std::numeric_limits<double>::quiet_NaN();

uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

uint32_t seed_word(uint64_t seed) {
    return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32)));
}

int64_t drop_below(double p) { return static_cast<int64_t>(p * 4294967296.0) - (int64_t{1} << 31); }

}  // namespace

uint32_t row_factor(uint64_t seed, int64_t row, uint32_t head) {
    const uint32_t place = static_cast<uint32_t>(row) * 0x9e3779b1u + head * 0x85ebca77u;
    return (mix(place ^ seed_word(seed)) >> 8) | 0x800001u;
}

uint32_t column_factor(int64_t column) {
    uint32_t x = (static_cast<uint32_t>(column) & 0xffffffu) * 0x9e3779u;
    x = ((x ^ (x >> 15)) & 0xffffffu) * 0xb5297bu;
    return (x >> 8) | 0x800001u;
}

bool Mask::keeps(int64_t row, int64_t column, uint32_t head) const {
    const uint32_t product = row_factor(seed, row, head) * column_factor(column);
    return static_cast<int64_t>(static_cast<int32_t>(product)) >= drop_below(p);
}

aam::Dropout Mask::for_kernels() const {
    return {p > 0, static_cast<int32_t>(drop_below(p)), static_cast<float>(1.0 / (1.0 - p)),
            seed_word(seed), static_cast<uint32_t>(first_row),
            static_cast<uint32_t>(first_key_row)};
}

double normal_distribution(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double gelu(double x) { return x * normal_distribution(x); }
double gelu_slope(double x) {
    return normal_distribution(x) + x * std::exp(-0.5 * x * x) * 0.39894228040143267794;
}

namespace {

// One head of one sequence, all (length, head_dim) with rows `row` apart, in doubles.
struct Head {
    const double *query, *key, *value, *grad_output;
    double *output, *lse, *grad_query, *grad_key, *grad_value;
    int64_t row, lse_row;
};

Numbers transposed(const double* from, int64_t row, int64_t rows, int64_t columns) {
    Numbers to(static_cast<size_t>(rows * columns));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * row + j];
    return to;
}

void attend(const Head& head, int64_t length, int64_t keys, int64_t head_dim, double scale,
            const Mask& mask, int64_t first_query, int64_t first_key, uint32_t number) {
    const int64_t row = head.row;
    for (int64_t j = 0; j < keys; ++j)
        for (int64_t d = 0; d < head_dim; ++d)
            head.grad_key[j * row + d] = head.grad_value[j * row + d] = 0;
    const Numbers key_columns = transposed(head.key, row, keys, head_dim);
    const Numbers value_columns = transposed(head.value, row, keys, head_dim);
    Numbers p(keys), grad_p(keys), factor(keys, 1.0);
    std::vector<uint32_t> columns(keys);
    for (int64_t j = 0; j < keys; ++j) columns[j] = column_factor(mask.first_key_row + first_key + j);
    const int64_t below = drop_below(mask.p);
    for (int64_t i = 0; i < length; ++i) {
        const double *q = head.query + i * row, *g = head.grad_output + i * row;
        double *o = head.output + i * row, *dq = head.grad_query + i * row;
        std::fill_n(o, head_dim, 0.0);
        std::fill_n(dq, head_dim, 0.0);
        head.lse[i * head.lse_row] = -std::numeric_limits<double>::infinity();
        if (keys == 0) continue;
        if (mask.p > 0) {
            const uint32_t own =
                row_factor(mask.seed, mask.first_row + first_query + i, number);
            for (int64_t j = 0; j < keys; ++j)
                factor[j] = static_cast<int32_t>(own * columns[j]) >= below ? 1 / (1 - mask.p) : 0;
        }
        std::fill(p.begin(), p.end(), 0.0);
        std::fill(grad_p.begin(), grad_p.end(), 0.0);
        for (int64_t d = 0; d < head_dim; ++d)
            for (int64_t j = 0; j < keys; ++j) {
                p[j] += scale * q[d] * key_columns[d * keys + j];
                grad_p[j] += g[d] * value_columns[d * keys + j];
            }
        const double most = *std::max_element(p.begin(), p.end());
        double sum = 0;
        for (double& x : p) sum += x = std::exp(x - most);
        head.lse[i * head.lse_row] = most + std::log(sum);
        double delta = 0;
        for (int64_t j = 0; j < keys; ++j) {
            p[j] /= sum;
            grad_p[j] *= factor[j];
            delta += p[j] * grad_p[j];
        }
        for (int64_t j = 0; j < keys; ++j) {
            const double *k = head.key + j * row, *v = head.value + j * row;
            double *dk = head.grad_key + j * row, *dv = head.grad_value + j * row;
            const double kept = p[j] * factor[j], grad_score = scale * p[j] * (grad_p[j] - delta);
            for (int64_t d = 0; d < head_dim; ++d) {
                o[d] += kept * v[d];
                dv[d] += kept * g[d];
                dq[d] += grad_score * k[d];
                dk[d] += grad_score * q[d];
            }
        }
    }
}

Numbers dense(const aam::Heads& from, const aam::Sequences& sequences, int64_t rows, int64_t heads,
              int64_t head_dim) {
    Numbers to(static_cast<size_t>(rows * heads * head_dim), NEVER);
    if (!from.data) std::fill(to.begin(), to.end(), 0.0);
    for (int64_t n = 0; from.data && n < sequences.count; ++n)
        for (int64_t i = 0; i < sequences.length(n); ++i)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t d = 0; d < head_dim; ++d) {
                    const int64_t at = sequences.start(n) + i;
                    to[(at * heads + h) * head_dim + d] =
                        from.data[at * from.row + h * from.head + d];
                }
    return to;
}

}  // namespace

Attention attention(const aam::AttentionBackward& call, int64_t query_rows, int64_t key_rows,
                    const Mask& mask) {
    const int64_t heads = call.heads, head_dim = call.head_dim, row = heads * head_dim;
    const Numbers query = dense(call.query, call.queries, query_rows, heads, head_dim);
    const Numbers grad = dense(call.grad_output, call.queries, query_rows, heads, head_dim);
    const Numbers key = dense(call.key, call.keys, key_rows, heads, head_dim);
    const Numbers value = dense(call.value, call.keys, key_rows, heads, head_dim);
    Attention result;
    result.output = result.grad_query = Numbers(query.size(), NEVER);
    result.grad_key = result.grad_value = Numbers(key.size(), NEVER);
    result.lse = Numbers(static_cast<size_t>(query_rows * heads), NEVER);
    for (int64_t n = 0; n < call.queries.count; ++n)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t first = call.queries.start(n), first_key = call.keys.start(n);
            const int64_t q = first * row + h * head_dim, k = first_key * row + h * head_dim;
            attend({&query[0] + q, &key[0] + k, &value[0] + k, &grad[0] + q, &result.output[0] + q,
                    &result.lse[0] + first * heads + h, &result.grad_query[0] + q,
                    &result.grad_key[0] + k, &result.grad_value[0] + k, row, heads},
                   call.queries.length(n), call.keys.length(n), head_dim, call.scale, mask, first,
                   first_key, static_cast<uint32_t>(h));
        }
    return result;
}

Pooling pooling(const aam::PoolingBackward& call, int64_t rows) {
    const int64_t dim = call.dim, count = call.sequences.count;
    Pooling result;
    result.pooled.assign(static_cast<size_t>(count * dim), 0.0);
    result.lse.assign(static_cast<size_t>(count), -std::numeric_limits<double>::infinity());
    result.grad_values.assign(static_cast<size_t>(rows * dim), NEVER);
    result.grad_scores.assign(static_cast<size_t>(rows), NEVER);
    for (int64_t n = 0; n < count; ++n) {
        const int64_t start = call.sequences.start(n), length = call.sequences.length(n);
        if (length == 0) continue;
        double most = -std::numeric_limits<double>::infinity(), sum = 0, delta = 0;
        const auto score = [&](int64_t i) -> double {
            return call.scores[(start + i) * call.scores_row];
        };
        for (int64_t i = 0; i < length; ++i) most = std::max(most, score(i));
        for (int64_t i = 0; i < length; ++i) sum += std::exp(score(i) - most);
        result.lse[n] = most + std::log(sum);
        for (int64_t i = 0; i < length; ++i) {
            const double p = std::exp(score(i) - most) / sum;
            double product = 0;
            for (int64_t d = 0; d < dim; ++d) {
                const double value = call.values[(start + i) * call.values_row + d];
                const double grad = call.grad_pooled[n * dim + d];
                result.pooled[n * dim + d] += p * value;
                result.grad_values[(start + i) * dim + d] = p * grad;
                product += grad * value;
            }
            result.grad_scores[start + i] = product;
            delta += p * product;
        }
        for (int64_t i = 0; i < length; ++i) {
            double& grad = result.grad_scores[start + i];
            grad = std::exp(score(i) - most) / sum * (grad - delta);
        }
    }
    return result;
}

namespace {

// (rows, depth) (columns, depth)' + bias: a linear layer.
Numbers linear(const Numbers& x, const float* weight, const float* bias, int64_t depth,
               int64_t columns) {
    const int64_t rows = static_cast<int64_t>(x.size()) / depth;
    Numbers turned(static_cast<size_t>(depth * columns)), y(static_cast<size_t>(rows * columns));
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t k = 0; k < depth; ++k) turned[k * columns + j] = weight[j * depth + k];
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) y[i * columns + j] = bias[j];
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t j = 0; j < columns; ++j)
                y[i * columns + j] += x[i * depth + k] * turned[k * columns + j];
    }
    return y;
}

// The gradients of `linear`: of x (returned), weight and bias.
Numbers linear_backward(const Numbers& grad, const Numbers& x, const float* weight, int64_t depth,
                        int64_t columns, Numbers& grad_weight, Numbers& grad_bias) {
    const int64_t rows = static_cast<int64_t>(x.size()) / depth;
    Numbers grad_x(x.size());
    grad_weight.assign(static_cast<size_t>(columns * depth), 0.0);
    grad_bias.assign(static_cast<size_t>(columns), 0.0);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            const double g = grad[i * columns + j];
            grad_bias[j] += g;
            for (int64_t k = 0; k < depth; ++k) {
                grad_x[i * depth + k] += g * weight[j * depth + k];
                grad_weight[j * depth + k] += g * x[i * depth + k];
            }
        }
    return grad_x;
}

struct Norm {
    Numbers normed, plain, rstd;  // plain: before weight and bias
};

Norm norm(const Numbers& x, const float* weight, const float* bias, int64_t dim) {
    const int64_t rows = static_cast<int64_t>(x.size()) / dim;
    Norm result{Numbers(x.size()), Numbers(x.size()), Numbers(static_cast<size_t>(rows))};
    for (int64_t i = 0; i < rows; ++i) {
        double mean = 0, variance = 0;
        for (int64_t j = 0; j < dim; ++j) mean += x[i * dim + j] / dim;
        for (int64_t j = 0; j < dim; ++j) variance += std::pow(x[i * dim + j] - mean, 2) / dim;
        result.rstd[i] = 1 / std::sqrt(variance + 1e-5);
        for (int64_t j = 0; j < dim; ++j) {
            result.plain[i * dim + j] = (x[i * dim + j] - mean) * result.rstd[i];
            result.normed[i * dim + j] = result.plain[i * dim + j] * weight[j] + bias[j];
        }
    }
    return result;
}

Numbers norm_backward(const Numbers& grad, const Norm& norm, const float* weight, int64_t dim,
                      Numbers& grad_weight, Numbers& grad_bias) {
    Numbers grad_x(grad.size());
    grad_weight.assign(static_cast<size_t>(dim), 0.0);
    grad_bias.assign(static_cast<size_t>(dim), 0.0);
    for (size_t i = 0; i < norm.rstd.size(); ++i) {
        const double *g = &grad[i * dim], *plain = &norm.plain[i * dim];
        double mean = 0, projection = 0;
        for (int64_t j = 0; j < dim; ++j) {
            mean += g[j] * weight[j] / dim;
            projection += g[j] * weight[j] * plain[j] / dim;
            grad_weight[j] += g[j] * plain[j];
            grad_bias[j] += g[j];
        }
        for (int64_t j = 0; j < dim; ++j)
            grad_x[i * dim + j] = norm.rstd[i] * (g[j] * weight[j] - mean - plain[j] * projection);
    }
    return grad_x;
}

constexpr uint32_t SITES = 0x10000;  // heads from here on are the sites of dropout on features

Numbers dropped(Numbers x, int64_t dim, const Mask& mask, uint32_t site) {
    for (size_t i = 0; mask.p > 0 && i < x.size(); ++i)
        x[i] *= mask.factor(mask.first_row + static_cast<int64_t>(i) / dim,
                            static_cast<int64_t>(i) % dim, SITES + site);
    return x;
}

Numbers sum(Numbers a, const Numbers& b) {
    for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    return a;
}

Numbers rows_of(const float* x, int64_t row, int64_t rows, int64_t dim) {
    Numbers to(static_cast<size_t>(rows * dim));
    for (int64_t i = 0; x && i < rows; ++i)
        for (int64_t j = 0; j < dim; ++j) to[i * dim + j] = x[i * row + j];
    return to;
}

}  // namespace

Layer layer(const aam::LayerBackward& call, const Mask& mask) {
    const int64_t dim = call.dim, hidden = call.hidden, heads = call.heads, head_dim = dim / heads;
    const int64_t end = call.sequences.count ? call.sequences.offsets[call.sequences.count] : 0;
    const aam::LayerWeights& w = call.weights;
    Layer r;
    const Numbers x = rows_of(call.x, call.x_row, end, dim);
    const Norm norm1 = norm(x, w.norm1_weight, w.norm1_bias, dim);
    r.qkv = linear(norm1.normed, w.qkv_weight, w.qkv_bias, dim, 3 * dim);
    r.attended.assign(x.size(), 0.0);
    r.lse.assign(static_cast<size_t>(end * heads), 0.0);
    Numbers grad_qkv(r.qkv.size()), grad_attended(x.size()), spare(r.qkv.size());
    Numbers wide(r.qkv.size());  // attended and its gradient with the row distance of qkv
    const auto attend_all = [&](double* output) {
        for (int64_t n = 0; n < call.sequences.count; ++n)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t start = call.sequences.start(n), at = start * 3 * dim + h * head_dim;
                double *qkv = &r.qkv[0] + at, *grad = &grad_qkv[0] + at;
                attend({qkv, qkv + dim, qkv + 2 * dim, &wide[0] + at, output + at,
                        &r.lse[0] + start * heads + h, grad, grad + dim, grad + 2 * dim, 3 * dim,
                        heads},
                       call.sequences.length(n), call.sequences.length(n), head_dim,
                       1 / std::sqrt(static_cast<double>(head_dim)), mask, start, start,
                       static_cast<uint32_t>(h));
            }
    };
    attend_all(&spare[0]);
    for (int64_t i = 0; i < end; ++i) std::copy_n(&spare[i * 3 * dim], dim, &r.attended[i * dim]);
    const Numbers branch = linear(r.attended, w.out_weight, w.out_bias, dim, dim);
    r.mid = sum(x, dropped(branch, dim, mask, 1));
    const Norm norm2 = norm(r.mid, w.norm2_weight, w.norm2_bias, dim);
    r.hidden_input = linear(norm2.normed, w.ffn_in_weight, w.ffn_in_bias, dim, hidden);
    Numbers active = r.hidden_input;
    for (double& value : active) value = gelu(value);
    active = dropped(active, hidden, mask, 2);
    const Numbers ffn = linear(active, w.ffn_out_weight, w.ffn_out_bias, hidden, dim);
    r.output = sum(r.mid, dropped(ffn, dim, mask, 3));

    const Numbers grad_output = rows_of(call.grad_output, call.grad_output_row, end, dim);
    Numbers grad = dropped(grad_output, dim, mask, 3);
    grad = linear_backward(grad, active, w.ffn_out_weight, hidden, dim, r.ffn_out_weight,
                           r.ffn_out_bias);
    grad = dropped(grad, hidden, mask, 2);
    for (size_t i = 0; i < grad.size(); ++i) grad[i] *= gelu_slope(r.hidden_input[i]);
    grad = linear_backward(grad, norm2.normed, w.ffn_in_weight, dim, hidden, r.ffn_in_weight,
                           r.ffn_in_bias);
    grad = norm_backward(grad, norm2, w.norm2_weight, dim, r.norm2_weight, r.norm2_bias);
    const Numbers grad_mid = sum(grad, grad_output);
    grad = dropped(grad_mid, dim, mask, 1);
    grad = linear_backward(grad, r.attended, w.out_weight, dim, dim, r.out_weight, r.out_bias);
    for (int64_t i = 0; i < end; ++i) std::copy_n(&grad[i * dim], dim, &wide[i * 3 * dim]);
    attend_all(&spare[0]);
    grad = linear_backward(grad_qkv, norm1.normed, w.qkv_weight, dim, 3 * dim, r.qkv_weight,
                           r.qkv_bias);
    grad = norm_backward(grad, norm1, w.norm1_weight, dim, r.norm1_weight, r.norm1_bias);
    r.grad_x = sum(grad, grad_mid);
    return r;
}

}  // namespace reference
