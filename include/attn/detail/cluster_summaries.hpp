/// What a landmark knows of clusters of keys: one key, one value and one log-weight of each, exact at the landmark.
///
///   r_j = softmax_{j in c}(s l.k_j + a_j)      k_c = sum r_j k_j      v_c = sum r_j v_j
///   e_c = log sum_{j in c} exp(s l.k_j + a_j) - s l.k_c
#pragma once

#include <attn/context.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

namespace attn::detail {

/// x in the count first lanes, fill in the others, whatever x has there.
template <class T>
inline Packet<T> first_lanes(Packet<T> x, Index count, T fill) {
  using Bits = typename VectorOf<T, BitsOf<T>>::Type;
  static constexpr auto kMask = [] {
    std::array<BitsOf<T>, 2 * kLanes<T>> mask{};
    std::fill_n(mask.begin(), kLanes<T>, ~BitsOf<T>{0});
    return mask;
  }();
  Bits keep;
  std::memcpy(&keep, kMask.data() + kLanes<T> - count, sizeof keep);
  return std::bit_cast<Packet<T>>((std::bit_cast<Bits>(x) & keep) | (std::bit_cast<Bits>(broadcast(fill)) & ~keep));
}

/// Keys in a row whose sum is one chain.
inline constexpr Index kKeysAtOnce = 256;

/// kPackets packets of to <- (more ? to : 0) + the sum of factor_i row_i, for count rows that lie stride apart.
template <int kPackets, class T>
void sum_some_packets(const T* factors, Index count, const T* rows, Index stride, bool more, T* to) {
  Packet<T> total[array_size(kPackets)];
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) total[p] = more ? load(to + p * kLanes<T>) : broadcast(T(0));
  for (Index i = 0; i < count; ++i, rows += stride) {
    const auto factor = broadcast(factors[i]);
#pragma GCC unroll 4
    for (int p = 0; p < kPackets; ++p) total[p] = multiply_add(factor, load(rows + p * kLanes<T>), total[p]);
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) store(to + p * kLanes<T>, total[p]);
}

/// to <- the sum of factor_i row_i, for count padded rows of d elements that lie stride apart, some packets at a time.
template <class T>
[[gnu::noinline]] void sum_scaled_rows(const T* factors, Index count, const T* rows, Index stride, Index d, T* to) {
  constexpr Index kAtOnce = 4 * kLanes<T>;
  for (Index first = 0; first == 0 || first < count; first += kKeysAtOnce) {
    const Index some = std::min(kKeysAtOnce, count - first);
    const T* const row = rows + first * stride;
    Index c = 0;
    for (; c + kAtOnce <= d; c += kAtOnce) {
      sum_some_packets<4>(factors + first, some, row + c, stride, first > 0, to + c);
    }
    for (; c < d; c += kLanes<T>) sum_some_packets<1>(factors + first, some, row + c, stride, first > 0, to + c);
  }
}

/// What a landmark knows of some clusters.
template <class T>
struct Summaries {
  MatrixRef<T> tokens;  ///< [k_c | v_c] (count, d + d_v)
  T* bias;              ///< e_c, in units of log2

  static Summaries make(Index count, Index width, Scratch& scratch) {
    return {scratch.matrix<T>(count, width), scratch.elements<T>(count)};
  }

  static Summaries none() { return {{nullptr, 0, 0, 0}, nullptr}; }

  Summaries part(Index first, Index count) const {
    return {{row_of(tokens, first), count, tokens.cols(), tokens.outerStride()}, bias + first};
  }

  /// Summaries [first, last) as keys and values.
  KeyTile<T> tile(Range some, Index value_offset) const {
    const T* const row = tokens.data() + some.first * tokens.cols();
    return {.k = row,
            .v = row + value_offset,
            .bias = bias + some.first,
            .k_stride = tokens.cols(),
            .v_stride = tokens.cols(),
            .rows = nullptr,
            .first = some.first,
            .count = some.last - some.first};
  }
};

/// Sums clusters up for one landmark at a time. One for each worker.
template <class T>
class Summarizer {
 public:
  Summarizer(const KeyClusters<T>& keys, Scratch& scratch)
      : keys_(keys),
        room_(most_keys(keys) + 2 * kLanes<T>),
        products_(scratch.elements<T>(3 * room_)),
        scores_(products_ + room_),
        shares_(scores_ + room_) {}

  /// Branch b, into summary i. landmark: s l.
  void summarize_branch(const T* landmark, Index b, const Summaries<T>& to, Index i) {
    look(landmark, b);
    to.bias[i] = sum_up(keys_.tree.range(b), row_of(to.tokens, i));
  }

  /// The clusters of some branches, one after another.
  void summarize_clusters(const T* landmark, std::span<const Index> branches, const Summaries<T>& to) {
    Index i = 0;
    for (const Index b : branches) {
      look(landmark, b);
      const Range clusters = keys_.tree.parts_of(b);
      for (Index c = clusters.first; c < clusters.last; ++c, ++i) {
        to.bias[i] = sum_up(keys_.tree.parts.range(c), row_of(to.tokens, i));
      }
    }
  }

  /// Turns to the keys of a branch as a landmark sees them: s l.k_j + a_j. landmark: s l.
  void look(const T* landmark, Index branch) {
    const Range keys = keys_.tree.range(branch);
    first_ = keys.first;
    for (Index j = keys.first; j < keys.last; j += kLanes<T>) {
      const auto products =
          row_products(keys_.row(j), keys_.tokens.cols(), keys.last - j, landmark, keys_.value_offset());
      const auto bias = keys_.bias == nullptr ? broadcast(T(0)) : load_row(keys_.bias + j, 0, keys.last - j);
      store_unaligned(products_ + j - first_, max(products, broadcast(std::numeric_limits<T>::lowest())));
      store_unaligned(scores_ + j - first_, products + bias);
    }
  }

  /// token <- [k_c | v_c] of a cluster in the branch looked at, whose shares become r_j. Returns e_c, in units of log2.
  T sum_up(Range cluster, T* token) const {
    const Index count = cluster.last - cluster.first, width = keys_.tokens.cols();
    const T *const scores = scores_ + cluster.first - first_, *const products = products_ + cluster.first - first_;
    T* const shares = this->shares(cluster);
    const T top = highest(scores, count);
    auto total = broadcast(T(0)), of_products = total;
    for (Index i = 0; i < count; i += kLanes<T>) {
      const Index some = std::min<Index>(count - i, kLanes<T>);
      const auto share = first_lanes(exp2_bounded(load_unaligned(scores + i) - broadcast(top)), some, T(0));
      total = total + share;
      of_products = multiply_add(share, first_lanes(load_unaligned(products + i), some, T(0)), of_products);
      store_unaligned(shares + i, share);
    }
    const T sum = detail::sum(total), normalizer = sum == 0 ? T(0) : 1 / sum;
    for (Index i = 0; i < count; i += kLanes<T>) {
      store_unaligned(shares + i, load_unaligned(shares + i) * broadcast(normalizer));
    }
    sum_scaled_rows(shares, count, keys_.row(cluster.first), width, width, token);
    return top + std::log2(sum) - normalizer * detail::sum(of_products);
  }

  /// r_j of a cluster, until the next one is summed up that lies before it.
  T* shares(Range cluster) const { return shares_ + cluster.first - first_; }

 private:
  static Index most_keys(const KeyClusters<T>& keys) {
    Index most = 0;
    for (Index b = 0; b < keys.tree.sets(); ++b) {
      most = std::max(most, keys.tree.range(b).last - keys.tree.range(b).first);
    }
    return most;
  }

  static T highest(const T* scores, Index count) {
    constexpr T kLowest = std::numeric_limits<T>::lowest();
    auto top = broadcast(kLowest);
    for (Index i = 0; i < count; i += kLanes<T>) {
      top = max(top, first_lanes(load_unaligned(scores + i), std::min<Index>(count - i, kLanes<T>), kLowest));
    }
    return largest(top);
  }

  const KeyClusters<T>& keys_;
  Index room_;
  T *products_, *scores_, *shares_;  ///< s l.k_j, with a_j, and r_j
  Index first_ = 0;                  ///< of the keys looked at
};

}  // namespace attn::detail
