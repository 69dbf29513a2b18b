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

/// exact_rows under a causal mask. rows: ascending. A few neighbouring queries see most keys together; those that not
/// all of them see come to each by itself.
template <ScoreKernel Kernel, class T>
void exact_causal_rows(const Kernel& kernel, const Sources<T>& in, const MatrixRef<T>& q, std::span<const Index> rows,
                       const MatrixRef<T>& to, Context& context) {
  constexpr Index kTogether = 8;
  const Index count = static_cast<Index>(rows.size()), d_v = to.cols();
  const CausalLimits limits = CausalLimits::of_inputs(in);
  Scratch scratch = context.scratch();
  const RowStates<T> all{scratch.array<T>(count), scratch.array<T>(count), to},
      own{scratch.array<T>(1), scratch.array<T>(1), scratch.matrix<T>(1, d_v)};
  const auto seen = [&](Index i) { return std::clamp<Index>(limits.of(rows.data()[i]) + 1, 0, in.k.rows()); };
  const auto state = [&](Index first, Index n) {
    const auto at = static_cast<std::size_t>(first), some = static_cast<std::size_t>(n);
    return RowStates<T>{all.maximum.subspan(at, some), all.sum.subspan(at, some), rows_of(to, {first, first + n})};
  };
  for (Range some{0, 0}; some.first < count; some.first = some.last) {
    some.last = std::min(count, some.first + kTogether);
    const Index shared = seen(some.first);
    multiply_partial<Kernel, T>(kernel, keys_of<T>(in, rows_of(q, some), {0, shared}),
                                state(some.first, some.last - some.first), context);
    for (Index i = some.first; i < some.last; ++i) {
      if (seen(i) == shared) continue;
      multiply_partial<Kernel, T>(kernel, keys_of<T>(in, rows_of(q, {i, i + 1}), {shared, seen(i)}), own, context);
      merge(state(i, 1), own);
    }
  }
  finish(kernel, all, in.q.cols(), to);
}

/// to (rows, d_v) <- exact attention of the given queries, ascending, as the masks of keys and causal ones say.
template <ScoreKernel Kernel, class T>
void exact_rows(const Kernel& kernel, const Sources<T>& in, std::span<const Index> rows, const MatrixRef<T>& to,
                Context& context) {
  Scratch scratch = context.scratch();
  const MatrixRef<T> q = scratch.matrix<T>(static_cast<Index>(rows.size()), in.q.cols());
  for (Index i = 0; i < q.rows(); ++i) in.q.copy_row(rows.data()[i], row_of(q, i));
  if (in.mask.causal != Causal::none) return exact_causal_rows(kernel, in, q, rows, to, context);
  multiply<Kernel, T>(kernel, keys_of<T>(in, q, {0, in.k.rows()}), to, LogSums<T>{}, context);
}

}  // namespace attn::detail
