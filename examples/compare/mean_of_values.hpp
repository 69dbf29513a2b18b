/// The baseline that an approximation has to beat.
#pragma once

#include <attn/attention_operator.hpp>
#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstdint>
#include <span>

/// Every query gets the mean of the values that it sees, as if all scores were equal; zeros where it sees none. O((n_q
/// + n_k) d_v).
inline attn::Matrix<float> mean_of_values(const attn::Inputs<float>& in) {
  const auto kept = [](std::span<const std::uint8_t> keep, attn::Index i) {
    return keep.empty() || keep[static_cast<std::size_t>(i)] != 0;
  };
  const auto length = [&](std::span<const std::uint8_t> keep, attn::Index n) {
    while (n > 0 && !kept(keep, n - 1)) --n;
    return n;
  };
  const attn::Index n_q = in.q.rows(), n_k = in.k.rows();
  attn::Matrix<float> out = attn::Matrix<float>::Zero(n_q, in.v.cols());
  Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(in.v.cols());
  attn::Index next = 0, count = 0, offset = 0;
  if (in.mask.causal == attn::Causal::lower_right)
    offset = length(in.mask.keep_key, n_k) - length(in.mask.keep_query, n_q);
  for (attn::Index i = 0; i < n_q; ++i) {
    const attn::Index seen = in.mask.causal == attn::Causal::none ? n_k : std::min(n_k, i + 1 + offset);
    for (; next < seen; ++next) {
      if (!kept(in.mask.keep_key, next)) continue;
      sum += in.v.row(next).cast<double>();
      ++count;
    }
    if (count > 0 && kept(in.mask.keep_query, i)) out.row(i) = (sum / static_cast<double>(count)).cast<float>();
  }
  return out;
}

/// The matrix of mean_of_values where no mask is causal: 1 / (kept keys) for a kept query and a kept key, else 0. The
/// inputs must outlive it.
class MeanOperator {
 public:
  using Scalar = float;

  explicit MeanOperator(const attn::Inputs<float>& in) : in_(in) {}

  attn::Index rows() const { return in_.q.rows(); }
  attn::Index cols() const { return in_.k.rows(); }

  void apply(const attn::ConstMatrixRef<float>& x, attn::MatrixRef<float> y, attn::Context&) const {
    y = mean_of_values({in_.q, in_.k, x, in_.mask});
  }

  void apply_transpose(const attn::ConstMatrixRef<float>& x, attn::MatrixRef<float> y, attn::Context&) const {
    const attn::Mask swapped{.keep_key = in_.mask.keep_query, .keep_query = in_.mask.keep_key};
    y = mean_of_values({in_.k, in_.q, x, swapped});
    y *= kept(in_.mask.keep_query, rows()) / std::max(1.0F, kept(in_.mask.keep_key, cols()));
  }

 private:
  static float kept(std::span<const std::uint8_t> keep, attn::Index n) {
    const auto dropped = std::count(keep.begin(), keep.end(), std::uint8_t{0});
    return static_cast<float>(n - dropped);
  }

  attn::Inputs<float> in_;
};
