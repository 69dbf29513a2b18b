/// Tokens in clusters of nearly equal size, by balanced bisection.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/principal_coordinates.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

namespace attn::detail {

/// Row numbers of tokens, cluster after cluster, ascending in each.
struct ClusteredRows {
  std::span<Index> rows;
  std::span<Index> starts;  ///< where each cluster begins in rows, and the end

  Index count() const { return static_cast<Index>(starts.size()) - 1; }
  Range range(Index c) const { return {starts.data()[c], starts.data()[c + 1]}; }
};

/// Clusters as they were saved.
inline ClusteredRows copy_of(std::span<const Index> rows, std::span<const Index> starts, Scratch& scratch) {
  const ClusteredRows clusters{scratch.array<Index>(static_cast<Index>(rows.size())),
                               scratch.array<Index>(static_cast<Index>(starts.size()))};
  std::copy(rows.begin(), rows.end(), clusters.rows.begin());
  std::copy(starts.begin(), starts.end(), clusters.starts.begin());
  return clusters;
}

/// Sets of tokens in two levels: parts of nearly equal size, each of so many neighbouring ones a larger set.
struct NestedRows {
  ClusteredRows parts;
  Index parts_in_a_set;

  Index sets() const { return parts.count() / parts_in_a_set; }
  Range parts_of(Index set) const { return {set * parts_in_a_set, (set + 1) * parts_in_a_set}; }

  /// The tokens of a set, in the order of parts.
  Range range(Index set) const {
    return {parts.range(set * parts_in_a_set).first, parts.range((set + 1) * parts_in_a_set - 1).last};
  }
};

/// least <- the count-th largest of bits(0), ..., bits(n - 1), for 1 <= count <= n. Returns how many are larger.
template <class Bits, class Get>
Index nth_largest(const Get& bits, Index n, Index count, Bits* least) {
  const auto at_least = [&](Bits x) {
    Bits found = 0;  // as wide as what is compared, for the compiler to do many at once
    for (Index i = 0; i < n; ++i) found += static_cast<Bits>(bits(i) >= x ? 1 : 0);
    return static_cast<Index>(found);
  };
  *least = 0;
  for (Bits bit = Bits{1} << (8 * sizeof(Bits) - 1); bit != 0; bit >>= 1) {
    if (at_least(*least | bit) >= count) *least |= bit;
  }
  return *least == std::numeric_limits<Bits>::max() ? 0 : at_least(*least + 1);
}

/// nth_largest of so few values that counting how many are larger than each is the shortest way.
inline constexpr Index kFewValues = 32;
[[gnu::noinline]] inline Index nth_largest_of_few(const std::uint32_t* values, Index n, Index count,
                                                  std::uint32_t* least) {
  alignas(64) std::uint32_t all[kFewValues] = {};
  std::copy_n(values, n, all);
  for (Index i = 0;; ++i) {
    std::uint32_t larger = 0, at_least = 0;
    for (const std::uint32_t x : all) {
      larger += x > all[i] ? 1U : 0U;
      at_least += x >= all[i] ? 1U : 0U;
    }
    if (static_cast<Index>(larger) >= count || static_cast<Index>(at_least) < count) continue;
    *least = all[i];
    return static_cast<Index>(larger);
  }
}

/// Cuts rows in two until there are as many parts as wanted: a node of w rows and p parts into floor(w l / p) rows, for
/// l parts, and the others, by their order along the direction of largest variance; ties go by row number. l is
/// floor(p / 2), but a multiple of the parts in a set as long as p is above that, so that sets are nodes too. One for
/// each call; all its memory comes from the scratch that it is made with.
template <class T>
class Bisection {
 public:
  /// coordinates: of all rows. clusters.rows: 0, 1, ..., to be cut; reordered. clusters.starts has parts + 1 elements,
  /// parts at most the rows and a multiple of in_a_set.
  static void run(const T* coordinates, const ClusteredRows& clusters, Index in_a_set, Context& context) {
    Scratch scratch = context.scratch();
    const Bisection bisection(coordinates, clusters, in_a_set, context.workers(), scratch);
    const Index parts = clusters.count();
    std::span<Node> nodes = scratch.array<Node>(parts), next = scratch.array<Node>(parts);
    nodes.front() = {{0, static_cast<Index>(clusters.rows.size())}, {0, parts}};
    clusters.starts.front() = 0;
    clusters.starts.back() = nodes.front().rows.last;
    for (Index count = 1, splits = 1; splits > 0; std::swap(nodes, next)) {
      context.for_each(count, [&](Index i, int worker) { bisection.split(nodes.data()[i], worker); });
      splits = 0;
      Index made = 0;
      for (Index i = 0; i < count; ++i) {
        const Node& node = nodes.data()[i];
        if (node.size() <= 1) {
          next.data()[made++] = node;
          continue;
        }
        const Index left = bisection.left_parts(node);
        next.data()[made++] = node.first_half(left);
        next.data()[made++] = node.second_half(left);
        splits += node.size() > 2 ? 1 : 0;
      }
      count = made;
    }
  }

 private:
  static constexpr Index kSample = 128;  ///< rows that a direction is found from
  static constexpr int kSteps = 8;       ///< power iterations
  static constexpr int kPackets = kCoordinates / kLanes<T>;

  /// Rows, and which parts they become.
  struct Node {
    Range rows, parts;

    Index size() const { return parts.last - parts.first; }
    Index middle(Index left) const { return rows.first + (rows.last - rows.first) * left / size(); }
    Node first_half(Index left) const { return {{rows.first, middle(left)}, {parts.first, parts.first + left}}; }
    Node second_half(Index left) const { return {{middle(left), rows.last}, {parts.first + left, parts.last}}; }
  };

  /// A number that is ordered as float is.
  static std::uint32_t ordered(T x) {
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(x));
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  }

  Bisection(const T* coordinates, const ClusteredRows& clusters, Index in_a_set, Index workers, Scratch& scratch)
      : coordinates_(coordinates),
        clusters_(clusters),
        in_a_set_(in_a_set),
        places_(scratch.elements<std::uint32_t>(static_cast<Index>(clusters.rows.size()))),
        seconds_(scratch.elements<Index>(static_cast<Index>(clusters.rows.size()))),
        memory_(scratch.elements<T>(workers * kMemory)) {}

  /// A sample, its covariance, and a direction.
  static constexpr Index kMemory = (kSample + kCoordinates + 1) * kCoordinates;

  Index left_parts(const Node& node) const {
    const Index size = node.size();
    return size > in_a_set_ ? size / in_a_set_ / 2 * in_a_set_ : size / 2;
  }

  const T* coordinates_of(Index i) const { return coordinates_ + clusters_.rows.data()[i] * kCoordinates; }

  void split(const Node& node, int worker) const {
    if (node.size() <= 1) return;
    const Index left = left_parts(node), middle = node.middle(left);
    clusters_.starts.data()[node.parts.first + left] = middle;
    T* const direction = memory_ + worker * kMemory;
    set_direction(node.rows, direction);
    for (Index first = node.rows.first; first < node.rows.last; first += kLanes<T>) {
      alignas(64) T along[array_size(kLanes<T>)];
      const Index count = std::min<Index>(kLanes<T>, node.rows.last - first);
      store(along, products(first, count, direction));
      for (Index i = 0; i < count; ++i) places_[first + i] = ordered(along[i]);
    }
    cut(node.rows, middle);
  }

  /// The rows up to the middle become those that lie first, both halves ascending.
  void cut(Range range, Index middle) const {
    const std::uint32_t* const places = places_ + range.first;
    Index* const rows = clusters_.rows.data() + range.first;
    const Index n = range.last - range.first, half = range.last - middle;
    std::uint32_t pivot = 0;
    const Index beyond = n <= kFewValues ? nth_largest_of_few(places, n, half, &pivot)
                                         : nth_largest([&](Index i) { return places[i]; }, n, half, &pivot);
    Index first = 0, second = 0, ties = std::count(places, places + n, pivot) - (half - beyond);
    for (Index i = 0; i < n; ++i) {
      const bool stays = places[i] < pivot || (places[i] == pivot && ties-- > 0);
      rows[first] = seconds_[range.first + second] = rows[i];
      first += stays ? 1 : 0;
      second += stays ? 0 : 1;
    }
    std::copy_n(seconds_ + range.first, half, rows + first);
  }

  /// The coordinates of count rows from the first on times a direction, a row to a lane.
  Packet<T> products(Index first, Index count, const T* direction) const {
    Packet<T> total[kLanes<T>];
    for (Index i = 0; i < kLanes<T>; ++i) {
      const T* const row = coordinates_of(first + std::min(i, count - 1));
      total[i] = load(row) * load(direction);
      for (int p = 1; p < kPackets; ++p) {
        total[i] = multiply_add(load(row + p * kLanes<T>), load(direction + p * kLanes<T>), total[i]);
      }
    }
    return sums_of_lanes(total);
  }

  /// direction <- about the principal direction of a sample of the rows: power iterations with their covariance, from
  /// the coordinate of largest variance.
  void set_direction(Range node, T* direction) const {
    T *const covariance = direction + kCoordinates, *const sample = covariance + kCoordinates * kCoordinates;
    const Index width = node.last - node.first,
                count = std::min(kSample, std::max<Index>(std::min<Index>(width, 48), width / 2));
    const T share = 1 / static_cast<T>(count);
    for (int p = 0; p < kCoordinates; p += kLanes<T>) {
      auto total = broadcast(T(0));
      for (Index i = 0; i < count; ++i) {
        const auto x = load(coordinates_of(node.first + (2 * i + 1) * width / (2 * count)) + p);
        store(sample + i * kCoordinates + p, x);
        total = total + x;
      }
      const auto center = total * broadcast(share);
      for (Index i = 0; i < count; ++i) {
        T* const row = sample + i * kCoordinates + p;
        store(row, load(row) - center);
      }
    }
    for (Index c = 0; c < kCoordinates; c += kTileRows) {
      Packet<T> tile[array_size(kTileRows)][array_size(kPackets)];
      multiply_tile(sample + c, kTileRows, 1, kCoordinates, sample, count, tile);
      for (int i = 0; i < kTileRows * kPackets; ++i) {
        store(covariance + c * kCoordinates + i * kLanes<T>, tile[i / kPackets][i % kPackets]);
      }
    }
    iterate(covariance, direction);
  }

  static void iterate(const T* covariance, T* direction) {
    Index widest = 0;
    T trace = 0;
    for (Index c = 0; c < kCoordinates; ++c) {
      const T variance = covariance[c * (kCoordinates + 1)];
      if (variance > covariance[widest * (kCoordinates + 1)]) widest = c;
      trace += variance;
    }
    std::fill_n(direction, kCoordinates, T(0));
    direction[widest] = 1;
    const T scale = 1 / trace;
    if (!(trace > 0) || !is_finite(trace) || !is_finite(scale)) return;
    for (int step = 0; step < kSteps; ++step) {
      Packet<T> next[array_size(kPackets)];
      for (int p = 0; p < kPackets; ++p) {
        Packet<T> even = broadcast(T(0)), odd = even;
        for (Index c = 0; c < kCoordinates; c += 2) {
          const T* const row = covariance + c * kCoordinates + p * kLanes<T>;
          even = multiply_add(broadcast(direction[c]), load(row), even);
          odd = multiply_add(broadcast(direction[c + 1]), load(row + kCoordinates), odd);
        }
        next[p] = (even + odd) * broadcast(scale);
      }
      for (int p = 0; p < kPackets; ++p) store(direction + p * kLanes<T>, next[p]);
    }
  }

  const T* coordinates_;
  ClusteredRows clusters_;
  Index in_a_set_;
  std::uint32_t* places_;  ///< along the direction
  Index* seconds_;         ///< rows that go to the second half
  T* memory_;
};

/// clusters <- some rows, ascending, in as many parts as clusters has starts for, at most the rows, each of in_a_set
/// neighbouring ones a set.
template <class T>
void cut_rows(const TokenRows<T>& x, std::span<const Index> rows, Axes axes, const ClusteredRows& clusters,
              Index in_a_set, Context& context) {
  Scratch scratch = context.scratch();
  for (Index i = 0; i < static_cast<Index>(rows.size()); ++i) clusters.rows.data()[i] = i;
  Bisection<T>::run(coordinates_of(x, rows, axes, context, scratch), clusters, in_a_set, context);
  for (Index& row : clusters.rows) row = rows.data()[row];
}

/// The rows that keeps keeps, in so many parts, at most the rows, each of in_a_set neighbouring ones a set.
template <class T, class Keeps>
NestedRows cluster_rows(const TokenRows<T>& x, const Keeps& keeps, Index parts, Index in_a_set, Context& context,
                        Scratch& scratch) {
  const Index kept = count_kept(x.rows(), keeps);
  const ClusteredRows clusters{scratch.array<Index>(kept), scratch.array<Index>(parts + 1)};
  Scratch own = context.scratch();
  const std::span<Index> rows = own.array<Index>(kept);
  for (Index row = 0, i = 0; row < x.rows(); ++row) {
    if (keeps(row)) rows.data()[i++] = row;
  }
  cut_rows(x, std::span<const Index>(rows), Axes::principal, clusters, in_a_set, context);
  return {clusters, in_a_set};
}

}  // namespace attn::detail
