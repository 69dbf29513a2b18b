/// Exact attention of some queries.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <span>

namespace attn::detail {

/// Those of a product's keys that lie in a range, with what masks and biases say of them but for causal limits.
template <class T>
Sources<T> keys_of(const Sources<T>& in, const TokenRows<T>& q, Range keys) {
  const auto first = static_cast<std::size_t>(keys.first), count = static_cast<std::size_t>(keys.last - keys.first);
  const auto some = [&](auto all) { return all.empty() ? all : all.subspan(first, count); };
  return {q, in.k.middle_rows(keys.first, keys.last - keys.first), in.v.middle_rows(keys.first, keys.last - keys.first),
          RowMask(some(in.mask.keep_key), {}), some(in.key_bias)};
}

/// Rows of exact attention under a causal mask, as states that some keys after others are added to.
template <ScoreKernel Kernel, class T>
class ExactCausalRows {
 public:
  /// rows: ascending. weighted: of the states, and later the results.
  ExactCausalRows(const Kernel& kernel, const Sources<T>& in, const MatrixRef<T>& q, std::span<const Index> rows,
                  const MatrixRef<T>& weighted, Context& context, Scratch& scratch)
      : kernel_(kernel),
        in_(in),
        q_(q),
        rows_(rows),
        limits_(CausalLimits::of_inputs(in)),
        context_(context),
        states_{scratch.array<T>(q.rows()), scratch.array<T>(q.rows()), weighted},
        more_{scratch.array<T>(1), scratch.array<T>(1), scratch.matrix<T>(1, weighted.cols())} {}

  void run() const {
    constexpr Index kTogether = 8;
    for (Range some{0, 0}; some.first < q_.rows(); some.first = some.last) {
      some.last = std::min(q_.rows(), some.first + (limits_.has_window() || in_.alibi_slope != 0 ? 1 : kTogether));
      attend(some);
    }
    finish(kernel_, states_, in_.q.cols(), states_.weighted);
  }

 private:
  /// A few neighbouring queries see most keys together, or a single one those in front of its window; the others come
  /// to each by itself.
  void attend(Range some) const {
    const Index together = std::min(seen(some.first), limits_.has_window() ? limits_.sinks : in_.k.rows());
    set(of(some), some, {0, together});
    for (Index i = some.first; i < some.last; ++i) {
      const Index first = std::max(together, limits_.from(rows_.data()[i]));
      if (first >= seen(i)) continue;
      set(more_, {i, i + 1}, {first, seen(i)});
      merge(of({i, i + 1}), more_);
    }
  }

  void set(const RowStates<T>& states, Range some, Range keys) const {
    Sources<T> seen = keys_of<T>(in_, rows_of(q_, some), keys);
    if (in_.alibi_slope != 0) {  // a single query, whose distances are counted from its last key
      seen.alibi_slope = in_.alibi_slope;
      seen.mask = SourceMask<T>(Mask{.causal = Causal::upper_left,
                                     .keep_key = seen.mask.keep_key,
                                     .first_query = limits_.of(rows_.data()[some.first]),
                                     .first_key = keys.first});
    }
    multiply_partial<Kernel, T>(kernel_, seen, states, context_);
  }

  /// Keys up to the last one that the i-th query sees.
  Index seen(Index i) const { return std::clamp<Index>(limits_.of(rows_.data()[i]) + 1, 0, in_.k.rows()); }

  RowStates<T> of(Range some) const {
    return {part_of(states_.maximum, some.first, some.last - some.first),
            part_of(states_.sum, some.first, some.last - some.first), rows_of(states_.weighted, some)};
  }

  const Kernel& kernel_;
  const Sources<T>& in_;
  const MatrixRef<T>& q_;
  std::span<const Index> rows_;
  CausalLimits limits_;
  Context& context_;
  RowStates<T> states_, more_;
};

/// to (rows, d_v) <- exact attention of the given queries, for causal masks ascending.
template <ScoreKernel Kernel, class T>
void exact_rows(const Kernel& kernel, const Sources<T>& in, std::span<const Index> rows, const MatrixRef<T>& to,
                Context& context) {
  Scratch scratch = context.scratch();
  const MatrixRef<T> q = scratch.matrix<T>(static_cast<Index>(rows.size()), in.q.cols());
  for (Index i = 0; i < q.rows(); ++i) in.q.copy_row(rows.data()[i], row_of(q, i));
  if (in.mask.causal != Causal::none)
    return ExactCausalRows<Kernel, T>(kernel, in, q, rows, to, context, scratch).run();
  multiply<Kernel, T>(kernel, keys_of<T>(in, q, {0, in.k.rows()}), to, LogSums<T>{}, context);
}

}  // namespace attn::detail
