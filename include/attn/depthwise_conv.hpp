/// Nystromformer's value skip: a convolution of the values along the sequence.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

namespace attn {
namespace detail {

inline bool keeps_row(std::span<const std::uint8_t> keep, Index i) {
  return keep.empty() || keep[static_cast<std::size_t>(i)] != 0;
}

/// Shapes agree, and the taps are odd.
template <class T>
void check_conv(std::string_view who, const ConstMatrixRef<T>& v, std::span<const T> filter, const char* name,
                const ConstMatrixRef<T>& other, const Mask& mask) {
  check_not_empty(who, "v", v);
  check_shape(who, name, other, v.rows(), v.cols());
  check_length(who, "keep_key", mask.keep_key.size(), "v", v.rows());
  check_length(who, "keep_query", mask.keep_query.size(), "v", v.rows());
  if (filter.size() % 2 == 0) refuse(who, "filter has %zu taps, should be odd", filter.size());
}

/// What is written overlaps nothing; dout is empty in the forward pass.
template <class T>
void check_conv_apart(std::string_view who, const Memories& results, const ConstMatrixRef<T>& v,
                      std::span<const T> filter, const ConstMatrixRef<T>& dout, const Mask& mask) {
  const Memory inputs[] = {Memory::of("v", v), Memory::of("filter", filter), Memory::of("dout", dout),
                           Memory::of("keep_key", mask.keep_key), Memory::of("keep_query", mask.keep_query)};
  check_apart(who, results, inputs);
}

/// The rows that a filter of so many taps reaches from the given ones of n.
inline Range reached_rows(Index n, Index taps, Range rows) {
  return {std::max<Index>(0, rows.first - taps / 2), std::min(n, rows.last + taps / 2)};
}

/// How many blocks the n rows of a convolution are cut into.
inline Index conv_blocks(Index n) {
  return (n + 255) / 256;
}

/// body(block, rows, context) for the n rows of a convolution in blocks, which are tasks of their own.
template <class Body>
void for_each_conv_block(Index n, Context& context, const Body& body) {
  context.for_each_call(conv_blocks(n), [&](Index block, Context& of_worker) {
    body(block, nth_part(n, conv_blocks(n), block), of_worker);
  });
}

/// Some rows of m as arithmetic reads them.
template <class T>
ConstMatrixRef<Arithmetic<T>> window(const ConstMatrixRef<T>& m, Range rows, Scratch& scratch, Context& context) {
  const ConstMatrixRef<T> some = m.middleRows(rows.first, rows.last - rows.first);
  return in_type<Arithmetic<T>>(some, scratch, context);
}

/// to_i <- to_i + sum_t filter_t from_(i + direction (t - (taps - 1) / 2)) over the rows that are kept; each row is
/// rounded once.
template <class T>
void add_convolution(const ConstMatrixRef<T>& from, std::span<const T> filter, Index direction, const MatrixRef<T>& to,
                     std::span<const std::uint8_t> keep_from, std::span<const std::uint8_t> keep_to, Context& context) {
  using Wide = Arithmetic<T>;
  const Index n = from.rows(), taps = static_cast<Index>(filter.size());
  const TokenRows<Wide> before{ConstMatrixRef<T>(to)};
  const ResultRows<Wide> after{to};
  for_each_conv_block(n, context, [&](Index, Range rows, Context& of_worker) {
    Scratch scratch = of_worker.scratch();
    const Range reached = reached_rows(n, taps, rows);
    const ConstMatrixRef<Wide> read = window(from, reached, scratch, of_worker);
    Wide* const buffer = scratch.elements<Wide>(to.cols());
    for (Index i = rows.first; i < rows.last; ++i) {
      if (!keeps_row(keep_to, i)) continue;
      before.row(i, buffer);
      Wide* const sum = after.row(i, buffer);
      const Range near = reached_rows(n, taps, {i, i + 1});
      for (Index j = near.first; j < near.last; ++j) {
        if (!keeps_row(keep_from, j)) continue;
        const T tap = filter[static_cast<std::size_t>(direction * (j - i) + taps / 2)];
        add_row(static_cast<Wide>(tap), row_of(read, j - reached.first), sum, to.cols());
      }
      after.finish_row(i, sum);
    }
  });
}

/// dfilter_t <- sum_i dout_i.v_(i + t - (taps - 1) / 2) over the rows that are kept: sums of a block, then of blocks.
template <class T>
void set_filter_gradient(const ConstMatrixRef<T>& v, const ConstMatrixRef<T>& dout, std::span<T> dfilter,
                         const Mask& mask, Context& context) {
  using Wide = Arithmetic<T>;
  Scratch scratch = context.scratch();
  const Index n = v.rows(), taps = static_cast<Index>(dfilter.size());
  const MatrixRef<Wide> parts = scratch.matrix<Wide>(conv_blocks(n), taps);
  set_zero(parts);
  for_each_conv_block(n, context, [&](Index block, Range rows, Context& of_worker) {
    Scratch temporary = of_worker.scratch();
    const Range reached = reached_rows(n, taps, rows);
    const ConstMatrixRef<Wide> values = window(v, reached, temporary, of_worker),
                               douts = window(dout, rows, temporary, of_worker);
    Wide* const sums = parts.data() + block * taps;
    for (Index i = rows.first; i < rows.last; ++i) {
      if (!keeps_row(mask.keep_query, i)) continue;
      const Range near = reached_rows(n, taps, {i, i + 1});
      for (Index j = near.first; j < near.last; ++j) {
        if (!keeps_row(mask.keep_key, j)) continue;
        sums[j - i + taps / 2] +=
            dot_product(row_of(douts, i - rows.first), row_of(values, j - reached.first), v.cols());
      }
    }
  });
  for (Index tap = 0; tap < taps; ++tap) {
    Wide sum = 0;
    for (Index block = 0; block < parts.rows(); ++block) sum += parts.data()[block * taps + tap];
    dfilter[static_cast<std::size_t>(tap)] = static_cast<T>(sum);
  }
}

}  // namespace detail

/// out_i <- out_i + sum_t filter_t v_(i + t - (taps - 1) / 2): one odd filter for all columns of a head, zeros beyond
/// the sequence, no bias; to be added to an attention's result. v, out (n, d_v). Rows that mask.keep_key drops count as
/// zeros, those that mask.keep_query drops get nothing. Throws std::invalid_argument when shapes disagree or are empty,
/// the taps are not odd, or out overlaps an argument or itself. Narrow types are added up in float. 2 n d_v taps flops.
/// Xiong et al. 2021, section 3.3, with 33 or 35 taps.
template <class T>
void depthwise_conv(ConstMatrixRef<T> v, std::span<const std::type_identity_t<T>> filter,
                    std::type_identity_t<MatrixRef<T>> out, Context& context, const Mask& mask = {}) {
  detail::check_conv<T>("depthwise_conv", v, filter, "out", out, mask);
  const detail::Memory result = detail::Memory::of("out", out);
  detail::check_conv_apart<T>("depthwise_conv", {&result, 1}, v, filter, {nullptr, 0, 0, 0}, mask);
  detail::add_convolution<T>(v, filter, 1, out, mask.keep_key, mask.keep_query, context);
}

/// The same for a matrix or any view of one: its type is that of all.
template <class V>
  requires(!std::same_as<V, ConstMatrixRef<typename V::Scalar>>)
void depthwise_conv(const V& v, std::span<const typename V::Scalar> filter, MatrixRef<typename V::Scalar> out,
                    Context& context, const Mask& mask = {}) {
  depthwise_conv<typename V::Scalar>(v, filter, out, context, mask);
}

/// Its gradients, for dout (n, d_v), that of a loss by out. dv_j <- dv_j + sum_i filter_(j - i + (taps - 1) / 2)
/// dout_i, added to that of the attention, and dfilter_t <- sum_i dout_i.v_(i + t - (taps - 1) / 2), over the rows that
/// the masks keep. Throws std::invalid_argument as above. 4 n d_v taps flops.
template <class T>
void depthwise_conv_backward(ConstMatrixRef<T> v, std::span<const std::type_identity_t<T>> filter,
                             std::type_identity_t<ConstMatrixRef<T>> dout, std::type_identity_t<MatrixRef<T>> dv,
                             std::span<std::type_identity_t<T>> dfilter, Context& context, const Mask& mask = {}) {
  constexpr std::string_view kName = "depthwise_conv_backward";
  detail::check_conv<T>(kName, v, filter, "dout", dout, mask);
  detail::check_shape(kName, "dv", dv, v.rows(), v.cols());
  if (dfilter.size() != filter.size())
    detail::refuse(kName, "dfilter has %zu entries, filter has %zu", dfilter.size(), filter.size());
  const detail::Memory results[] = {detail::Memory::of("dv", dv), detail::Memory::of("dfilter", dfilter)};
  detail::check_conv_apart<T>(kName, results, v, filter, dout, mask);
  detail::add_convolution<T>(dout, filter, -1, dv, mask.keep_query, mask.keep_key, context);
  detail::set_filter_gradient<T>(v, dout, dfilter, mask, context);
}

/// The same for a matrix or any view of one: its type is that of all.
template <class V>
  requires(!std::same_as<V, ConstMatrixRef<typename V::Scalar>>)
void depthwise_conv_backward(const V& v, std::span<const typename V::Scalar> filter,
                             ConstMatrixRef<typename V::Scalar> dout, MatrixRef<typename V::Scalar> dv,
                             std::span<typename V::Scalar> dfilter, Context& context, const Mask& mask = {}) {
  depthwise_conv_backward<typename V::Scalar>(v, filter, dout, dv, dfilter, context, mask);
}

}  // namespace attn
