/// Tokens in clusters of nearly equal size, by balanced bisection.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
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

/// Cuts rows in two until there are as many parts as wanted: a node of w rows and p parts into floor(w floor(p / 2) / p)
/// rows and the others, by their order along the direction of largest variance; ties go by row number. One for each
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
  static constexpr Index kSample = 64;  ///< rows that a direction is found from
  static constexpr int kSteps = 4;      ///< power iterations

  /// Rows, and which parts they become.
  struct Node {
    Range rows, parts;

    Index size() const { return parts.last - parts.first; }
    Index middle_part() const { return parts.first + size() / 2; }
    Index middle() const { return rows.first + (rows.last - rows.first) * (size() / 2) / size(); }
    Node first_half() const { return {{rows.first, middle()}, {parts.first, middle_part()}}; }
    Node second_half() const { return {{middle(), rows.last}, {middle_part(), parts.last}}; }
  };

  struct Place {
    T along;
    Index row;

    bool operator<(const Place& other) const {
      return along < other.along || (along == other.along && row < other.row);
    }
  };

  Bisection(const TokenRows<T>& x, const ClusteredRows& clusters, Index workers, Scratch& scratch)
      : x_(x),
        clusters_(clusters),
        places_(scratch.elements<Place>(static_cast<Index>(clusters.rows.size()))),
        sorted_(scratch.elements<Place>(static_cast<Index>(clusters.rows.size()))),
        memory_(scratch.elements<T>(workers * (kSample + 4) * x.cols())) {}

  void split(const Node& node, int worker) const {
    if (node.size() <= 1) return;
    clusters_.starts.data()[node.middle_part()] = node.middle();
    T* const memory = memory_ + worker * (kSample + 4) * x_.cols();
    T *const direction = memory, *const buffer = memory + x_.cols();
    set_direction(node.rows, direction, buffer);
    Index* const rows = clusters_.rows.data();
    for (Index i = node.rows.first; i < node.rows.last; ++i) {
      const T along = dot_product(x_.row(rows[i], buffer), direction, x_.cols());
      places_[i] = sorted_[i] = {is_nan(along) ? std::numeric_limits<T>::infinity() : along, rows[i]};
    }
    const Index middle = node.middle();
    std::nth_element(sorted_ + node.rows.first, sorted_ + middle, sorted_ + node.rows.last);
    Index first = node.rows.first, second = middle;
    for (Index i = node.rows.first; i < node.rows.last; ++i) {
      rows[places_[i] < sorted_[middle] ? first++ : second++] = places_[i].row;
    }
  }

  /// direction <- about the principal direction of a sample of the rows.
  void set_direction(Range node, T* direction, T* memory) const {
    const Index d = x_.cols(), width = node.last - node.first, count = std::min(kSample, width);
    T *const mean = memory, *const next = memory + d, *const sample = memory + 2 * d;
    std::fill_n(mean, d, T(0));
    for (Index i = 0; i < count; ++i) {
      x_.copy_row(clusters_.rows.data()[node.first + (2 * i + 1) * width / (2 * count)], sample + i * d);
      add_row(1 / static_cast<T>(count), sample + i * d, mean, d);
    }
    std::fill_n(next, d, T(0));
    for (Index i = 0; i < count; ++i) {
      add_row(T(-1), mean, sample + i * d, d);
      add_square(sample + i * d, next, d);
    }
    std::fill_n(direction, d, T(0));
    direction[std::max_element(next, next + d) - next] = 1;
    for (int step = 0; step < kSteps; ++step) {
      std::fill_n(next, d, T(0));
      for (Index i = 0; i < count; ++i) {
        add_row(dot_product(sample + i * d, direction, d), sample + i * d, next, d);
      }
      const T norm = std::sqrt(squared_norm(next, d));
      if (!(norm > 0) || !is_finite(norm)) return;
      scale_row(1 / norm, next, direction, d);
    }
  }

  static void add_square(const T* row, T* to, Index d) {
    for (Index c = 0; c < d; ++c) to[c] += row[c] * row[c];
  }

  const TokenRows<T>& x_;
  ClusteredRows clusters_;
  Place *places_, *sorted_;
  T* memory_;
};

/// The rows that keeps keeps, in at most parts clusters.
template <class T, class Keeps>
ClusteredRows cluster_rows(const TokenRows<T>& x, const Keeps& keeps, Index parts, Context& context,
                           Scratch& scratch) {
  const Index kept = count_kept(x.rows(), keeps);
  const ClusteredRows clusters{scratch.array<Index>(kept), scratch.array<Index>(std::min(parts, kept) + 1)};
  for (Index row = 0, i = 0; row < x.rows(); ++row) {
    if (keeps(row)) clusters.rows.data()[i++] = row;
  }
  Bisection<T>::run(x, clusters, context);
  return clusters;
}

}  // namespace attn::detail
