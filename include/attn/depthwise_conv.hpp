/// Nystromformer's value skip: a convolution of the values along the sequence.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/panel.hpp>
#include <attn/detail/partition.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

namespace attn {
namespace detail {

inline bool keeps_row(std::span<const std::uint8_t> keep, Index i) { return keep.empty() || keep[static_cast<std::size_t>(i)] != 0; }

/// Shapes agree, and the taps are odd.
template <class T>
void check_conv(std::string_view who, const ConstMatrixRef<T>& v, std::size_t taps, const char* name, const ConstMatrixRef<T>& other,
                const Mask& mask) {
  check_not_empty(who, "v", v);
  check_shape(who, name, other, v.rows(), v.cols());
  check_length(who, "keep_key", mask.keep_key.size(), "v", v.rows());
  check_length(who, "keep_query", mask.keep_query.size(), "v", v.rows());
  if (taps % 2 == 0) refuse(who, "filter has %zu taps, should be odd", taps);
}

/// What is written overlaps nothing; dout is empty in the forward pass.
template <class T>
void check_conv_apart(std::string_view who, std::span<const Memory> results, const ConstMatrixRef<T>& v, std::span<const T> filter,
                      const ConstMatrixRef<T>& dout, const Mask& mask) {
  const Memory inputs[] = {Memory::of("v", v), Memory::of("filter", filter), Memory::of("dout", dout),
                           Memory::of("keep_key", mask.keep_key), Memory::of("keep_query", mask.keep_query)};
  check_apart(who, results, inputs);
}

/// body(i) for each of n rows, some at a time on each worker.
template <class Body>
void for_each_row(Index n, Context& context, const Body& body) {
  constexpr Index kRows = 256;
  const Index blocks = (n + kRows - 1) / kRows;
  context.for_each(blocks, [&](Index block, int) {
    const Range rows = nth_part(n, blocks, block);
    for (Index i = rows.first; i < rows.last; ++i) body(i);
  });
}

/// The rows that a filter of so many taps reaches from row i of n.
inline Range reached_rows(Index n, Index taps, Index i) {
  return {std::max<Index>(0, i - taps / 2), std::min(n, i + taps / 2 + 1)};
}

}  // namespace detail

/// out_i <- out_i + sum_t filter_t v_(i + t - (taps - 1) / 2): one odd filter for all columns of a head, zeros beyond the sequence, no
/// bias; to be added to an attention's result. v, out (n, d_v). Rows that mask.keep_key drops count as zeros, those that
/// mask.keep_query drops get nothing. Throws std::invalid_argument when shapes disagree or are empty, the taps are not odd, or out overlaps
/// an argument or itself.
/// 2 n d_v taps flops. Xiong et al. 2021, section 3.3, with 33 or 35 taps.
template <class T>
void depthwise_conv(ConstMatrixRef<T> v, std::span<const std::type_identity_t<T>> filter, std::type_identity_t<MatrixRef<T>> out,
                    Context& context, const Mask& mask = {}) {
  detail::check_conv<T>("depthwise_conv", v, filter.size(), "out", out, mask);
  const detail::Memory result = detail::Memory::of("out", out);
  detail::check_conv_apart<T>("depthwise_conv", {&result, 1}, v, filter, {nullptr, 0, 0, 0}, mask);
  const auto taps = static_cast<Index>(filter.size());
  detail::for_each_row(v.rows(), context, [&](Index i) {
    if (!detail::keeps_row(mask.keep_query, i)) return;
    const detail::Range near = detail::reached_rows(v.rows(), taps, i);
    for (Index j = near.first; j < near.last; ++j) {
      if (detail::keeps_row(mask.keep_key, j)) out.row(i) += filter[static_cast<std::size_t>(j - i + taps / 2)] * v.row(j);
    }
  });
}

/// The same for a matrix or any view of one: its type is that of all.
template <class V>
  requires(!std::same_as<V, ConstMatrixRef<typename V::Scalar>>)
void depthwise_conv(const V& v, std::span<const typename V::Scalar> filter, MatrixRef<typename V::Scalar> out, Context& context,
                    const Mask& mask = {}) {
  depthwise_conv<typename V::Scalar>(v, filter, out, context, mask);
}

/// Its gradients, for dout (n, d_v), that of a loss by out. dv_j <- dv_j + sum_i filter_(j - i + (taps - 1) / 2) dout_i, added to that
/// of the attention, and dfilter_t <- sum_i dout_i.v_(i + t - (taps - 1) / 2), over the rows that the masks keep. Throws
/// std::invalid_argument as above. 4 n d_v taps flops.
template <class T>
void depthwise_conv_backward(ConstMatrixRef<T> v, std::span<const std::type_identity_t<T>> filter,
                             std::type_identity_t<ConstMatrixRef<T>> dout, std::type_identity_t<MatrixRef<T>> dv,
                             std::span<std::type_identity_t<T>> dfilter, Context& context, const Mask& mask = {}) {
  constexpr std::string_view kName = "depthwise_conv_backward";
  detail::check_conv<T>(kName, v, filter.size(), "dout", dout, mask);
  detail::check_shape(kName, "dv", dv, v.rows(), v.cols());
  if (dfilter.size() != filter.size()) detail::refuse(kName, "dfilter has %zu entries, filter has %zu", dfilter.size(), filter.size());
  const detail::Memory results[] = {detail::Memory::of("dv", dv), detail::Memory::of("dfilter", dfilter)};
  detail::check_conv_apart<T>(kName, results, v, filter, dout, mask);
  const auto taps = static_cast<Index>(filter.size());
  detail::for_each_row(v.rows(), context, [&](Index j) {
    if (!detail::keeps_row(mask.keep_key, j)) return;
    const detail::Range near = detail::reached_rows(v.rows(), taps, j);
    for (Index i = near.first; i < near.last; ++i) {
      if (detail::keeps_row(mask.keep_query, i)) dv.row(j) += filter[static_cast<std::size_t>(j - i + taps / 2)] * dout.row(i);
    }
  });
  context.for_each(taps, [&](Index tap, int) {
    T sum = 0;
    for (Index i = std::max<Index>(0, taps / 2 - tap); i < std::min(v.rows(), v.rows() + taps / 2 - tap); ++i) {
      const Index j = i + tap - taps / 2;
      if (!detail::keeps_row(mask.keep_query, i) || !detail::keeps_row(mask.keep_key, j)) continue;
      sum += detail::dot_product(dout.data() + i * dout.outerStride(), v.data() + j * v.outerStride(), v.cols());
    }
    dfilter[static_cast<std::size_t>(tap)] = sum;
  });
}

/// The same for a matrix or any view of one: its type is that of all.
template <class V>
  requires(!std::same_as<V, ConstMatrixRef<typename V::Scalar>>)
void depthwise_conv_backward(const V& v, std::span<const typename V::Scalar> filter, ConstMatrixRef<typename V::Scalar> dout,
                             MatrixRef<typename V::Scalar> dv, std::span<typename V::Scalar> dfilter, Context& context,
                             const Mask& mask = {}) {
  depthwise_conv_backward<typename V::Scalar>(v, filter, dout, dv, dfilter, context, mask);
}

}  // namespace attn
