/// Landmarks: the few tokens through which an approximation sees all of them.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/context.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/problem.hpp>
#include <attn/detail/split_mix64.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace attn {

/// A choice of landmarks for queries and keys together: select(inputs, scratch) gives them as the rows of an (m, d)
/// matrix in scratch memory, m at least 1 where a query and a key are kept. It must depend on kept rows alone and be
/// the same at every call. Optional: scatter(inputs, dland, dq, dk, scratch) adds the gradient by the landmarks (m, d)
/// to those by q and k that they come from; a policy without it has landmarks that are constants in the backward pass.
template <class L, class T>
concept JointLandmarks = std::copyable<L> && requires(const L& landmarks, const Inputs<T>& in, Scratch& scratch) {
  { landmarks.select(in, scratch) } -> std::same_as<MatrixRef<T>>;
};

namespace detail {

/// Whether there is anything to attend to: a kept query and a kept key.
template <class In>
bool any_kept(const In& in) {
  const auto keeps_q = kept_queries(in), keeps_k = kept_keys(in);
  Index i = 0, j = 0;
  while (i < in.q.rows() && !keeps_q(i)) ++i;
  while (j < in.k.rows() && !keeps_k(j)) ++j;
  return i < in.q.rows() && j < in.k.rows();
}

/// The landmarks of inputs by a policy; one that reads matrices alone gets copies of what is not in place.
template <class T, class Landmarks>
MatrixRef<T> select_jointly(const Landmarks& landmarks, const Sources<T>& in, Scratch& scratch) {
  if constexpr (requires { landmarks.select(in, scratch); }) {
    return landmarks.select(in, scratch);
  } else {
    const ConstMatrixRef<T> q = whole_matrix(in.q, scratch), k = whole_matrix(in.k, scratch),
                            v = whole_matrix(in.v, scratch);
    return landmarks.select(Inputs<T>{q, k, v, in.mask, in.key_bias}, scratch);
  }
}

/// Sampled landmarks of rows that are spread over the ranks of MPI, see mpi.hpp.
template <class Landmarks>
struct SampledShares;

/// Which matrix rows are drawn from; a random sampler draws differently for each.
enum class Side : std::uint64_t { queries, keys };

/// Turns ascending ranks among the kept rows into row numbers.
template <class Keeps>
void ranks_to_rows(Index* ranks, Index count, const Keeps& keeps) {
  for (Index i = 0, row = 0, rank = 0; i < count; ++i) {
    while (!keeps(row) || rank < ranks[i]) rank += keeps(row++) ? 1 : 0;
    ranks[i] = row;
  }
}

/// Row numbers of sampled landmarks: min(m / 2, kept queries) of q, then min(the rest of m, kept keys) of k.
struct SampledRows {
  std::span<Index> from_q, from_k;
};

/// choose(n, side, chosen) fills chosen with ascending numbers below n.
template <class In, class Choose>
SampledRows sample_rows(const In& in, Index m, Scratch& scratch, const Choose& choose) {
  const auto keeps_q = kept_queries(in), keeps_k = kept_keys(in);
  const Index n_q = count_kept(in.q.rows(), keeps_q), n_k = count_kept(in.k.rows(), keeps_k);
  const Index m_q = std::min(m / 2, n_q), m_k = std::min(m - m_q, n_k);
  const SampledRows rows{scratch.array<Index>(m_q), scratch.array<Index>(m_k)};
  choose(n_q, Side::queries, rows.from_q);
  choose(n_k, Side::keys, rows.from_k);
  ranks_to_rows(rows.from_q.data(), m_q, keeps_q);
  ranks_to_rows(rows.from_k.data(), m_k, keeps_k);
  return rows;
}

/// body(landmark, row, of_queries) for each sampled row.
template <class Body>
void for_each_sampled(const SampledRows& rows, const Body& body) {
  Index landmark = 0;
  for (const Index row : rows.from_q) body(landmark++, row, true);
  for (const Index row : rows.from_k) body(landmark++, row, false);
}

template <class In, class T = typename decltype(In::key_bias)::value_type>
MatrixRef<T> gather_rows(const In& in, const SampledRows& rows, Scratch& scratch) {
  const TokenRows<T> q(in.q), k(in.k);
  const MatrixRef<T> landmarks =
      scratch.matrix<T>(static_cast<Index>(rows.from_q.size() + rows.from_k.size()), q.cols());
  for_each_sampled(rows, [&](Index landmark, Index row, bool of_queries) {
    (of_queries ? q : k).copy_row(row, landmarks.data() + landmark * landmarks.cols());
  });
  return landmarks;
}

template <class T>
void scatter_rows(const SampledRows& rows, const ConstMatrixRef<T>& dland, MatrixRef<T> dq, MatrixRef<T> dk) {
  for_each_sampled(rows, [&](Index landmark, Index row, bool of_queries) {
    (of_queries ? dq : dk).row(row) += dland.row(landmark);
  });
}

}  // namespace detail

/// Rows spread evenly: floor((2 j + 1) n / (2 m)) of the n kept rows, half of the landmarks from q and half from k.
struct StridedSample {
  Index num_landmarks = 128;  ///< m

  /// Whether the choice is the same.
  friend bool operator==(const StridedSample&, const StridedSample&) = default;

  /// @{ As JointLandmarks says.
  template <class T>
  MatrixRef<T> select(const Inputs<T>& in, Scratch& scratch) const {
    return detail::gather_rows(in, sample(in, scratch), scratch);
  }

  template <class T>
  MatrixRef<T> select(const detail::Sources<T>& in, Scratch& scratch) const {
    return detail::gather_rows(in, sample(in, scratch), scratch);
  }

  template <class T>
  void scatter(const Inputs<T>& in, const MatrixRef<T>& dland, MatrixRef<T> dq, MatrixRef<T> dk,
               Scratch& scratch) const {
    detail::scatter_rows<T>(sample(in, scratch), dland, dq, dk);
  }
  /// @}

 private:
  template <class In>
  detail::SampledRows sample(const In& in, Scratch& scratch) const {
    return detail::sample_rows(in, num_landmarks, scratch, [&](Index n, detail::Side side, std::span<Index> chosen) {
      choose(n, side, chosen, scratch);
    });
  }

  /// chosen <- ascending numbers below n.
  void choose(Index n, detail::Side, std::span<Index> chosen, Scratch&) const {
    const auto m = static_cast<Index>(chosen.size());
    for (Index j = 0; j < m; ++j) chosen[static_cast<std::size_t>(j)] = (2 * j + 1) * n / (2 * m);
  }

  template <class>
  friend struct detail::SampledShares;
};

/// Rows drawn uniformly without replacement, half of the landmarks from q and half from k: the same at every call and
/// on every platform. Chen et al. 2021, section 4.2. A partial Fisher-Yates shuffle, O(n) scratch.
struct UniformSample {
  Index num_landmarks = 128;  ///< m
  std::uint64_t seed = 0;     ///< of the draw

  /// Whether the choice is the same.
  friend bool operator==(const UniformSample&, const UniformSample&) = default;

  /// @{ As JointLandmarks says.
  template <class T>
  MatrixRef<T> select(const Inputs<T>& in, Scratch& scratch) const {
    return detail::gather_rows(in, sample(in, scratch), scratch);
  }

  template <class T>
  MatrixRef<T> select(const detail::Sources<T>& in, Scratch& scratch) const {
    return detail::gather_rows(in, sample(in, scratch), scratch);
  }

  template <class T>
  void scatter(const Inputs<T>& in, const MatrixRef<T>& dland, MatrixRef<T> dq, MatrixRef<T> dk,
               Scratch& scratch) const {
    detail::scatter_rows<T>(sample(in, scratch), dland, dq, dk);
  }
  /// @}

 private:
  template <class In>
  detail::SampledRows sample(const In& in, Scratch& scratch) const {
    return detail::sample_rows(in, num_landmarks, scratch, [&](Index n, detail::Side side, std::span<Index> chosen) {
      choose(n, side, chosen, scratch);
    });
  }

  /// chosen <- ascending numbers below n.
  void choose(Index n, detail::Side side, std::span<Index> chosen, Scratch& scratch) const {
    detail::SplitMix64 random(seed + static_cast<std::uint64_t>(side) * 0x632be59bd9b4e019U);
    Scratch temporary = scratch.nested();
    const std::span<Index> deck = temporary.array<Index>(n);
    for (Index i = 0; i < n; ++i) deck[static_cast<std::size_t>(i)] = i;
    for (std::size_t j = 0; j < chosen.size(); ++j) {
      const auto other = j + static_cast<std::size_t>(random.below(n - static_cast<Index>(j)));
      std::swap(deck[j], deck[other]);
      chosen[j] = deck[j];
    }
    detail::sort_elements(chosen.data(), static_cast<Index>(chosen.size()));
  }

  template <class>
  friend struct detail::SampledShares;
};

/// A choice of landmarks for queries and keys apart: select(x, keep, scratch) gives them as the rows of an (m, d)
/// matrix, where keep says which rows of x count, at least num_landmarks of them. As many of queries as of keys, at
/// least 1. Optional: scatter(dland, keep, dx) adds the gradient by the landmarks to that by the rows that they come
/// from; without it they are constants in the backward pass.
template <class L, class T>
concept SplitLandmarks = std::copyable<L> && requires(const L& landmarks, const ConstMatrixRef<T>& x,
                                                      bool (*keeps)(Index), Scratch& scratch) {
  { landmarks.num_landmarks } -> std::convertible_to<Index>;
  { landmarks.template select<T>(x, keeps, scratch) } -> std::same_as<MatrixRef<T>>;
};

namespace detail {

/// Whether m landmarks are as many as the kept queries, or the kept keys.
template <class In>
bool covers(Index m, const In& in) {
  return m >= count_kept(in.q.rows(), kept_queries(in)) || m >= count_kept(in.k.rows(), kept_keys(in));
}

/// The landmarks of rows by a policy; one that reads matrices alone gets a copy of rows that are not in place.
template <class T, class Landmarks, class Keeps>
MatrixRef<T> select_rows(const Landmarks& landmarks, const TokenRows<T>& x, const Keeps& keeps, Scratch& scratch,
                         Context& context) {
  if constexpr (requires { landmarks.template select<T>(x, keeps, scratch, context); }) {
    return landmarks.template select<T>(x, keeps, scratch, context);
  } else {
    return landmarks.template select<T>(whole_matrix(x, scratch), keeps, scratch);
  }
}

/// Segment j of n rows cut into m: the first m - n mod m segments have floor(n / m) rows, the others one more.
inline Range segment(Index n, Index m, Index j) {
  const Index shorter = m - n % m, length = n / m;
  return {j * length + std::max<Index>(0, j - shorter), (j + 1) * length + std::max<Index>(0, j + 1 - shorter)};
}

/// The segment that row i belongs to.
inline Index segment_of(Index n, Index m, Index i) {
  const Index shorter = m - n % m, length = n / m;
  return i < shorter * length ? i / length : shorter + (i - shorter * length) / (length + 1);
}

}  // namespace detail

/// The means of num_landmarks consecutive segments of the kept rows. Xiong et al. 2021, section 3.2.
struct SegmentMeans {
  Index num_landmarks = 64;  ///< m

  /// Whether the choice is the same.
  friend bool operator==(const SegmentMeans&, const SegmentMeans&) = default;

  /// As SplitLandmarks says.
  template <class T, class Keeps>
  MatrixRef<T> select(const detail::TokenRows<T>& x, const Keeps& keeps, Scratch& scratch) const {
    Context serial;
    return select(x, keeps, scratch, serial);
  }

  /// select with segments in parallel.
  template <class T, class Keeps>
  MatrixRef<T> select(const detail::TokenRows<T>& x, const Keeps& keeps, Scratch& scratch, Context& context) const {
    const Index n = detail::count_kept(x.rows(), keeps), buffer_size = kRowsAtOnce * x.cols();
    MatrixRef<T> means = scratch.matrix<T>(num_landmarks, x.cols());
    detail::set_zero(means);
    Scratch temporary = scratch.nested();
    const Index* const starts = first_rows(x.rows(), n, keeps, temporary);
    T* const buffers = temporary.elements<T>(context.workers() * buffer_size);
    const detail::LongSums<T> sums(n / num_landmarks + 1, x.cols(), context.workers(), temporary);
    context.for_each(num_landmarks, [&](Index j, int worker) {
      const detail::Range segment = detail::segment(n, num_landmarks, j);
      const Index length = segment.last - segment.first;
      T* mean = means.data() + j * means.cols();
      sums.add(length, worker, mean, [&, row = starts[j]](Index some, T* to) mutable {
        row = add_kept_rows(x, keeps, row, some, buffers + worker * buffer_size, to);
      });
      for (Index c = 0; c < means.cols(); ++c) mean[c] /= static_cast<T>(length);
    });
    return means;
  }

  /// Every row of a segment gets an equal share.
  template <class T, class Keeps>
  void scatter(const ConstMatrixRef<T>& dland, const Keeps& keeps, MatrixRef<T> dx) const {
    const Index n = detail::count_kept(dx.rows(), keeps);
    for (Index j = 0, row = 0; j < num_landmarks; ++j) {
      const detail::Range segment = detail::segment(n, num_landmarks, j);
      const T share = 1 / static_cast<T>(segment.last - segment.first);
      for (Index left = segment.last - segment.first; left > 0; ++row) {
        if (!keeps(row)) continue;
        dx.row(row) += share * dland.row(j);
        --left;
      }
    }
  }

 private:
  /// The first row of each segment of the n kept ones.
  template <class Keeps>
  const Index* first_rows(Index rows, Index n, const Keeps& keeps, Scratch& scratch) const {
    Index* const starts = scratch.elements<Index>(num_landmarks);
    for (Index j = 0; j < num_landmarks; ++j) starts[j] = detail::segment(n, num_landmarks, j).first;
    if (n < rows) detail::ranks_to_rows(starts, num_landmarks, keeps);
    return starts;
  }

  /// sum (d) <- sum + count kept rows of x, from the given one on. Returns the row after them.
  template <class T, class Keeps>
  static Index add_kept_rows(const detail::TokenRows<T>& x, const Keeps& keeps, Index row, Index count, T* buffer,
                             T* sum) {
    while (count > 0) {
      const T* rows[kRowsAtOnce];
      Index found = 0;
      for (; found < kRowsAtOnce && count > 0; ++row) {
        if (!keeps(row)) continue;
        detail::Prefetch::of(x.memory(), {row + kRowsAhead, row + kRowsAhead + 1}).fetch();
        rows[found] = x.row(row, buffer + found * x.cols());
        ++found;
        --count;
      }
      detail::add_rows(rows, found, sum, x.cols());
    }
    return row;
  }

  static constexpr Index kRowsAtOnce = 8;
  static constexpr Index kRowsAhead = 32;  // measured: 16 waits longer for memory, 64 no less
};

}  // namespace attn
