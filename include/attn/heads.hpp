/// Batches and heads: views of four-dimensional arrays, and of what a projection writes.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/engine/checks.hpp>
#include <attn/matrix.hpp>

#include <concepts>
#include <type_traits>

namespace attn {

/// The heads of a batch in any array whose features lie side by side: entry (b, h, i, c) is at
///   data[b batch_stride + h head_stride + i row_stride + c]     b < batch, h < heads, i < length, c < dim
/// HeadsView<const T> is read-only. Does not own the data. Where an input repeats its heads or batch items, their
/// stride is 0. Strides are named where it is made: HeadsView<float>{.data = x, .batch = 2, ..., .row_stride = 64}.
template <class T>
struct HeadsView {
  T* data;             ///< entry (0, 0, 0, 0)
  Index batch;         ///< items
  Index heads;         ///< of an item
  Index length;        ///< tokens of a head
  Index dim;           ///< features of a token
  Index batch_stride;  ///< elements from item to item
  Index head_stride;   ///< elements from head to head
  Index row_stride;    ///< elements from token to token

  /// One head, (length, dim).
  auto operator()(Index b, Index h) const {
    using Ref = std::conditional_t<std::is_const_v<T>, ConstMatrixRef<std::remove_const_t<T>>, MatrixRef<T>>;
    return Ref(data + b * batch_stride + h * head_stride, length, dim, row_stride);
  }

  /// The first tokens of every head, as many as a cache with room for length holds by now.
  HeadsView first(Index tokens) const {
    if (tokens < 0 || tokens > length) detail::refuse("HeadsView", "first(%td) of %td tokens", tokens, length);
    HeadsView some = *this;
    some.length = tokens;
    return some;
  }

  /// What can be written can be read.
  template <class U>
    requires(std::same_as<U, const T> && !std::is_const_v<T>)
  operator HeadsView<U>() const {  // NOLINT: implicit, as from T* to const T*
    return {data, batch, heads, length, dim, batch_stride, head_stride, row_stride};
  }
};

/// View of a contiguous array [batch, heads, length, dim]: the tokens of a head follow one another.
template <class T>
constexpr HeadsView<T> head_major(T* data, Index batch, Index heads, Index length, Index dim) {
  return {data, batch, heads, length, dim, heads * length * dim, length * dim, dim};
}

/// View of a contiguous array [batch, length, heads, dim]: the heads of a token follow one another, as a projection
/// writes them.
template <class T>
constexpr HeadsView<T> token_major(T* data, Index batch, Index length, Index heads, Index dim) {
  return {data, batch, heads, length, dim, length * heads * dim, dim, heads * dim};
}

namespace detail {

/// A matrix or view whose rows lie contiguously, which is not about to end.
template <class M>
concept LastingRows =
    RowMajorWithContiguousRows<M, typename EigenType<M>::Scalar> && (std::is_lvalue_reference_v<M> || !OwnsElements<M>);

/// What may be done with the elements of M.
template <class M>
using ElementOf = std::remove_pointer_t<decltype(std::declval<M&>().data())>;

/// Heads side by side in columns [first, first + heads dim) of x, whose rows are the tokens of batch items one after
/// another.
template <class M>
HeadsView<ElementOf<M>> heads_in_columns(M& x, Index batch, Index first, Index heads, Index dim) {
  const Index length = x.rows() / batch, row = row_stride(x.derived());
  return {x.data() + first, batch, heads, length, dim, length * row, dim, row};
}

inline void check_rows(const char* who, Index rows, Index batch) {
  check_at_least(who, "batch", static_cast<double>(batch), 1);
  if (rows % batch != 0) refuse(who, "x has %td rows, which %td batch items do not divide", rows, batch);
}

}  // namespace detail

/// View of a matrix x (batch length, heads dim), as a projection writes it: one token a row, its heads side by side; a
/// block of columns is as good. x must outlive it. Throws std::invalid_argument where batch or heads do not divide x.
template <class M>
  requires detail::LastingRows<M>
HeadsView<detail::ElementOf<M>> heads_of(M&& x, Index heads, Index batch = 1) {
  detail::check_at_least("heads_of", "heads", static_cast<double>(heads), 1);
  detail::check_rows("heads_of", x.rows(), batch);
  if (x.cols() % heads != 0)
    detail::refuse("heads_of", "x has %td columns, which %td heads do not divide", x.cols(), heads);
  return detail::heads_in_columns(x, batch, 0, heads, x.cols() / heads);
}

/// Queries, keys and values side by side in one array.
template <class T>
struct FusedHeads {
  HeadsView<T> q;  ///< (batch, heads, length, dim)
  HeadsView<T> k;  ///< (batch, kv_heads, length, dim)
  HeadsView<T> v;  ///< (batch, kv_heads, length, dim)
};

/// Views of a fused projection x (batch length, (heads + 2 kv_heads) dim): in each row all heads of the query, then all
/// of the key, then all of the value. x must outlive them. Throws std::invalid_argument where the counts do not divide
/// x.
template <class M>
  requires detail::LastingRows<M>
FusedHeads<detail::ElementOf<M>> fused_heads(M&& x, Index heads, Index kv_heads, Index batch = 1) {
  detail::check_at_least("fused_heads", "heads", static_cast<double>(heads), 1);
  detail::check_at_least("fused_heads", "kv_heads", static_cast<double>(kv_heads), 1);
  detail::check_rows("fused_heads", x.rows(), batch);
  const Index parts = heads + 2 * kv_heads, dim = x.cols() / parts;
  if (x.cols() % parts != 0) {
    detail::refuse("fused_heads", "x has %td columns, which %td heads and twice %td do not divide", x.cols(), heads,
                   kv_heads);
  }
  return {detail::heads_in_columns(x, batch, 0, heads, dim),
          detail::heads_in_columns(x, batch, heads * dim, kv_heads, dim),
          detail::heads_in_columns(x, batch, (heads + kv_heads) * dim, kv_heads, dim)};
}

}  // namespace attn
