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
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>

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

/// kPackets packets of to[s] <- (more ? to[s] : 0) + the sum of factors[s][i] row_i, from element c on, for count rows
/// that lie stride apart.
template <int kPackets, std::size_t kSums, class T>
void sum_some_packets(const std::array<const T*, kSums>& factors, Range rows_of_sum, const T* rows, Index stride,
                      Index c, const std::array<T*, kSums>& to) {
  Packet<T> total[kSums][array_size(kPackets)];
  const bool more = rows_of_sum.first > 0;
#pragma GCC unroll 2
  for (std::size_t s = 0; s < kSums; ++s) {
#pragma GCC unroll 8
    for (int p = 0; p < kPackets; ++p) total[s][p] = more ? load(to[s] + c + p * kLanes<T>) : broadcast(T(0));
  }
  const T* row = rows + rows_of_sum.first * stride + c;
  for (Index j = rows_of_sum.first; j < rows_of_sum.last; ++j, row += stride) {
    Packet<T> factor[kSums];
#pragma GCC unroll 2
    for (std::size_t s = 0; s < kSums; ++s) factor[s] = broadcast(factors[s][j]);
#pragma GCC unroll 8
    for (int p = 0; p < kPackets; ++p) {
      const auto x = load(row + p * kLanes<T>);
#pragma GCC unroll 2
      for (std::size_t s = 0; s < kSums; ++s) total[s][p] = multiply_add(factor[s], x, total[s][p]);
    }
  }
#pragma GCC unroll 2
  for (std::size_t s = 0; s < kSums; ++s) {
#pragma GCC unroll 8
    for (int p = 0; p < kPackets; ++p) store(to[s] + c + p * kLanes<T>, total[s][p]);
  }
}

/// to[s] <- the sum of factors[s][i] row_i, for count padded rows of d elements that lie stride apart, some packets at
/// a time. Rows are read once.
template <std::size_t kSums, class T>
[[gnu::noinline]] void sum_scaled_rows(const std::array<const T*, kSums>& factors, Index count, const T* rows,
                                       Index stride, Index d, const std::array<T*, kSums>& to) {
  constexpr int kMost = kVectorRegisters / 4;
  Range some{0, 0};
  do {
    some = {some.last, std::min(count, some.last + kKeysAtOnce)};
    const auto sum_from = [&](auto packets, Index c) {
      for (; c + packets * kLanes<T> <= d; c += packets * kLanes<T>) {
        sum_some_packets<packets>(factors, some, rows, stride, c, to);
      }
      return c;
    };
    const Index c = sum_from(std::integral_constant<int, kMost>{}, 0);
    sum_from(std::integral_constant<int, 1>{}, sum_from(std::integral_constant<int, kMost / 2>{}, c));
  } while (some.last < count);
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

/// A landmark, s l, and where its summaries go: the next one to number next.
template <class T>
struct LandmarkView {
  const T* landmark;
  Summaries<T> to;
  Index next;
};

/// Sums clusters up for one landmark, or for two at a time, which read keys once. One for each worker.
template <class T>
class Summarizer {
 public:
  using View = LandmarkView<T>;

  Summarizer(const KeyClusters<T>& keys, Scratch& scratch)
      : keys_(keys),
        slot_(padded<T>(most_keys(keys.tree.parts.count(), [&](Index c) { return keys.tree.parts.range(c); }))),
        room_(most_keys(keys.tree.sets(), [&](Index b) { return keys.tree.range(b); }) + 2 * kLanes<T>) {
    for (Seen& seen : seen_) {
      seen = {scratch.elements<T>(room_), scratch.elements<T>(room_),
              scratch.elements<T>(std::max(room_, keys.tree.parts_in_a_set * slot_))};
    }
  }

  /// Branch b, for one landmark or for two.
  void summarize_branch(View view, Index b) { summarize_branch<1>({&view}, b); }
  void summarize_branch(View first, View second, Index b) { summarize_branch<2>({&first, &second}, b); }

  /// The clusters of some branches, one after another.
  void summarize_clusters(View view, std::span<const Index> branches) {
    for (const Index b : branches) summarize_clusters<1>({&view}, b);
  }

  /// The clusters of the branches that are open to one and to another, ascending.
  void summarize_clusters(View first, std::span<const Index> to_first, View second, std::span<const Index> to_second) {
    while (!to_first.empty() || !to_second.empty()) {
      const bool has_first = !to_first.empty() && (to_second.empty() || to_first.front() <= to_second.front()),
                 has_second = !to_second.empty() && (to_first.empty() || to_second.front() <= to_first.front());
      const Index b = has_first ? to_first.front() : to_second.front();
      if (has_first) to_first = to_first.subspan(1);
      if (has_second) to_second = to_second.subspan(1);
      if (!to_first.empty()) fetch_branch(to_first.front());
      if (has_first && has_second) {
        summarize_clusters<2>({&first, &second}, b);
      } else {
        summarize_clusters<1>({has_first ? &first : &second}, b);
      }
    }
  }

  /// r_j of the c-th cluster of the branch that was summed up last, or of the branch as one, for the first landmark.
  const T* shares(Index c) const { return seen_[0].shares + c * slot_; }

 private:
  template <std::size_t kViews>
  void summarize_branch(const std::array<View*, kViews>& views, Index b) {
    look(views, b);
    sum_up([&](Index) { return keys_.tree.range(b); }, 1, views);
    for (View* const view : views) ++view->next;
  }

  template <std::size_t kViews>
  void summarize_clusters(const std::array<View*, kViews>& views, Index b) {
    const Index first = keys_.tree.parts_of(b).first;
    look(views, b);
    sum_up([&](Index c) { return keys_.tree.parts.range(first + c); }, keys_.tree.parts_in_a_set, views);
    for (View* const view : views) view->next += keys_.tree.parts_in_a_set;
  }

  /// Fetches the keys and values of a branch that will soon be read.
  void fetch_branch(Index b) const {
    constexpr Index kLine = 64 / sizeof(T);
    const Range keys = keys_.tree.range(b);
    for (const T* p = keys_.row(keys.first); p < keys_.row(keys.last); p += kLine) __builtin_prefetch(p, 0, 2);
  }

  /// Of the keys of a branch as a landmark sees them.
  struct Seen {
    T *products, *scores;  ///< s l.k_j, and with a_j
    T* shares;             ///< cluster after cluster, a slot for each
  };

  template <class Keys>
  static Index most_keys(Index count, const Keys& keys) {
    Index most = 0;
    for (Index i = 0; i < count; ++i) most = std::max(most, keys(i).last - keys(i).first);
    return most;
  }

  /// Turns to the keys of a branch.
  template <std::size_t kViews>
  void look(const std::array<View*, kViews>& views, Index branch) {
    const Range keys = keys_.tree.range(branch);
    first_ = keys.first;
    std::array<const T*, kViews> landmarks;
    for (std::size_t v = 0; v < kViews; ++v) landmarks[v] = views[v]->landmark;
    for (Index j = keys.first; j < keys.last; j += kLanes<T>) {
      std::array<Packet<T>, kViews> products;
      row_products(keys_.row(j), keys_.tokens.cols(), keys.last - j, landmarks, keys_.value_offset(), products);
      const auto bias = keys_.bias == nullptr ? broadcast(T(0)) : load_row(keys_.bias + j, 0, keys.last - j);
      for (std::size_t v = 0; v < kViews; ++v) {
        store_unaligned(seen_[v].products + j - first_, max(products[v], broadcast(std::numeric_limits<T>::lowest())));
        store_unaligned(seen_[v].scores + j - first_, products[v] + bias);
      }
    }
  }

  /// Some parts of the branch looked at, keys(c) those of the c-th.
  template <class Keys, std::size_t kViews>
  void sum_up(const Keys& keys, Index parts, const std::array<View*, kViews>& views) const {
    for (Index first = 0; first < parts * Index{kViews}; first += kLanes<T>) {
      share_out<kViews>(keys, {first, std::min(parts * Index{kViews}, first + kLanes<T>)}, views);
    }
    for (Index c = 0; c < parts; ++c) {
      std::array<const T*, kViews> shares;
      std::array<T*, kViews> tokens;
      for (std::size_t v = 0; v < kViews; ++v) {
        shares[v] = seen_[v].shares + c * slot_;
        tokens[v] = row_of(views[v]->to.tokens, views[v]->next + c);
      }
      const Range range = keys(c);
      sum_scaled_rows(shares, range.last - range.first, keys_.row(range.first), keys_.tokens.cols(),
                      keys_.tokens.cols(), tokens);
    }
  }

  /// Shares <- r_j, and biases <- e_c, of some parts for each view, the views of one part side by side; at most kLanes.
  /// Together, for of the steps that one takes each waits for the one before.
  template <std::size_t kViews, class Keys>
  void share_out(const Keys& keys, Range some, const std::array<View*, kViews>& views) const {
    const Index count = some.last - some.first;
    const auto part = [&](Index i) { return (some.first + i) / Index{kViews}; };
    const auto view = [&](Index i) { return static_cast<std::size_t>((some.first + i) % Index{kViews}); };
    Packet<T> highest[kLanes<T>], sums[kLanes<T>], products[kLanes<T>];
    for (Index i = 0; i < kLanes<T>; ++i) {
      highest[i] = i < count ? highest_scores(keys(part(i)), seen_[view(i)]) : broadcast(T(0));
      sums[i] = products[i] = broadcast(T(0));
    }
    alignas(64) T top[kLanes<T>], total[kLanes<T>], of_products[kLanes<T>];
    store(top, combine_lanes(highest, [](Packet<T> a, Packet<T> b) { return max(a, b); }));
    for (Index i = 0; i < count; ++i) weigh(keys(part(i)), part(i), top[i], seen_[view(i)], &sums[i], &products[i]);
    store(total, sums_of_lanes(sums));
    store(of_products, sums_of_lanes(products));
    for (Index i = 0; i < count; ++i) {
      const View& to = *views[view(i)];
      const T normalizer = total[i] == 0 ? T(0) : 1 / total[i];
      to.to.bias[to.next + part(i)] = top[i] + std::log2(total[i]) - normalizer * of_products[i];
      T* const shares = seen_[view(i)].shares + part(i) * slot_;
      const Index in_part = keys(part(i)).last - keys(part(i)).first;
      for (Index j = 0; j < in_part; j += kLanes<T>) store(shares + j, load(shares + j) * broadcast(normalizer));
    }
  }

  /// Lane by lane.
  Packet<T> highest_scores(Range keys, const Seen& seen) const {
    constexpr T kLowest = std::numeric_limits<T>::lowest();
    const Index count = keys.last - keys.first;
    auto top = broadcast(kLowest);
    for (Index i = 0; i < count; i += kLanes<T>) {
      top = max(top, first_lanes(load_unaligned(seen.scores + keys.first - first_ + i),
                                 std::min<Index>(count - i, kLanes<T>), kLowest));
    }
    return top;
  }

  /// The c-th shares <- weights relative to top; sums of these and of weighted products, lane by lane, are added.
  void weigh(Range keys, Index c, T top, const Seen& seen, Packet<T>* sums, Packet<T>* products) const {
    const Index at = keys.first - first_, count = keys.last - keys.first;
    for (Index i = 0; i < count; i += kLanes<T>) {
      const Index some = std::min<Index>(count - i, kLanes<T>);
      const auto share = first_lanes(exp2_bounded(load_unaligned(seen.scores + at + i) - broadcast(top)), some, T(0));
      *sums = *sums + share;
      *products = multiply_add(share, first_lanes(load_unaligned(seen.products + at + i), some, T(0)), *products);
      store(seen.shares + c * slot_ + i, share);
    }
  }

  const KeyClusters<T>& keys_;
  Index slot_, room_;  ///< for shares of a cluster, and for scores of a branch
  Seen seen_[2];
  Index first_ = 0;  ///< of the keys looked at
};

}  // namespace attn::detail
