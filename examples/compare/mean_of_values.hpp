/// The baseline that an approximation has to beat.
#pragma once

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
  const attn::Index n_q = in.q.rows(), n_k = in.k.rows();
  attn::Matrix<float> out = attn::Matrix<float>::Zero(n_q, in.v.cols());
  Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(in.v.cols());
  attn::Index next = 0, count = 0;
  for (attn::Index i = 0; i < n_q; ++i) {
    const attn::Index offset = in.mask.causal == attn::Causal::lower_right ? n_k - n_q : 0;
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
