/// Exact attention of tokens that are spread over ranks: keys travel past the queries, and in the backward pass queries
/// past the keys.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/backward.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/exact.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/ranks.hpp>
#include <attn/mpi/ring.hpp>
#include <attn/mpi/shares.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>
#include <vector>

namespace attn::detail {

template <class T>
ConstMatrixRef<T> some_rows(const ConstMatrixRef<T>& m, Range rows) {
  return {row_of(m, rows.first), rows.last - rows.first, m.cols(), m.outerStride()};
}

/// The entries of x for some rows; x may be empty.
template <class T>
std::span<T> some_entries(std::span<T> x, Range rows) {
  return x.empty() ? x : part_of(x, rows.first, rows.last - rows.first);
}

/// Some queries of these inputs, and some keys.
template <class T>
Inputs<T> some_of(const Inputs<T>& in, Range queries, Range keys, Causal causal) {
  return {some_rows(in.q, queries),
          some_rows(in.k, keys),
          some_rows(in.v, keys),
          {causal, some_entries(in.mask.keep_key, keys), some_entries(in.mask.keep_query, queries)},
          some_entries(in.key_bias, keys)};
}

/// Keys and values of one rank as they travel, with biases and masks if any rank has them.
template <class T>
struct TravellingKeys {
  MatrixRef<T> k, v;
  std::span<T> bias;
  std::span<std::uint8_t> keep;

  static Index lines(const Shares& shares, const ShareFacts& of) {
    return lines_of<T>(of.n_k * of.d) + lines_of<T>(of.n_k * of.d_v) + (shares.have_bias() ? lines_of<T>(of.n_k) : 0) +
           (shares.mask_keys() ? lines_of<std::uint8_t>(of.n_k) : 0);
  }

  static TravellingKeys at(Line* lines, const Shares& shares, const ShareFacts& of) {
    Parcel parcel(lines);
    TravellingKeys keys{parcel.matrix<T>(of.n_k, of.d), parcel.matrix<T>(of.n_k, of.d_v), {}, {}};
    const auto n = static_cast<std::size_t>(of.n_k);
    if (shares.have_bias()) keys.bias = {parcel.take<T>(of.n_k), n};
    if (shares.mask_keys()) keys.keep = {parcel.take<std::uint8_t>(of.n_k), n};
    return keys;
  }

  void pack(const Inputs<T>& in) const {
    for (Index j = 0; j < k.rows(); ++j) {
      std::copy_n(row_of(in.k, j), k.cols(), row_of(k, j));
      std::copy_n(row_of(in.v, j), v.cols(), row_of(v, j));
    }
    std::fill(bias.begin(), bias.end(), T(0));
    std::copy(in.key_bias.begin(), in.key_bias.end(), bias.begin());
    std::fill(keep.begin(), keep.end(), std::uint8_t{1});
    if (!in.mask.keep_key.empty()) std::copy(in.mask.keep_key.begin(), in.mask.keep_key.end(), keep.begin());
  }

  /// These keys for the queries of in.
  Inputs<T> met_by(const Inputs<T>& in) const { return {in.q, k, v, {Causal::none, keep, in.mask.keep_query}, bias}; }
};

/// The states of this rank's queries, after some keys.
template <class T>
class GrowingStates {
 public:
  /// Weighted sums are in out, if that is of the type that computes.
  template <class Out>
  GrowingStates(const Inputs<Out>& in, const MatrixRef<Out>& out, Scratch& scratch)
      : states_{scratch.array<T>(in.q.rows()), scratch.array<T>(in.q.rows()), result_in_type<T>(out, scratch)} {
    std::fill(states_.sum.begin(), states_.sum.end(), T(0));
    std::fill(states_.maximum.begin(), states_.maximum.end(), kNoMaximum<T>);
    set_zero(states_.weighted);
  }

  /// Some queries meet some keys: compute(states) sets theirs.
  template <class Compute>
  void add(Range queries, Context& context, const Compute& compute) const {
    Scratch scratch = context.scratch();
    const Index n = queries.last - queries.first;
    const RowStates<T> from{scratch.array<T>(n), scratch.array<T>(n), scratch.matrix<T>(n, states_.weighted.cols())};
    compute(from);
    const RowStates<T> into{some_entries(states_.maximum, queries), some_entries(states_.sum, queries),
                            rows_of(states_.weighted, queries)};
    merge(into, from);
  }

  /// log sum_j kappa_ij of each row, -infinity where there is none.
  void copy_log_sums(std::vector<double>& lse) const {
    lse.resize(states_.sum.size());
    for (std::size_t i = 0; i < lse.size(); ++i)
      lse[i] = row_log_sum(static_cast<double>(states_.maximum[i]), static_cast<double>(states_.sum[i]));
  }

  template <ScoreKernel Kernel, class Out>
  void finish(const Kernel& kernel, Index d, const MatrixRef<Out>& out) const {
    if (out.rows() != 0) attn::finish(kernel, states_, d, out);
  }

 private:
  RowStates<T> states_;
};

/// LogSums::relative of rows that meet keys of which log-sums count more than these: for each query of in, from log
/// sum_j kappa_ij over all keys.
template <ScoreKernel Kernel, class T>
std::span<const RowLog<T>> relative_to_keys(const Kernel& kernel, const Sources<T>& in, std::span<const double> lse,
                                            Scratch& scratch) {
  const std::span<RowLog<T>> relative = scratch.array<RowLog<T>>(in.q.rows());
  Scratch temporary = scratch.nested();
  const Product<T> product = make_product(kernel, in, Maximum::running, 1, temporary);
  T* const row = temporary.elements<T>(in.q.cols());
  for (Index i = 0; i < in.q.rows(); ++i) {
    in.q.copy_row(i, row);
    if (product.kernel.center != nullptr) add_row(T(-1), product.kernel.center, row, in.q.cols());
    const T norm = product.kernel.bias == 0 ? T(0) : product.kernel.bias * squared_norm(row, in.q.cols());
    const T base = product.kernel.center != nullptr && norm > kFarNorm<T> ? norm : T(0);
    const auto at = static_cast<std::size_t>(i);
    relative[at] = {static_cast<T>(lse[at] - std::numbers::ln2 * product.origin(i, base - norm)), base};
  }
  return relative;
}

/// to <- to + from.
template <class T>
void add_rows_to(const MatrixRef<T>& to, const MatrixRef<T>& from) {
  for (Index i = 0; i < to.rows(); ++i) add_row(T(1), row_of(from, i), row_of(to, i), to.cols());
}

/// Sums of gradients by this rank's keys.
template <class T>
struct SumsByKeys {
  MatrixRef<T> dk, dv;

  /// Zeros, where gradients of type S will be or will be rounded from.
  template <class S>
  SumsByKeys(const Gradients<S>& to, Scratch& scratch)
      : dk(result_in_type<T>(to.dk, scratch)), dv(result_in_type<T>(to.dv, scratch)) {
    set_zero(dk);
    set_zero(dv);
  }
};

/// Queries of one rank as they travel past keys: with the gradient by out, that times out, and log-sums.
template <class T>
struct TravellingQueries {
  using Wide = Arithmetic<T>;

  MatrixRef<T> q, dout;
  std::span<Wide> dot;
  std::span<double> lse;
  std::span<std::uint8_t> keep;

  static Index lines(const ShareFacts& of) {
    return lines_of<T>(of.n_q * of.d) + lines_of<T>(of.n_q * of.d_v) + lines_of<Wide>(of.n_q) +
           lines_of<double>(of.n_q) + lines_of<std::uint8_t>(of.n_q);
  }

  static TravellingQueries at(Line* lines, const ShareFacts& of) {
    Parcel parcel(lines);
    const auto n = static_cast<std::size_t>(of.n_q);
    const MatrixRef<T> q = parcel.matrix<T>(of.n_q, of.d), dout = parcel.matrix<T>(of.n_q, of.d_v);
    Wide* const dot = parcel.take<Wide>(of.n_q);
    double* const lse = parcel.take<double>(of.n_q);
    return {q, dout, {dot, n}, {lse, n}, {parcel.take<std::uint8_t>(of.n_q), n}};
  }

  void pack(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& of_out,
            std::span<const double> log_sums, Context& context) const {
    for (Index i = 0; i < q.rows(); ++i) {
      std::copy_n(row_of(in.q, i), q.cols(), row_of(q, i));
      std::copy_n(row_of(of_out, i), dout.cols(), row_of(dout, i));
    }
    Scratch scratch = context.scratch();
    const std::span<const Wide> dots =
        row_dots<Wide>(in_type<Wide>(out, scratch, context), in_type<Wide>(of_out, scratch, context), scratch);
    std::copy(dots.begin(), dots.end(), dot.begin());
    std::copy(log_sums.begin(), log_sums.end(), lse.begin());
    std::fill(keep.begin(), keep.end(), std::uint8_t{1});
    if (!in.mask.keep_query.empty()) std::copy(in.mask.keep_query.begin(), in.mask.keep_query.end(), keep.begin());
  }

  /// dq and sums <- themselves and the gradients of some of these queries and some keys of in.
  template <ScoreKernel Kernel>
  void add_gradients(const Kernel& kernel, const Inputs<T>& in, Range queries, Range keys, Causal causal,
                     const MatrixRef<Wide>& dq, const SumsByKeys<Wide>& sums, Context& context) const {
    Scratch scratch = context.scratch();
    const Inputs<T> met{q, in.k, in.v, {Causal::none, in.mask.keep_key, keep}, in.key_bias};
    const Inputs<Wide> some = in_type<Wide>(some_of(met, queries, keys, causal), scratch, context);
    RowGradients<Wide> rows{in_type<Wide>(rows_of(dout, queries), scratch, context), {}, {}};
    if (score_parameters(kernel, q.cols()).rows == Rows::normalized) {
      rows.log_sum = relative_to_keys<Kernel, Wide>(kernel, sources(some), some_entries(lse, queries), scratch);
      rows.dot = some_entries(dot, queries);
    }
    const Gradients<Wide> added{scratch.matrix<Wide>(some.q.rows(), q.cols()),
                                scratch.matrix<Wide>(some.k.rows(), q.cols()),
                                scratch.matrix<Wide>(some.v.rows(), some.v.cols())};
    multiply_rows_backward<Kernel, Wide>(kernel, some, rows, added, context, {});
    add_rows_to(rows_of(dq, queries), added.dq);
    add_rows_to(rows_of(sums.dk, keys), added.dk);
    add_rows_to(rows_of(sums.dv, keys), added.dv);
  }
};

/// Gradients by queries that travel, after the queries themselves: each rank adds what its keys add, and the last one
/// sends them home.
template <class T, class Needs>
class ReturningGradients {
 public:
  ReturningGradients(const Route<Needs>& route, const Shares& shares, Scratch& scratch)
      : ReturningGradients(route, shares, most_lines(shares.ranks, [&](int rank) { return lines(shares.of(rank)); }),
                           scratch) {}

  /// Before the first step.
  void expect() {
    const int own = route_.ranks().rank;
    if (route_.steps_of(own) > 0) home_.receive(route_.last(own), kHome, at_home_, lines(shares_.own()));
  }

  /// Where a step's own gradients go.
  MatrixRef<T> computed(int step) const { return view(being_computed_, step); }

  /// Ends a step: adds what the ranks before have, and sends the sum on. Where there is nowhere to send it, it is home.
  void pass(int step) {
    const Index count = lines(shares_.of(route_.owner(step)));
    if (step > 0) {
      Exchange arrival(route_.ranks());
      arrival.receive(route_.previous(), kSum, arriving_, count);
      arrival.wait();
      add_row(T(1), view(arriving_, step).data(), computed(step).data(), computed(step).size());
    }
    departure_.wait_for_departure();
    std::swap(leaving_, being_computed_);
    if (route_.passes_on(step)) {
      departure_.send(route_.next(), kSum, leaving_, count);
    } else if (step > 0) {
      departure_.send(route_.owner(step), kHome, leaving_, count);
    } else {
      std::swap(leaving_, at_home_);
    }
  }

  /// After the last step: this rank's own.
  MatrixRef<T> finish() {
    departure_.wait();
    home_.wait();
    return view(at_home_, 0);
  }

 private:
  static constexpr int kSum = 0x63, kHome = 0x64;

  static Index lines(const ShareFacts& of) { return lines_of<T>(of.n_q * of.d); }

  ReturningGradients(const Route<Needs>& route, const Shares& shares, Index lines, Scratch& scratch)
      : route_(route),
        shares_(shares),
        home_(route.ranks()),
        departure_(route.ranks()),
        at_home_(scratch.elements<Line>(lines)),
        arriving_(scratch.elements<Line>(lines)),
        leaving_(scratch.elements<Line>(lines)),
        being_computed_(scratch.elements<Line>(lines)) {}

  MatrixRef<T> view(Line* lines, int step) const {
    const ShareFacts& of = shares_.of(route_.owner(step));
    return Parcel(lines).matrix<T>(of.n_q, of.d);
  }

  const Route<Needs>& route_;
  const Shares& shares_;
  Exchange home_, departure_;
  Line *at_home_, *arriving_, *leaving_, *being_computed_;
};

/// What backward needs of a forward pass: the log-sums of the rows of this rank.
struct DistributedLogSums {
  std::vector<double> lse{};
};

/// out <- the rows of this rank, whose queries meet the keys of all ranks: compute(inputs, states) for some of them and
/// some keys of one rank. lse, unless null, <- log sum_j kappa_ij.
template <class T, ScoreKernel Kernel, class Compute>
void attend_ring(const Kernel& kernel, const Inputs<T>& in, const MatrixRef<T>& out, const Shares& shares,
                 Agreement& agreement, Context& context, std::vector<double>* lse, const Compute& compute,
                 Index queries_at_once = 1024) {
  using Keys = TravellingKeys<T>;
  using Wide = Arithmetic<T>;
  Scratch scratch = context.scratch();
  const auto lines = [&](int rank) { return Keys::lines(shares, shares.of(rank)); };
  std::optional<TravelMemory> memory;
  std::optional<GrowingStates<Wide>> states;
  agreement.guard([&] {
    memory.emplace(most_lines(shares.ranks, lines), scratch);
    states.emplace(in, out, scratch);
    Keys::at(memory->own, shares, shares.own()).pack(in);
  });
  agreement.settle();
  const auto needs = [&](int owner, int rank) { return shares.meet(shares.of(rank), shares.of(owner)); };
  const Route route(shares.ranks, 1, needs);
  const auto visit = [&](int step, Line* at, const auto& progress) {
    const ShareFacts& of = shares.of(route.owner(step));
    const Inputs<T> met = Keys::at(at, shares, of).met_by(in);
    const auto part = [&](Range queries, Range keys, Causal causal) {
      states->add(queries, context,
                  [&](const RowStates<Wide>& to) { compute(some_of(met, queries, keys, causal), to); });
      progress();
    };
    shares.for_each_part(shares.own(), of, part, queries_at_once);
  };
  travel(route, *memory, agreement, lines, visit, [](int) {});
  agreement.guard([&] {
    if (lse != nullptr) states->copy_log_sums(*lse);
    states->finish(kernel, in.q.cols(), out);
  });
  agreement.settle();
}

/// gradients <- those of attend_ring with kernel_matmul_partial, for its out and lse.
template <class T, ScoreKernel Kernel>
void attend_ring_backward(const Kernel& kernel, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                          const ConstMatrixRef<T>& dout, std::span<const double> lse, const Gradients<T>& gradients,
                          const Shares& shares, Agreement& agreement, Context& context) {
  using Queries = TravellingQueries<T>;
  using Wide = Arithmetic<T>;
  Scratch scratch = context.scratch();
  auto needs = [&](int owner, int rank) { return shares.meet(shares.of(owner), shares.of(rank)); };
  const Route route(shares.ranks, -1, needs);
  const auto lines = [&](int rank) { return Queries::lines(shares.of(rank)); };
  std::optional<TravelMemory> memory;
  std::optional<ReturningGradients<Wide, decltype(needs)>> dq;
  std::optional<SumsByKeys<Wide>> sums;
  agreement.guard([&] {
    memory.emplace(most_lines(shares.ranks, lines), scratch);
    dq.emplace(route, shares, scratch);
    sums.emplace(gradients, scratch);
    Queries::at(memory->own, shares.own()).pack(in, out, dout, lse, context);
  });
  agreement.settle();
  dq->expect();
  const auto visit = [&](int step, Line* at, const auto& progress) {
    const ShareFacts& of = shares.of(route.owner(step));
    const Queries some = Queries::at(at, of);
    set_zero(dq->computed(step));
    shares.for_each_part(of, shares.own(), [&](Range queries, Range keys, Causal causal) {
      some.add_gradients(kernel, in, queries, keys, causal, dq->computed(step), *sums, context);
      progress();
    });
  };
  travel(route, *memory, agreement, lines, visit, [&](int step) { dq->pass(step); });
  const MatrixRef<Wide> own_dq = dq->finish();
  agreement.guard([&] {
    convert<T, Wide>(own_dq, gradients.dq, context);
    set_converted(gradients.dk, sums->dk, context);
    set_converted(gradients.dv, sums->dv, context);
  });
  agreement.settle();
}

template <class T, ScoreKernel Kernel>
struct Distributed<ExactAttention<T, Kernel>> {
  using Method = ExactAttention<T, Kernel>;
  using Saved = DistributedLogSums;
  static constexpr bool kCausal = true;

  static void add_options(const Method& method, Index d, Fingerprint& to) {
    to.add(score_parameters(method.kernel_, d));
  }

  static void forward(const Method& method, const Inputs<T>& in, const MatrixRef<T>& out, const Shares& shares,
                      Agreement& agreement, Context& context, Saved* saved) {
    attend_ring(method.kernel_, in, out, shares, agreement, context, saved == nullptr ? nullptr : &saved->lse,
                [&](const Inputs<T>& some, const RowStates<Arithmetic<T>>& to) {
                  kernel_matmul_partial(method.kernel_, some, to, context);
                });
  }

  static void backward(const Method& method, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                       const ConstMatrixRef<T>& dout, const Saved& saved, const Gradients<T>& gradients,
                       const Shares& shares, Agreement& agreement, Context& context) {
    attend_ring_backward(method.kernel_, in, out, dout, saved.lse, gradients, shares, agreement, context);
  }

  static void check_saved(const Inputs<T>& in, const Saved& saved) {
    detail::check_saved(Method::kName, "rows of q", static_cast<Index>(saved.lse.size()), in.q.rows());
  }
};

}  // namespace attn::detail
