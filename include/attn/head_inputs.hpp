/// What attention of a batch of heads reads: arrays, masks, lengths, packed sequences and biases.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/engine/rows.hpp>
#include <attn/heads.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

namespace attn {

/// How many tokens a batch item has: rows from there on are padding, whatever they hold. They are never read, and their
/// rows of results and gradients are 0.
struct Lengths {
  Index queries;  ///< at most n_q
  Index keys;     ///< at most n_k
};

/// Key biases of a batch, as Inputs has them: that of key j for query head h of item b is at
///   data[b batch_stride + h head_stride + j]
/// Strides of 0 give items or heads the same.
template <class T>
struct HeadsBias {
  const T* data = nullptr;  ///< null: no biases
  Index batch_stride = 0;   ///< elements from item to item
  Index head_stride = 0;    ///< elements from query head to query head
};

/// What multi_head reads. Of masks there are none, one for all batch items, or one for each; of lengths none, or those
/// of each item.
///
/// Packed sequences lie one after another in arrays of one batch item, without padding between them: sequence b has
/// rows [query_offsets[b], query_offsets[b + 1]) of q and out, and such rows of k and v by key_offsets (cu_seqlens
/// elsewhere). It is an item of the batch in every other respect: causal masks count rows of its own, and there may be
/// a mask for each. keep_key, keep_query and key_bias are of whole arrays.
///
/// Cache is the type of keys and values, where that is another one: half or bfloat16 beside float, forward alone.
template <class T, class Cache = T>
struct HeadInputs {
  HeadsView<const T> q;                    ///< queries (batch, H_q, n_q, d)
  HeadsView<const Cache> k;                ///< keys (batch, H_k, n_k, d), H_k divides H_q
  HeadsView<const Cache> v;                ///< values (batch, H_k, n_k, d_v)
  std::span<const Mask> masks{};           ///< each as for one head
  std::span<const Lengths> lengths{};      ///< none where every item has n_q and n_k tokens
  std::span<const Index> query_offsets{};  ///< of packed sequences, ascending, one more than there are
  std::span<const Index> key_offsets{};    ///< likewise
  HeadsBias<T> key_bias{};                 ///< log-weights of keys
  std::span<const double> alibi_slopes{};  ///< none, or one for each query head, see Inputs
};

namespace detail {

/// CacheInputs where there are such.
template <class Cache>
struct CacheInputsOf {
  using Type = void;
};
template <NarrowScalar Cache>
struct CacheInputsOf<Cache> {
  using Type = CacheInputs<Cache>;
};
template <class Cache>
using CacheOf = typename CacheInputsOf<Cache>::Type;

/// The inputs of one call, item by item and head by head.
template <class T, class Cache = T>
struct HeadItems : HeadInputs<T, Cache> {
  using In = HeadInputs<T, Cache>;
  using Item = std::conditional_t<std::is_same_v<T, Cache>, Inputs<T>, CacheOf<Cache>>;
  using In::k, In::q, In::v;

  bool packed() const { return !In::query_offsets.empty(); }

  /// Batch items, or packed sequences.
  Index count() const { return packed() ? static_cast<Index>(In::query_offsets.size()) - 1 : q.batch; }

  /// Whether all items have the whole rows of the arrays.
  bool uniform() const { return In::lengths.empty() && !packed(); }

  /// The rows of an item.
  Range queries(Index b) const {
    const auto i = static_cast<std::size_t>(b);
    if (packed()) return {In::query_offsets[i], In::query_offsets[i + 1]};
    return {0, In::lengths.empty() ? q.length : In::lengths[i].queries};
  }
  Range keys(Index b) const {
    const auto i = static_cast<std::size_t>(b);
    if (packed()) return {In::key_offsets[i], In::key_offsets[i + 1]};
    return {0, In::lengths.empty() ? k.length : In::lengths[i].keys};
  }

  /// Those rows of a head in an array, one token of which may have any row_stride.
  template <class U>
  auto head(const HeadsView<U>& x, Index b, Index h, Range rows) const {
    HeadsView<U> some = x;
    if (x.length == 1) some.row_stride = std::max(x.row_stride, x.dim);
    some.data += rows.first * some.row_stride;
    some.length = rows.last - rows.first;
    return some(packed() ? 0 : b, h);
  }
  template <class U>
  auto of_queries(const HeadsView<U>& x, Index b, Index h) const {
    return head(x, b, h, queries(b));
  }
  template <class U>
  auto of_keys(const HeadsView<U>& x, Index b, Index h) const {
    return head(x, b, h, keys(b));
  }

  /// Those of query head h of item b, with the key and value head of its group.
  Item operator()(Index b, Index h) const {
    const Index kv = h / (q.heads / k.heads);
    Item in{of_queries(q, b, h), of_keys(k, b, kv), of_keys(v, b, kv), mask(b)};
    if (In::key_bias.data != nullptr) {
      const T* const bias = In::key_bias.data + (packed() ? 0 : b) * In::key_bias.batch_stride;
      in.key_bias = {bias + h * In::key_bias.head_stride + keys(b).first, static_cast<std::size_t>(in.k.rows())};
    }
    if (!In::alibi_slopes.empty()) in.alibi_slope = In::alibi_slopes[static_cast<std::size_t>(h)];
    return in;
  }

  Mask mask(Index b) const {
    if (In::masks.empty()) return {};
    Mask mask = In::masks.size() == 1 ? In::masks.front() : In::masks[static_cast<std::size_t>(b)];
    mask.keep_key = part(mask.keep_key, keys(b));
    mask.keep_query = part(mask.keep_query, queries(b));
    return mask;
  }

  /// As many items as it takes to see every mask and all shapes.
  Index different_items() const {
    return uniform() ? std::max<Index>(1, static_cast<Index>(In::masks.size())) : count();
  }

  /// Whether heads of a group differ in more than their queries.
  bool heads_differ() const { return In::key_bias.head_stride != 0 || !In::alibi_slopes.empty(); }

 private:
  static std::span<const std::uint8_t> part(std::span<const std::uint8_t> keep, Range rows) {
    return keep.empty() ? keep : part_of(keep, rows.first, rows.last - rows.first);
  }
};

/// Whether one head of an item without queries or without keys.
template <class Item>
bool sees_nothing(const Item& in) {
  return in.q.rows() == 0 || in.k.rows() == 0;
}

}  // namespace detail
}  // namespace attn
