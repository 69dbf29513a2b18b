/// Tokens in clusters of nearly equal size, by balanced bisection.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
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

/// The sum of factor_i (row(i) - origin), of so many rows: kPackets packets from the element at on, as far as rows of d
/// elements go, to memory that has room for whole packets.
template <int kPackets, class T, class Row>
void sum_some_packets(const T* factors, Index count, const Row& row, const T* origin, Index at, Index d, T* to) {
  Packet<T> total[array_size(kPackets)], zero[array_size(kPackets)];
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) {
    total[p] = broadcast(T(0));
    zero[p] = load_row_if(origin, at + p * kLanes<T>, d);
  }
  for (Index i = 0; i < count; ++i) {
    const auto factor = broadcast(factors[i]);
    const T* const from = row(i);
#pragma GCC unroll 4
    for (int p = 0; p < kPackets; ++p) {
      const auto x = kPackets > 1 ? load_unaligned(from + at + p * kLanes<T>) : load_row(from, at, d);
      total[p] = multiply_add(factor, x - zero[p], total[p]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) store(to + at + p * kLanes<T>, total[p]);
}

/// to <- the sum of factor_i (row(i) - origin), of so many rows of d elements; a null origin is zeros, whole packets of
/// to are written. Some packets at a time, for chains of sums that do not wait for one another.
template <class T, class Row>
[[gnu::noinline]] void sum_scaled_rows(const T* factors, Index count, const Row& row, const T* origin, Index d, T* to) {
  constexpr int kAtOnce = 4;
  Index c = 0;
  for (; c + kAtOnce * kLanes<T> <= d; c += kAtOnce * kLanes<T>) {
    sum_some_packets<kAtOnce>(factors, count, row, origin, c, d, to);
  }
  for (; c < d; c += kLanes<T>) sum_some_packets<1>(factors, count, row, origin, c, d, to);
}

/// Cuts rows in two until there are as many parts as wanted: a node of w rows and p parts into floor(w floor(p / 2) /
/// p) rows and the others, by their order along the direction of largest variance; ties go by row number. One for each
/// call; all its memory comes from the scratch that it is made with.
template <class T>
class Bisection {
 public:
  /// clusters.rows: the rows to cut; reordered. clusters.starts has parts + 1 elements, parts at most the rows.
  static void run(const TokenRows<T>& x, const ClusteredRows& clusters, Context& context) {
    Scratch scratch = context.scratch();
    Bisection bisection(x, clusters, context.workers(), scratch);
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
        next.data()[made++] = node.first_half();
        next.data()[made++] = node.second_half();
        splits += node.size() > 2 ? 1 : 0;
      }
      count = made;
    }
  }

 private:
  static constexpr Index kSample = 128;  ///< rows that a direction is found from
  static constexpr int kSteps = 5;       ///< power iterations

  /// Rows, and which parts they become.
  struct Node {
    Range rows, parts;

    Index size() const { return parts.last - parts.first; }
    Index middle_part() const { return parts.first + size() / 2; }
    Index middle() const { return rows.first + (rows.last - rows.first) * (size() / 2) / size(); }
    Node first_half() const { return {{rows.first, middle()}, {parts.first, middle_part()}}; }
    Node second_half() const { return {{middle(), rows.last}, {middle_part(), parts.last}}; }
  };

  /// Where a row lies along a direction, as a number that is ordered as float is, and below it which row it is: ties go
  /// by row number. A NaN lies beyond all.
  static std::uint64_t place(T along, Index row) {
    const auto x = is_nan(along) ? std::numeric_limits<float>::infinity() : static_cast<float>(along);
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
    return std::uint64_t{ordered} << 32 | static_cast<std::uint32_t>(row);
  }

  Bisection(const TokenRows<T>& x, const ClusteredRows& clusters, Index workers, Scratch& scratch)
      : x_(x),
        clusters_(clusters),
        places_(scratch.elements<std::uint64_t>(static_cast<Index>(clusters.rows.size()))),
        sorted_(scratch.elements<std::uint64_t>(static_cast<Index>(clusters.rows.size()) + 1)),
        sample_size_(round_up(kSample) * (x.cols() + 1)),
        row_size_(round_up(x.cols())),
        memory_(scratch.elements<T>(workers * memory_size())) {}

  static Index round_up(Index n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

  /// A direction, the next one, a row, and the sample: as rows, and transposed with a row of products.
  Index memory_size() const { return 3 * row_size_ + kSample * row_size_ + sample_size_; }

  void split(const Node& node, int worker) const {
    if (node.size() <= 1) return;
    clusters_.starts.data()[node.middle_part()] = node.middle();
    T *const direction = memory_ + worker * memory_size(), *const buffer = direction + 3 * row_size_;
    const T* const mean = set_direction(node.rows, direction);
    Index* const rows = clusters_.rows.data();
    for (Index first = node.rows.first; first < node.rows.last; first += kLanes<T>) {
      const T* some[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        some[i] = first + i < node.rows.last ? x_.row(rows[first + i], buffer + i * row_size_) : nullptr;
      }
      alignas(64) T along[array_size(kLanes<T>)];
      store(along, dot_products<T>(some, mean, direction, x_.cols()));
      for (Index i = first; i < std::min(first + kLanes<T>, node.rows.last); ++i) {
        places_[i] = place(along[i - first], rows[i]);
      }
    }
    const std::uint64_t pivot = nth_place(node.rows, node.middle());
    Index first = node.rows.first, second = node.middle();
    for (Index i = node.rows.first; i < node.rows.last; ++i) {
      const bool less = places_[i] < pivot;
      rows[less ? first : second] = static_cast<Index>(places_[i] & 0xffffffffU);
      first += less ? 1 : 0;
      second += less ? 0 : 1;
    }
  }

  /// The place that would be at middle if places_ were in order within the range. Most places are told from it by the
  /// part of the range of places that they lie in; the others are in sorted_.
  std::uint64_t nth_place(Range range, Index middle) const {
    constexpr Index kParts = 128;
    std::uint64_t lowest = places_[range.first], highest = lowest;
    for (Index i = range.first; i < range.last; ++i) {
      lowest = std::min(lowest, places_[i]);
      highest = std::max(highest, places_[i]);
    }
    const int shift = std::max(0, static_cast<int>(std::bit_width(highest - lowest)) - 7);  // of 128 parts
    std::array<Index, kParts> counts{};
    for (Index i = range.first; i < range.last; ++i) ++counts[(places_[i] - lowest) >> shift];
    Index before = range.first;
    std::size_t part = 0;
    while (before + counts[part] <= middle) before += counts[part++];
    std::uint64_t* last = sorted_ + range.first;
    for (Index i = range.first; i < range.last; ++i) {
      *last = places_[i];
      last += (places_[i] - lowest) >> shift == part ? 1 : 0;
    }
    std::uint64_t* const nth = sorted_ + range.first + (middle - before);
    std::nth_element(sorted_ + range.first, nth, last);
    return *nth;
  }

  /// direction (d, memory beyond it) <- about the principal direction of a sample of the rows: power iterations from
  /// the coordinate of largest variance. Rows that are not finite do not count. Returns their mean.
  const T* set_direction(Range node, T* direction) const {
    const Index d = x_.cols(), width = node.last - node.first,
                most = std::min(kSample, std::max<Index>(std::min<Index>(width, 48), width / 2));
    T *const next = direction + row_size_, *const mean = next + row_size_, *const copies = mean + row_size_;
    T *const panel = copies + kSample * row_size_, *const products = panel + round_up(kSample) * d;
    const T* rows[array_size(kSample)];
    for (Index i = 0; i < most; ++i) {
      rows[i] = x_.row(clusters_.rows.data()[node.first + (2 * i + 1) * width / (2 * most)], copies + i * row_size_);
    }
    const auto row = [&](Index i) { return rows[i]; };
    const auto set_mean = [&](Index of) {
      std::fill_n(products, of, 1 / static_cast<T>(of));
      sum_scaled_rows<T>(products, of, row, nullptr, d, mean);
      return is_finite(squared_norm(mean, d));
    };
    Index count = most;
    if (!set_mean(count)) {
      const auto finite = [&](const T* x) { return is_finite(squared_norm(x, d)); };
      count = std::partition(rows, rows + most, finite) - rows;
      if (count > 0) set_mean(count);
    }
    std::fill_n(direction, row_size_, T(0));
    direction[count == 0 ? 0 : center_sample(rows, count, mean, panel)] = 1;
    for (int step = 0; step < kSteps && count > 0; ++step) {
      sum_scaled_rows<T>(
          direction, d, [&](Index c) { return panel + c * round_up(count); }, nullptr, round_up(count), products);
      sum_scaled_rows(products, count, row, mean, d, next);
      const T norm = std::sqrt(squared_norm(next, d));
      if (!(norm > 0) || !is_finite(norm)) break;
      scale_row(1 / norm, next, direction, d);
    }
    return count == 0 ? nullptr : mean;
  }

  /// panel <- rows relative to their mean, along lanes. Returns the coordinate of largest variance.
  Index center_sample(const T* const* rows, Index count, const T* mean, T* panel) const {
    const Index d = x_.cols(), lanes = round_up(count);
    for (Index lane = 0; lane < lanes; lane += kLanes<T>) {
      const T* some[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) some[i] = lane + i < count ? rows[lane + i] : nullptr;
      pack_rows<T>(some, d, mean, T(1), panel + lane, lanes);
    }
    Index widest = 0;
    T most = -1;
    for (Index c = 0; c < d; ++c) {
      std::fill_n(panel + c * lanes + count, lanes - count, T(0));
      const T variance = squared_norm(panel + c * lanes, lanes);
      if (variance > most) {
        most = variance;
        widest = c;
      }
    }
    return widest;
  }

  const TokenRows<T>& x_;
  ClusteredRows clusters_;
  std::uint64_t *places_, *sorted_;
  Index sample_size_, row_size_;
  T* memory_;
};

/// The rows that keeps keeps, in at most parts clusters.
template <class T, class Keeps>
ClusteredRows cluster_rows(const TokenRows<T>& x, const Keeps& keeps, Index parts, Context& context, Scratch& scratch) {
  const Index kept = count_kept(x.rows(), keeps);
  const ClusteredRows clusters{scratch.array<Index>(kept), scratch.array<Index>(std::min(parts, kept) + 1)};
  for (Index row = 0, i = 0; row < x.rows(); ++row) {
    if (keeps(row)) clusters.rows.data()[i++] = row;
  }
  Bisection<T>::run(x, clusters, context);
  return clusters;
}

}  // namespace attn::detail
