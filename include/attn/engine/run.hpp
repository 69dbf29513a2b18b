/// Runs products: the tasks of a kernel and its inputs, forward and backward.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/backward.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/engine/few_queries.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/streamed.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <string_view>

namespace attn::detail {

/// Streams all keys past each block of queries, and calls write with the runner that has a block complete. Where keys
/// are cut into splits, these are merged first. Under a causal mask the last blocks cost most, so they come first. to:
/// where rows will be written.
template <class T, class Write>
void run_blocks(const Product<T>& product, const MemoryRows& to, Context& context, Scratch& scratch,
                const Write& write) {
  const Index blocks = product.partition.blocks, splits = product.partition.splits, strips = product.partition.strips;
  BlockRunner<T>* const runners = scratch.make<BlockRunner<T>>(context.workers(), product, scratch);
  LaneState<T>* parts = nullptr;
  if (splits > 1) {
    parts = scratch.elements<LaneState<T>>(splits * strips);
    for (Index i = 0; i < splits * strips; ++i) parts[i] = LaneState<T>::make(product.in.v.cols(), scratch);
    context.for_each(blocks * splits, [&](Index item, int worker) {
      const Index split = item % splits;
      runners[worker].stream(item / splits, nth_part(product.in.k.rows(), splits, split), parts + split * strips, {});
    });
  }
  context.for_each(blocks, [&](Index item, int worker) {
    const Index block = blocks - 1 - item;
    if (parts == nullptr) {
      runners[worker].stream(block, {0, product.in.k.rows()}, nullptr, to);
    } else {
      runners[worker].merge_splits(block, parts);
    }
    write(runners[worker]);
  });
}

/// run for few queries.
template <class T>
void run_few(const Product<T>& product, const ResultRows<T>& out, const LogSums<T>& logs, Context& context,
             Scratch& scratch) {
  run_few_queries(product, context, scratch,
                  [&](const auto& runner, const auto& total) { runner.write_results(total, out, logs); });
}

/// run_partial for few queries.
template <class T>
void run_few_partial(const Product<T>& product, const RowStates<T>& states, Context& context, Scratch& scratch) {
  run_few_queries(product, context, scratch,
                  [&](const auto& runner, const auto& total) { runner.write_states(total, states); });
}

/// out <- all rows, and their log-sums.
template <class T>
void run(const Product<T>& product, const ResultRows<T>& out, const LogSums<T>& logs, Context& context,
         Scratch& scratch) {
  const auto& run_few = product.in.mask.run_few;
  if (run_few != nullptr && FewQueries<T>::suits(product)) return run_few(product, out, logs, context, scratch);
  if (!FewKeys<T>::suits(product)) {
    return run_blocks(product, out.memory(), context, scratch,
                      [&](const BlockRunner<T>& runner) { runner.write_results(out, logs); });
  }
  const FewKeys<T> few = FewKeys<T>::pack(product, scratch);
  FewKeysRunner<T>* const runners = scratch.make<FewKeysRunner<T>>(context.workers(), product, few, scratch);
  context.for_each(product.partition.blocks,
                   [&](Index block, int worker) { runners[worker].finish_block(block, out, logs); });
}

/// states (n_q): maximum, sum and weighted <- those of all rows.
template <class T, class States>
void run_partial(const Product<T>& product, const States& states, Context& context, Scratch& scratch) {
  const auto& run_few = product.in.mask.run_few_partial;
  if (run_few != nullptr && FewQueries<T>::suits(product)) return run_few(product, states, context, scratch);
  run_blocks(product, MemoryRows::of(states.weighted), context, scratch,
             [&](const BlockRunner<T>& runner) { runner.write_states(states); });
}

/// kernel_matmul, once its arguments are checked.
template <ScoreKernel Kernel, class T>
void multiply(const Kernel& kernel, const Sources<T>& in, const ResultRows<T>& out, const LogSums<T>& logs,
              Context& context) {
  Scratch scratch = context.scratch();
  const bool sums = logs.absolute != nullptr || logs.relative != nullptr;
  run(make_product(kernel, in, sums ? Maximum::running : Maximum::none, context.workers(), scratch), out, logs, context,
      scratch);
}

/// multiply with absolute log-sums alone; lse may be null.
template <ScoreKernel Kernel, class T>
void multiply(const Kernel& kernel, const Sources<T>& in, const ResultRows<T>& out, T* lse, Context& context) {
  multiply<Kernel, T>(kernel, in, out, LogSums<T>{lse}, context);
}

/// kernel_matmul_partial, once its arguments are checked.
template <ScoreKernel Kernel, class T, class States>
void multiply_partial(const Kernel& kernel, const Sources<T>& in, const States& states, Context& context) {
  Scratch scratch = context.scratch();
  run_partial(make_product(kernel, in, Maximum::running, context.workers(), scratch), states, context, scratch);
}

/// dots_i = a_i.b_i over the rows of both.
template <class T>
std::span<const T> row_dots(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& b, Scratch& scratch) {
  const std::span<T> dots = scratch.array<T>(a.rows());
  for (Index i = 0; i < a.rows(); ++i) {
    dots[static_cast<std::size_t>(i)] = dot_product(row_of(a, i), row_of(b, i), a.cols());
  }
  return dots;
}

/// to <- to + parts, one after another, rows in parallel.
template <class T>
void add_parts(MatrixRef<T> to, std::span<const MatrixRef<T>> parts, Context& context) {
  constexpr Index kRows = 128;
  if (parts.empty()) return;
  context.for_each((to.rows() + kRows - 1) / kRows, [&](Index item, int) {
    const Range rows{item * kRows, std::min((item + 1) * kRows, to.rows())};
    for (const MatrixRef<T>& part : parts) rows_of(to, rows) += rows_of(part, rows);
  });
}

/// gradients and dbias <- those of a product, from partial ones for each part of the keys and of the queries.
template <class T>
void run_backward(const Product<T>& product, const RowGradients<T>& rows, const Gradients<T>& gradients,
                  std::span<T> dbias, Context& context, Scratch& scratch) {
  const Sources<T>& in = product.in;
  const BackwardPartition partition = BackwardPartition::of(in.q.rows(), in.k.rows());
  const Index query_parts = partition.query_parts, key_parts = partition.key_parts;
  const auto parts_of = [&](Index parts, const MatrixRef<T>& whole) {
    return std::span<MatrixRef<T>>(scratch.make<MatrixRef<T>>(parts, whole), static_cast<std::size_t>(parts));
  };
  const std::span<MatrixRef<T>> dq = parts_of(key_parts, gradients.dq), dk = parts_of(query_parts, gradients.dk),
                                dv = parts_of(query_parts, gradients.dv);
  const MatrixRef<T> bias_column(dbias.data(), static_cast<Index>(dbias.size()), 1, 1);
  const std::span<MatrixRef<T>> bias = parts_of(query_parts, bias_column);
  for (std::size_t p = 1; p < dq.size(); ++p) show(dq[p], scratch.matrix<T>(in.q.rows(), in.q.cols()));
  for (std::size_t p = 1; p < dk.size(); ++p) {
    show(dk[p], scratch.matrix<T>(in.k.rows(), in.k.cols()));
    show(dv[p], scratch.matrix<T>(in.v.rows(), in.v.cols()));
    show(bias[p], scratch.matrix<T>(bias_column.rows(), 1));
  }
  BackwardRunner<T>* const runners = scratch.make<BackwardRunner<T>>(context.workers(), product, rows, scratch);
  context.for_each(key_parts * query_parts, [&](Index item, int worker) {
    const auto key = static_cast<std::size_t>(item / query_parts), query = static_cast<std::size_t>(item % query_parts);
    runners[worker].run(nth_part(product.partition.strips, query_parts, item % query_parts),
                        nth_part(in.k.rows(), key_parts, item / query_parts),
                        {dq[key], dk[query], dv[query], {bias[query].data(), dbias.size()}});
  });
  add_parts<T>(gradients.dq, dq.subspan(1), context);
  add_parts<T>(gradients.dk, dk.subspan(1), context);
  add_parts<T>(gradients.dv, dv.subspan(1), context);
  if (!dbias.empty()) add_parts<T>(bias_column, bias.subspan(1), context);
}

/// dk_j <- dk_j - 2 bias dbias_j k_j, the kernel's own dependence on |k_j|^2. Keys that no query sees may hold
/// anything, and have no gradient.
template <class T>
void subtract_norm_gradient(const Product<T>& product, std::span<const T> dbias, MatrixRef<T> dk) {
  const T twice_bias = 2 * std::numbers::ln2_v<T> * product.kernel.bias;
  for (Index j = 0; j < dk.rows(); ++j) {
    if (dbias[static_cast<std::size_t>(j)] == 0) continue;
    const T* k = row_of(product.in.k, j);
    T* to = row_of(dk, j);
    const T factor = twice_bias * dbias[static_cast<std::size_t>(j)];
    for (Index c = 0; c < dk.cols(); ++c)
      to[c] -= factor * (k[c] - (product.kernel.center == nullptr ? T(0) : product.kernel.center[c]));
  }
}

/// gradients and dbias <- those of a product, from what is known of its rows.
template <ScoreKernel Kernel, class T>
void multiply_rows_backward(const Kernel& kernel, const Inputs<T>& in, const RowGradients<T>& rows,
                            const Gradients<T>& gradients, Context& context, std::span<T> dbias) {
  Scratch scratch = context.scratch();
  const Sources<T> sources = detail::sources(in);
  const Product<T> product = make_product(kernel, sources, Maximum::running, context.workers(), scratch);
  if (product.kernel.bias != 0 && dbias.empty()) dbias = scratch.array<T>(in.k.rows());
  run_backward(product, rows, gradients, dbias, context, scratch);
  if (product.kernel.bias != 0) subtract_norm_gradient<T>(product, dbias, gradients.dk);
}

/// kernel_matmul_backward, once its arguments are checked; lse is LogSums::relative, empty where rows are raw.
template <ScoreKernel Kernel, class T>
void multiply_backward(const Kernel& kernel, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                       std::span<const RowLog<T>> lse, const ConstMatrixRef<T>& dout, const Gradients<T>& gradients,
                       Context& context, std::span<T> dbias = {}) {
  Scratch scratch = context.scratch();
  const bool normalized = score_parameters(kernel, in.q.cols()).rows == Rows::normalized;
  const RowGradients<T> rows{dout, normalized ? lse : std::span<const RowLog<T>>{},
                             normalized ? row_dots<T>(out, dout, scratch) : std::span<const T>{}};
  multiply_rows_backward(kernel, in, rows, gradients, context, dbias);
}

/// What absolute log-sums have beyond relative ones, Product::origin in units of log, for each query; 0 for dropped
/// ones.
template <ScoreKernel Kernel, class T>
std::span<const double> log_origins(const Kernel& kernel, const Sources<T>& in, Scratch& scratch) {
  const std::span<double> origins = scratch.array<double>(in.q.rows());
  Scratch temporary = scratch.nested();
  const Product<T> product = make_product(kernel, in, Maximum::running, 1, temporary);
  T* const row = temporary.elements<T>(in.q.cols());
  for (Index i = 0; i < in.q.rows(); ++i) {
    in.q.copy_row(i, row);
    if (product.kernel.center != nullptr) add_row(T(-1), product.kernel.center, row, in.q.cols());
    const T query_bias = product.kernel.bias == 0 ? T(0) : -product.kernel.bias * squared_norm(row, in.q.cols());
    origins[static_cast<std::size_t>(i)] = keeps_query(in, i) ? std::numbers::ln2 * product.origin(i, query_bias) : 0;
  }
  return origins;
}

/// LogSums::relative from absolute ones. Where T holds these with too few digits, they are computed anew, which takes a
/// forward pass of one column.
template <ScoreKernel Kernel, class T>
std::span<const RowLog<T>> relative_log_sums(const Kernel& kernel, const Inputs<T>& in, std::span<const T> absolute,
                                             Context& context, Scratch& scratch) {
  constexpr double kMostOrigin = 16;
  const std::span<RowLog<T>> relative = scratch.array<RowLog<T>>(in.q.rows());
  Scratch temporary = scratch.nested();
  const std::span<const double> origins = log_origins<Kernel, T>(kernel, sources(in), temporary);
  if (std::any_of(origins.begin(), origins.end(), [](double x) { return std::abs(x) > kMostOrigin; })) {
    const Inputs<T> one_column{in.q, in.k, in.v.leftCols(1), in.mask, in.key_bias, in.alibi_slope};
    multiply<Kernel, T>(kernel, sources(one_column), temporary.matrix<T>(in.q.rows(), 1), {nullptr, relative.data()},
                        context);
    return relative;
  }
  for (std::size_t i = 0; i < relative.size(); ++i) {
    relative[i] = {static_cast<T>(static_cast<double>(absolute[i]) - origins[i]), T(0)};
  }
  return relative;
}

}  // namespace attn::detail
