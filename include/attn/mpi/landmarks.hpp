/// Landmarks of tokens that are spread over ranks, and what they add up over all keys: m-sized on every rank.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/ranks.hpp>
#include <attn/mpi/shares.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace attn::detail {

/// Row states that ranks can merge, and beside them those that arrive.
template <class T>
class ReducibleStates {
 public:
  ReducibleStates(Index rows, Index cols, Scratch& scratch)
      : own_(scratch.array<Line>(lines(rows, cols))),
        received_(scratch.array<Line>(lines(rows, cols))),
        states(at(own_.data(), rows, cols)) {}

  /// states <- those of all ranks' keys together.
  void merge_all(const Ranks& ranks) const {
    const RowStates<T> from = at(received_.data(), states.weighted.rows(), states.weighted.cols());
    reduce(ranks, own_, received_, [&] { merge(states, from); });
  }

 private:
  static Index lines(Index rows, Index cols) { return 2 * lines_of<T>(rows) + lines_of<T>(rows * cols); }

  static RowStates<T> at(Line* memory, Index rows, Index cols) {
    Parcel parcel(memory);
    const auto n = static_cast<std::size_t>(rows);
    T *const maximum = parcel.take<T>(rows), *const sum = parcel.take<T>(rows);
    return {{maximum, n}, {sum, n}, parcel.matrix<T>(rows, cols)};
  }

  std::span<Line> own_, received_;

 public:
  RowStates<T> states;
};

/// The numbers of this rank's kept rows, in ascending order; the i-th is the (first + i)-th of all ranks' kept rows.
struct KeptShare {
  template <class Keeps>
  KeptShare(Index rows, const Keeps& keeps, Index first_of_all, Scratch& scratch)
      : list(scratch.array<Index>(count_kept(rows, keeps))), first(first_of_all) {
    std::size_t rank = 0;
    for (Index i = 0; i < rows; ++i) {
      if (keeps(i)) list[rank++] = i;
    }
  }

  /// Those among the given kept rows of all ranks, as places in list.
  Range within(Range of_all) const {
    const auto count = static_cast<Index>(list.size());
    return {std::clamp<Index>(of_all.first - first, 0, count), std::clamp<Index>(of_all.last - first, 0, count)};
  }

  std::span<Index> list;
  Index first;
};

/// Segments of the n kept rows of all ranks, as SegmentMeans has them.
template <class T>
struct SharedSegments {
  Index n, m;

  /// means (m, d), zeros, <- what this rank's rows add to them.
  void add_means(const TokenRows<T>& x, const KeptShare& kept, const MatrixRef<T>& means, Context& context) const {
    Scratch scratch = context.scratch();
    T* const buffers = scratch.elements<T>(context.workers() * x.cols());
    const LongSums<T> sums(n / m + 1, x.cols(), context.workers(), scratch);
    context.for_each(m, [&](Index j, int worker) {
      const Range all = segment(n, m, j), own = kept.within(all);
      T *const mean = row_of(means, j), *const buffer = buffers + worker * x.cols();
      sums.add(own.last - own.first, worker, mean, [&, i = own.first](Index some, T* to) mutable {
        for (const Index last = i + some; i < last; ++i)
          add_row(T(1), x.row(kept.list[static_cast<std::size_t>(i)], buffer), to, x.cols());
      });
      scale_row(1 / static_cast<T>(all.last - all.first), mean, mean, x.cols());
    });
  }

  /// dx <- dx + what this rank's rows have of the gradient by the means (m, d).
  void scatter(const MatrixRef<T>& dmeans, const KeptShare& kept, const MatrixRef<T>& dx) const {
    for (Index j = 0; j < m; ++j) {
      const Range all = segment(n, m, j), own = kept.within(all);
      for (Index i = own.first; i < own.last; ++i) {
        add_row(1 / static_cast<T>(all.last - all.first), row_of(dmeans, j),
                row_of(dx, kept.list[static_cast<std::size_t>(i)]), dx.cols());
      }
    }
  }
};

/// Which of all ranks' kept rows a sampler takes: min(m / 2, kept queries), then min(the rest of m, kept keys).
template <class Landmarks>
struct SampledShares {
  std::span<Index> from_q, from_k;

  static SampledShares of(const Landmarks& landmarks, Index n_q, Index n_k, Scratch& scratch) {
    const Index m = landmarks.num_landmarks, m_q = std::min(m / 2, n_q), m_k = std::min(m - m_q, n_k);
    const SampledShares rows{scratch.array<Index>(m_q), scratch.array<Index>(m_k)};
    landmarks.choose(n_q, Side::queries, rows.from_q, scratch);
    landmarks.choose(n_k, Side::keys, rows.from_k, scratch);
    return rows;
  }

  Index count() const { return static_cast<Index>(from_q.size() + from_k.size()); }

  /// body(landmark, row) for those that this rank has, among its queries and among its keys.
  template <class Body>
  static void for_each_own(std::span<const Index> chosen, Index first_landmark, const KeptShare& kept,
                           const Body& body) {
    for (std::size_t l = 0; l < chosen.size(); ++l) {
      const Range own = kept.within({chosen[l], chosen[l] + 1});
      if (own.first < own.last)
        body(first_landmark + static_cast<Index>(l), kept.list[static_cast<std::size_t>(own.first)]);
    }
  }

  /// land (m, d), zeros, <- the landmarks that this rank has.
  template <class T>
  void gather(const Sources<T>& in, const KeptShare& queries, const KeptShare& keys, const MatrixRef<T>& land) const {
    for_each_own(from_q, 0, queries, [&](Index l, Index row) { in.q.copy_row(row, row_of(land, l)); });
    for_each_own(from_k, static_cast<Index>(from_q.size()), keys,
                 [&](Index l, Index row) { in.k.copy_row(row, row_of(land, l)); });
  }

  /// dq and dk <- themselves and the gradient by the landmarks (m, d) that this rank has.
  template <class T>
  void scatter(const MatrixRef<T>& dland, const KeptShare& queries, const KeptShare& keys, const MatrixRef<T>& dq,
               const MatrixRef<T>& dk) const {
    const Index d = dland.cols();
    for_each_own(from_q, 0, queries, [&](Index l, Index row) { add_row(T(1), row_of(dland, l), row_of(dq, row), d); });
    for_each_own(from_k, static_cast<Index>(from_q.size()), keys,
                 [&](Index l, Index row) { add_row(T(1), row_of(dland, l), row_of(dk, row), d); });
  }
};

/// What a backward pass reads and writes, in T, in which it computes.
template <class T>
struct WideBackward {
  template <class S>
  WideBackward(const Inputs<S>& inputs, const ConstMatrixRef<S>& of_out, const ConstMatrixRef<S>& of_dout,
               const Gradients<S>& gradients, Scratch& scratch, Context& context)
      : to{result_in_type<T>(gradients.dq, scratch), result_in_type<T>(gradients.dk, scratch),
           result_in_type<T>(gradients.dv, scratch)},
        in(in_type<T>(inputs, scratch, context)),
        out(in_type<T>(of_out, scratch, context)),
        dout(in_type<T>(of_dout, scratch, context)) {}

  template <class S>
  void write(const Gradients<S>& gradients, Context& context) const {
    set_converted(gradients.dq, to.dq, context);
    set_converted(gradients.dk, to.dk, context);
    set_converted(gradients.dv, to.dv, context);
  }

  Gradients<T> to;
  Inputs<T> in;
  ConstMatrixRef<T> out, dout;
};

}  // namespace attn::detail
