/// Nystromformer's value skip: a convolution of the values along the sequence.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/partition.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <span>
#include <type_traits>

namespace attn {

/// out_i <- out_i + sum_t filter_t v_(i + t - (taps - 1) / 2): one odd filter for all columns of a head, zeros beyond the sequence, no
/// bias; to be added to an attention's result. v, out (n, d_v). Rows that mask.keep_key drops count as zeros, those that
/// mask.keep_query drops get nothing. Throws std::invalid_argument when shapes disagree or are empty, or the taps are not odd.
/// 2 n d_v taps flops. Xiong et al. 2021, section 3.3, with 33 or 35 taps.
template <class T>
void depthwise_conv(ConstMatrixRef<T> v, std::span<const std::type_identity_t<T>> filter, std::type_identity_t<MatrixRef<T>> out,
                    Context& context, const Mask& mask = {}) {
  constexpr Index kRows = 256;
  const auto taps = static_cast<Index>(filter.size());
  detail::check_not_empty("depthwise_conv", "v", v);
  detail::check_shape("depthwise_conv", "out", out, v.rows(), v.cols());
  detail::check_length("depthwise_conv", "keep_key", mask.keep_key.size(), "v", v.rows());
  detail::check_length("depthwise_conv", "keep_query", mask.keep_query.size(), "v", v.rows());
  if (taps % 2 == 0) detail::refuse("depthwise_conv", "filter has ", taps, " taps, should be odd");
  const auto keeps = [](std::span<const std::uint8_t> keep, Index i) { return keep.empty() || keep[static_cast<std::size_t>(i)] != 0; };
  const Index blocks = (v.rows() + kRows - 1) / kRows;
  context.for_each(blocks, [&](Index block, int) {
    const detail::Range rows = detail::nth_part(v.rows(), blocks, block);
    for (Index i = rows.first; i < rows.last; ++i) {
      if (!keeps(mask.keep_query, i)) continue;
      const Index first = std::max<Index>(0, i - taps / 2), last = std::min(v.rows() - 1, i + taps / 2);
      for (Index j = first; j <= last; ++j) {
        if (keeps(mask.keep_key, j)) out.row(i) += filter[static_cast<std::size_t>(j - i + taps / 2)] * v.row(j);
      }
    }
  });
}

}  // namespace attn
