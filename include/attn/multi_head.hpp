/// Attention of all heads of a batch, grouped-query heads included.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/head_inputs.hpp>
#include <attn/heads.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace attn {

/// Where multi_head_backward writes; overwritten. Must not overlap one another or the inputs.
template <class T>
struct HeadGradients {
  HeadsView<T> dq;  ///< (batch, H_q, n_q, d)
  HeadsView<T> dk;  ///< (batch, H_k, n_k, d)
  HeadsView<T> dv;  ///< (batch, H_k, n_k, d_v)
};

namespace detail {

inline constexpr std::string_view kMultiHeadName = "multi_head";

template <class T>
void check_view(const char* name, const HeadsView<T>& x) {
  if (x.batch < 0 || x.heads < 1 || x.length < 1 || x.dim < 1) {
    refuse(kMultiHeadName, "%s is %td x %td x %td x %td (batch, heads, length, dim), should be at least 0 x 1 x 1 x 1",
           name, x.batch, x.heads, x.length, x.dim);
  }
  if (x.row_stride < x.dim && x.length > 1) {
    refuse(kMultiHeadName, "%s.row_stride is %td, should be at least its dim of %td", name, x.row_stride, x.dim);
  }
}

/// All heads of all batch items.
template <class T>
Memory memory_of(const char* name, const HeadsView<T>& x) {
  constexpr Index kBytes = sizeof(T);
  return {name,
          x.data,
          x.dim * kBytes,
          {{{x.length, x.row_stride * kBytes}, {x.heads, x.head_stride * kBytes}, {x.batch, x.batch_stride * kBytes}}}};
}

/// Results must not share elements.
template <class T>
void check_disjoint(const char* name, const HeadsView<T>& x) {
  if (!memory_of(name, x).overlaps_itself()) return;
  refuse(kMultiHeadName, "%s overlaps itself: its batch_stride is %td, its head_stride %td, its row_stride %td", name,
         x.batch_stride, x.head_stride, x.row_stride);
}

inline void check_count(const char* name, Index count, const char* of, Index wanted) {
  if (count != wanted) refuse(kMultiHeadName, "%s is %td, %s is %td", name, count, of, wanted);
}

/// offsets ascend from 0 or more to length or less.
inline void check_offsets(const char* name, std::span<const Index> offsets, Index length) {
  Index before = 0;
  for (std::size_t i = 0; i < offsets.size(); before = offsets[i++]) {
    if (offsets[i] >= before && offsets[i] <= length) continue;
    refuse(kMultiHeadName, "%s[%zu] is %td, should be at least %td and at most %td", name, i, offsets[i], before,
           length);
  }
}

/// Lengths and offsets are within the arrays.
template <class T, class Cache>
void check_items(const HeadItems<T, Cache>& in) {
  if (in.query_offsets.size() != in.key_offsets.size()) {
    refuse(kMultiHeadName, "query_offsets has %zu entries, key_offsets has %zu", in.query_offsets.size(),
           in.key_offsets.size());
  }
  if (in.packed() && (in.q.batch != 1 || !in.lengths.empty())) {
    refuse(kMultiHeadName, "packed sequences have a batch of %td and %zu lengths, should have one item and none",
           in.q.batch, in.lengths.size());
  }
  check_offsets("query_offsets", in.query_offsets, in.q.length);
  check_offsets("key_offsets", in.key_offsets, in.k.length);
  if (!in.lengths.empty() && static_cast<Index>(in.lengths.size()) != in.q.batch) {
    refuse(kMultiHeadName, "lengths has %zu entries, there are %td batch items", in.lengths.size(), in.q.batch);
  }
  for (std::size_t b = 0; b < in.lengths.size(); ++b) {
    const auto [queries, keys] = in.lengths[b];
    if (queries >= 0 && queries <= in.q.length && keys >= 0 && keys <= in.k.length) continue;
    refuse(kMultiHeadName, "lengths[%zu] is %td queries and %td keys, should be at least 0 and at most %td and %td", b,
           queries, keys, in.q.length, in.k.length);
  }
}

/// The number of masks and slopes, and the shapes of one head with each of them.
template <class T, class Cache>
void check_masks(const HeadItems<T, Cache>& in) {
  if (in.masks.size() > 1 && static_cast<Index>(in.masks.size()) != in.count()) {
    refuse(kMultiHeadName, "masks has %zu entries, should have none, one, or one for each of the %td batch items",
           in.masks.size(), in.count());
  }
  if (!in.alibi_slopes.empty() && static_cast<Index>(in.alibi_slopes.size()) != in.q.heads) {
    refuse(kMultiHeadName, "alibi_slopes has %zu entries, there are %td query heads", in.alibi_slopes.size(),
           in.q.heads);
  }
  for (const Mask& mask : in.masks) {
    check_length(kMultiHeadName, "keep_key", mask.keep_key.size(), "k", in.k.length);
    check_length(kMultiHeadName, "keep_query", mask.keep_query.size(), "q", in.q.length);
  }
  for (Index b = 0; b < in.different_items(); ++b) {
    const auto first = in(b, 0);
    if (first.q.rows() == 0 || first.k.rows() == 0) continue;
    check_inputs(kMultiHeadName, first);
    for (const double slope : in.alibi_slopes) check_positions(kMultiHeadName, first.mask, slope);
  }
}

/// All that can be checked without the method.
template <class T, class Cache>
void check_heads(const HeadItems<T, Cache>& in, const HeadsView<const T>& out) {
  check_view("q", in.q);
  check_view("k", in.k);
  check_view("v", in.v);
  check_view("out", out);
  check_count("k.batch", in.k.batch, "q.batch", in.q.batch);
  check_count("v.batch", in.v.batch, "q.batch", in.q.batch);
  check_count("out.batch", out.batch, "q.batch", in.q.batch);
  check_count("v.heads", in.v.heads, "k.heads", in.k.heads);
  check_count("out.heads", out.heads, "q.heads", in.q.heads);
  if (in.q.heads % in.k.heads != 0) {
    refuse(kMultiHeadName, "q has %td heads, k has %td, which do not divide them", in.q.heads, in.k.heads);
  }
  check_inputs(kMultiHeadName, typename HeadItems<T, Cache>::Item{in.q(0, 0), in.k(0, 0), in.v(0, 0)});
  check_shape(kMultiHeadName, "out", out(0, 0), in.q.length, in.v.dim);
  check_items(in);
  check_masks(in);
}

/// No head of a result shares memory with one of an input, or of another result, or with a mask.
template <class T, class Cache>
void check_heads_apart(const Memories& results, const HeadItems<T, Cache>& in) {
  constexpr Index kBytes = sizeof(T);
  const auto& [bias, batch_stride, head_stride] = in.key_bias;
  const Index biases = bias == nullptr ? 0 : in.k.length;
  const Memory inputs[] = {memory_of("q", in.q), memory_of("k", in.k), memory_of("v", in.v),
                           Memory("key_bias", bias, biases * kBytes,
                                  {{{in.q.heads, head_stride * kBytes}, {in.q.batch, batch_stride * kBytes}}})};
  check_apart(kMultiHeadName, results, inputs);
  for (const Mask& mask : in.masks) {
    const Memory keeps[] = {Memory::of("keep_key", mask.keep_key), Memory::of("keep_query", mask.keep_query)};
    check_apart_from(kMultiHeadName, results, keeps);
  }
}

/// x is like y.
template <class T>
void check_like(const char* name, const HeadsView<const T>& x, const char* of, const HeadsView<const T>& y) {
  check_view(name, x);
  if (x.batch == y.batch && x.heads == y.heads && x.length == y.length && x.dim == y.dim) return;
  refuse(kMultiHeadName, "%s is %td x %td x %td x %td, %s is %td x %td x %td x %td", name, x.batch, x.heads, x.length,
         x.dim, of, y.batch, y.heads, y.length, y.dim);
}

template <class T>
void check_gradients(const HeadItems<T>& in, const HeadsView<const T>& out, const HeadsView<const T>& dout,
                     const HeadGradients<T>& gradients) {
  const auto memory = [](const char* name, const HeadsView<T>& gradient, const char* of, const HeadsView<const T>& x) {
    check_like<T>(name, gradient, of, x);
    check_disjoint(name, gradient);
    return memory_of(name, gradient);
  };
  check_like<T>("dout", dout, "out", out);
  const Memory results[] = {memory("dq", gradients.dq, "q", in.q), memory("dk", gradients.dk, "k", in.k),
                            memory("dv", gradients.dv, "v", in.v)};
  const Memory of_forward[] = {memory_of("out", out), memory_of("dout", dout)};
  check_heads_apart(results, in);
  check_apart_from(kMultiHeadName, results, of_forward);
}

template <Approximator A>
bool supports(const A& a, const Inputs<typename A::Scalar>& in) {
  return a.supports(in);
}
/// Methods that take caches take them with every mask.
template <Approximator A, NarrowScalar Cache>
bool supports(const A&, const CacheInputs<Cache>&) {
  return true;
}

/// Refuses what forward would refuse amid the batch.
template <Approximator A, class Cache>
void check_supported(const A& a, const HeadItems<typename A::Scalar, Cache>& heads) {
  for (Index b = 0; b < heads.different_items(); ++b) {
    const auto in = heads(b, 0);
    if (sees_nothing(in) || supports(a, in)) continue;
    const std::string_view name = method_name(a);
    refuse(kMultiHeadName, "%.*s does not support batch item %td: %td queries, %td keys%s%s%s%s%s%s",
           static_cast<int>(name.size()), name.data(), b, in.q.rows(), in.k.rows(),
           in.mask.causal == Causal::none ? "" : ", causal", in.mask.window == 0 ? "" : ", window",
           in.mask.keep_key.empty() ? "" : ", keep_key", in.mask.keep_query.empty() ? "" : ", keep_query",
           in.key_bias.empty() ? "" : ", key_bias", in.alibi_slope == 0 ? "" : ", alibi_slopes");
  }
}

/// body(i, context) for every i in [0, n): independent problems of about so many multiply-adds each, whose results must
/// not depend on the context. As many as go evenly over the workers run whole, each on one worker; those left over
/// follow one after another, with all workers inside each. Problems too small to be shared all run whole, and where all
/// together are too small, on the calling thread. What body throws arrives there too.
template <class Body>
void for_each_problem(Index n, Index multiply_adds, Context& context, const Body& body) {
  constexpr Index kWorthWaking = 2 << 20, kWorthSharing = 4 << 20;  // multiply-adds: of all, of one
  constexpr Index kTasksAWorker = 32;                               // many, so that workers end together
  const Index workers = context.workers();
  const Index whole = workers == 1 || multiply_adds < kWorthSharing ? n : n / workers * workers;
  const Index tasks = n * multiply_adds < kWorthWaking ? 1 : std::min(whole, workers * kTasksAWorker);
  context.for_each_call(tasks, [&](Index task, Context& of_worker) {
    const Range range = nth_part(whole, tasks, task);
    for (Index i = range.first; i < range.last; ++i) body(i, of_worker);
  });
  for (Index i = whole; i < n; ++i) body(i, context);
}

/// for_each_problem of problems of about cost(i) multiply-adds each. The largest come first, so that workers end
/// together; one that is more than a worker's share of what is left is cut up by all.
template <class Cost, class Body>
void for_each_unlike_problem(Index n, const Cost& cost, Context& context, const Body& body) {
  constexpr Index kWorthSharing = 4 << 20;
  Scratch scratch = context.scratch();
  Index* const order = scratch.elements<Index>(n);
  Index left = 0, first = 0;
  for (Index i = 0; i < n; ++i) order[i] = i, left += cost(i);
  sort_elements(order, n, [&](Index a, Index b) { return cost(a) != cost(b) ? cost(a) > cost(b) : a < b; });
  const Index workers = context.workers();
  for (; workers > 1 && first < n; left -= cost(order[first++])) {
    const Index largest = cost(order[first]);
    if (largest < kWorthSharing || largest <= left / workers) break;
    body(order[first], context);
  }
  context.for_each_call(n - first, [&](Index item, Context& of_worker) { body(order[first + item], of_worker); });
}

/// Multiply-adds of the exact scores and sums of one head with so many queries and keys: few queries take as long as
/// 16.
template <class T, class Cache>
Index multiply_adds(const HeadItems<T, Cache>& in, Range queries, Range keys) {
  constexpr Index kFewQueries = 16;
  return std::max(queries.last - queries.first, kFewQueries) * (keys.last - keys.first) * (in.k.dim + in.v.dim);
}

/// body(b, h, context) for every item b and every h in [0, heads), each of about factor heads' multiply-adds.
template <class T, class Cache, class Body>
void for_each_head(const HeadItems<T, Cache>& in, Index heads, Index factor, Context& context, const Body& body) {
  const Index n = in.count() * heads;
  const auto run = [&](Index i, Context& on) { body(i / heads, i % heads, on); };
  if (in.uniform()) {
    for_each_problem(n, factor * multiply_adds(in, {0, in.q.length}, {0, in.k.length}), context, run);
  } else {
    const auto cost = [&](Index i) { return factor * multiply_adds(in, in.queries(i / heads), in.keys(i / heads)); };
    for_each_unlike_problem(n, cost, context, run);
  }
}

/// x's rows of head h that are padding of item b <- 0, where that has rows up to length.
template <class T, class Cache, class U>
void clear_padding(const HeadItems<T, Cache>& in, const HeadsView<U>& x, Index b, Index h, Index length) {
  if (!in.lengths.empty() && length < x.length) set_zero(in.head(x, b, h, {length, x.length}));
}

/// One of A's saved for each head.
template <class S, class A>
concept SavedHeadsOf = std::same_as<S, std::vector<typename A::Saved>>;

/// All that is refused before anything is written.
template <Approximator A, class Cache>
void check_call(const A& a, const HeadItems<typename A::Scalar, Cache>& inputs,
                const HeadsView<typename A::Scalar>& out) {
  check_heads<typename A::Scalar>(inputs, out);
  check_disjoint("out", out);
  const Memory result = memory_of("out", out);
  check_heads_apart<typename A::Scalar>({&result, 1}, inputs);
  if (inputs.count() > 0) check_supported(a, inputs);
}

/// forward(b, h, inputs, out, context) for every query head h of every item b that has queries and keys.
template <class T, class Cache, class Forward>
void run_heads(const HeadItems<T, Cache>& inputs, const HeadsView<T>& out, Context& context, const Forward& forward) {
  for_each_head(inputs, inputs.q.heads, 1, context, [&](Index b, Index h, Context& on) {
    const auto in = inputs(b, h);
    const MatrixRef<T> to = inputs.of_queries(out, b, h);
    sees_nothing(in) ? set_zero(to) : forward(b, h, in, to, on);
    clear_padding(inputs, out, b, h, to.rows());
  });
}

/// a.most_shared_queries(d): up to so many queries, of query heads that share a key head, take less time as rows of one
/// product, and get bitwise what they would get head by head.
template <class A>
concept SharesReading = Approximator<A> && requires(const A& a, Index d) {
  { a.most_shared_queries(d) } -> std::same_as<Index>;
};

/// a.prepares_keys(n_q, n_k): query heads that share a key head take less time together, however many they are, for
/// what is known of the keys alone is computed once, and get bitwise what they would get head by head.
template <class A>
concept PreparesKeys = Approximator<A> && requires(const A& a, Index n) {
  { a.prepares_keys(n, n) } -> std::same_as<bool>;
};

template <class A>
concept SharesKeys = SharesReading<A> || PreparesKeys<A>;

/// Query heads that are computed together: where keys are prepared, no more than leave every worker a problem.
template <Approximator A, class Cache>
Index heads_at_once(const A& a, const HeadItems<typename A::Scalar, Cache>& in, Index workers) {
  const Index group = in.q.heads / in.k.heads;
  if (in.heads_differ()) return 1;
  if constexpr (PreparesKeys<A>) {
    const Index key_heads = std::max<Index>(1, in.count() * in.k.heads), parts = (workers + key_heads - 1) / key_heads;
    return a.prepares_keys(in.q.length, in.k.length) ? std::max<Index>(1, group / parts) : 1;
  } else if constexpr (SharesReading<A>) {
    return std::clamp<Index>(a.most_shared_queries(in.q.dim) / in.q.length, 1, group);
  }
  return 1;
}

/// The queries of heads [first, last) of item b one after another, copied.
template <class T, class Cache>
MatrixRef<T> stacked_queries(const HeadItems<T, Cache>& in, Index b, Range heads, Scratch& scratch) {
  const Range queries = in.queries(b);
  const Index n_q = queries.last - queries.first;
  MatrixRef<T> rows = scratch.matrix<T>((heads.last - heads.first) * n_q, in.q.dim);
  for (Index h = heads.first; h < heads.last; ++h) {
    const ConstMatrixRef<T> q = in.of_queries(in.q, b, h);
    for (Index i = 0; i < n_q; ++i) std::copy_n(row_of(q, i), in.q.dim, row_of(rows, (h - heads.first) * n_q + i));
  }
  return rows;
}

/// A mask of queries, repeated for so many heads.
inline std::span<const std::uint8_t> repeated(std::span<const std::uint8_t> keep, Index heads, Scratch& scratch) {
  const std::span<std::uint8_t> all = scratch.array<std::uint8_t>(heads * static_cast<Index>(keep.size()));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = keep[i % keep.size()];
  return all;
}

/// Query heads [first, last) of batch item b, which share a key head, as rows of one product.
template <SharesKeys A, class Cache>
void run_heads_together(const A& a, const HeadItems<typename A::Scalar, Cache>& inputs,
                        const HeadsView<typename A::Scalar>& out, Index b, Range heads, Context& context) {
  using T = typename A::Scalar;
  const auto& method = wide_method(a);
  Scratch scratch = context.scratch();
  auto in = inputs(b, heads.first);
  const Index count = heads.last - heads.first, n_q = in.q.rows();
  const MatrixRef<T> q = stacked_queries(inputs, b, heads, scratch);
  in.mask.keep_query = repeated(in.mask.keep_query, count, scratch);
  auto from = arithmetic_sources(decltype(in){q, in.k, in.v, in.mask, in.key_bias}, scratch);
  from.heads = count;
  method.check(from);
  const MatrixRef<T> results = scratch.matrix<T>(count * n_q, out.dim);
  method.attend(from, ResultRows<Arithmetic<T>>(results), context, nullptr);
  for (Index h = 0; h < count; ++h) {
    const MatrixRef<T> to = inputs.of_queries(out, b, heads.first + h);
    for (Index i = 0; i < n_q; ++i) std::copy_n(row_of(results, h * n_q + i), out.dim, row_of(to, i));
  }
}

/// Some query heads of each key head at a time.
template <Approximator A, class Cache>
void run_groups(const A& a, const HeadItems<typename A::Scalar, Cache>& inputs,
                const HeadsView<typename A::Scalar>& out, Index at_once, Context& context) {
  if constexpr (SharesKeys<A>) {
    const Index group = inputs.q.heads / inputs.k.heads, parts = (group + at_once - 1) / at_once;
    for_each_head(inputs, inputs.k.heads * parts, 1, context, [&](Index b, Index i, Context& on) {
      const Index first = i / parts * group;
      const Range part = nth_part(group, parts, i % parts), heads{first + part.first, first + part.last};
      const bool empty = sees_nothing(inputs(b, first));
      if (!empty) run_heads_together(a, inputs, out, b, heads, on);
      for (Index h = heads.first; h < heads.last; ++h) {
        const MatrixRef<typename A::Scalar> to = inputs.of_queries(out, b, h);
        if (empty) set_zero(to);
        clear_padding(inputs, out, b, h, to.rows());
      }
    });
  }
}

/// The backward pass of the query heads of batch item b that share a key head, from head first on, each with its saved:
/// dk and dv add up in their order, in the type of the arithmetic.
template <Approximator A>
void run_group_backward(const A& a, const HeadItems<typename A::Scalar>& inputs,
                        const HeadsView<const typename A::Scalar>& out, const HeadsView<const typename A::Scalar>& dout,
                        Index b, Index first, const typename A::Saved* saved,
                        const HeadGradients<typename A::Scalar>& gradients, Context& context) {
  using T = typename A::Scalar;
  using Wide = Arithmetic<T>;
  const Index group = inputs.q.heads / inputs.k.heads;
  const auto& method = wide_method(a);
  Scratch scratch = context.scratch();
  const Inputs<T> in = inputs(b, first);
  const ConstMatrixRef<Wide> k = in_type<Wide>(in.k, scratch, context), v = in_type<Wide>(in.v, scratch, context);
  const MatrixRef<T> dk = inputs.of_keys(gradients.dk, b, first / group),
                     dv = inputs.of_keys(gradients.dv, b, first / group);
  MatrixRef<Wide> sum_dk = result_in_type<Wide>(dk, scratch), sum_dv = result_in_type<Wide>(dv, scratch);
  const Index more = group > 1 ? dk.rows() : 0;
  MatrixRef<Wide> more_dk = scratch.matrix<Wide>(more, dk.cols()), more_dv = scratch.matrix<Wide>(more, dv.cols());
  for (Index h = first; h < first + group; ++h, ++saved) {
    Scratch of_head = scratch.nested();
    const Inputs<T> from = inputs(b, h);
    const MatrixRef<T> dq = inputs.of_queries(gradients.dq, b, h);
    const Gradients<Wide> to{result_in_type<Wide>(dq, of_head), h == first ? sum_dk : more_dk,
                             h == first ? sum_dv : more_dv};
    const ConstMatrixRef<Wide> q = in_type<Wide>(from.q, of_head, context);
    method.backward({q, k, v, from.mask, in_type<Wide>(from.key_bias, of_head), from.alibi_slope},
                    in_type<Wide>(inputs.of_queries(out, b, h), of_head, context),
                    in_type<Wide>(inputs.of_queries(dout, b, h), of_head, context), *saved, to, context);
    set_converted(dq, to.dq, context);
    if (h == first) continue;
    sum_dk += more_dk;
    sum_dv += more_dv;
  }
  set_converted(dk, sum_dk, context);
  set_converted(dv, sum_dv, context);
}

/// Zero gradients of what run_group_backward leaves out: all of an item without queries or keys, and padding.
template <class T>
void clear_gradients(const HeadItems<T>& inputs, const HeadGradients<T>& gradients, Index b, Index kv, bool empty) {
  const Index group = inputs.q.heads / inputs.k.heads;
  const auto clear = [&](const HeadsView<T>& x, Index h, const MatrixRef<T>& of_item) {
    if (empty) set_zero(of_item);
    clear_padding(inputs, x, b, h, of_item.rows());
  };
  for (Index h = kv * group; h < (kv + 1) * group; ++h) clear(gradients.dq, h, inputs.of_queries(gradients.dq, b, h));
  clear(gradients.dk, kv, inputs.of_keys(gradients.dk, b, kv));
  clear(gradients.dv, kv, inputs.of_keys(gradients.dv, b, kv));
}

/// Methods that give the log-sums of their rows: a.forward(inputs, out, lse, context).
template <class A>
concept GivesLogSums =
    Approximator<A> &&
    requires(const A& a, const Inputs<typename A::Scalar>& in, MatrixRef<typename A::Scalar> out,
             std::span<Arithmetic<typename A::Scalar>> lse, Context& context) { a.forward(in, out, lse, context); };

/// lse is (batch, H_q, n_q), the entries of a head side by side.
template <class T, class Cache, class LogSum>
void check_log_sums(const HeadItems<T, Cache>& in, const HeadsView<T>& out, const HeadsView<LogSum>& lse) {
  check_view("lse", lse);
  if (lse.batch != in.q.batch || lse.heads != in.q.heads || lse.length != in.q.length || lse.dim != 1 ||
      lse.row_stride != 1) {
    refuse(kMultiHeadName, "lse is %td x %td x %td x %td with rows %td apart, should be %td x %td x %td x 1, 1 apart",
           lse.batch, lse.heads, lse.length, lse.dim, lse.row_stride, in.q.batch, in.q.heads, in.q.length);
  }
  check_disjoint("lse", lse);
  const Memory results[] = {memory_of("lse", lse)}, other[] = {memory_of("out", out)};
  check_heads_apart(results, in);
  check_apart_from(kMultiHeadName, results, other);
}

}  // namespace detail

/// out <- attention of every head by method a. Query head h reads key and value head h / (H_q / H_k), so H_k must
/// divide H_q (grouped queries; H_k = 1: multi-query).
///   q (batch, H_q, n_q, d)   k (batch, H_k, n_k, d)   v (batch, H_k, n_k, d_v)   out (batch, H_q, n_q, d_v)
/// An empty batch is allowed, and nothing is done; rows of an item without keys are 0. Rows of packed arrays that are
/// of no sequence stay as they are. Results are bitwise those of a.forward, head by head, whatever the executor; few
/// queries of an exact method read the keys that their heads share once, and multipole attention clusters them once.
/// Scratch memory: that of a, once a worker.
/// Throws std::invalid_argument before anything is written when shapes disagree or are empty, any head of out overlaps
/// another or any input, or a does not support a mask or the shapes. What a.forward throws beyond that arrives on the
/// calling thread, with out partly written.
template <Approximator A, class Cache = typename A::Scalar>
void multi_head(const A& a, const HeadInputs<typename A::Scalar, Cache>& in, const HeadsView<typename A::Scalar>& out,
                Context& context) {
  const detail::HeadItems<typename A::Scalar, Cache> inputs{in};
  detail::check_call(a, inputs, out);
  const Index at_once = detail::heads_at_once(a, inputs, context.workers());
  if (at_once > 1) return detail::run_groups(a, inputs, out, at_once, context);
  detail::run_heads(inputs, out, context,
                    [&](Index, Index, const auto& from, const auto& to, Context& on) { a.forward(from, to, on); });
}

/// The same for training: saved becomes one A::Saved for each query head of each batch item, b heads + h, made at the
/// first step.
template <Approximator A>
void multi_head(const A& a, const HeadInputs<typename A::Scalar>& in, const HeadsView<typename A::Scalar>& out,
                Context& context, std::vector<typename A::Saved>& saved) {
  const detail::HeadItems<typename A::Scalar> inputs{in};
  detail::check_call(a, inputs, out);
  saved.resize(static_cast<std::size_t>(inputs.count() * in.q.heads));
  for (Index b = 0; b < inputs.count(); ++b) {  // items that are left out keep nothing of an earlier call
    if (!detail::sees_nothing(inputs(b, 0))) continue;
    for (Index h = 0; h < in.q.heads; ++h) saved[static_cast<std::size_t>(b * in.q.heads + h)] = typename A::Saved();
  }
  detail::run_heads(inputs, out, context, [&](Index b, Index h, const auto& from, const auto& to, Context& on) {
    a.forward(from, to, on, saved[static_cast<std::size_t>(b * in.q.heads + h)]);
  });
}

/// The same for an exact method, and lse (batch, H_q, n_q, 1) <- log sum_j kappa_ij of every row, -infinity for one
/// that sees no key, of narrow types in float. The entries of a head lie side by side: row_stride is 1.
template <detail::GivesLogSums A, class Cache = typename A::Scalar>
void multi_head(const A& a, const HeadInputs<typename A::Scalar, Cache>& in, const HeadsView<typename A::Scalar>& out,
                const HeadsView<detail::Arithmetic<typename A::Scalar>>& lse, Context& context) {
  using LogSum = detail::Arithmetic<typename A::Scalar>;
  const detail::HeadItems<typename A::Scalar, Cache> inputs{in};
  detail::check_call(a, inputs, out);
  detail::check_log_sums(inputs, out, lse);
  for (Index b = 0; b < lse.batch; ++b) {
    for (Index h = 0; h < lse.heads && !inputs.uniform(); ++h) {
      std::fill_n(lse(b, h).data(), lse.length, -std::numeric_limits<LogSum>::infinity());
    }
  }
  detail::run_heads(inputs, out, context, [&](Index b, Index h, const auto& from, const auto& to, Context& on) {
    a.forward(from, to, std::span<LogSum>(inputs.of_queries(lse, b, h).data(), static_cast<std::size_t>(to.rows())),
              on);
  });
}

/// multi_head of whole arrays. masks: none, one for all batch items, or one for each.
template <Approximator A>
void multi_head(const A& a, const HeadsView<const typename A::Scalar>& q, const HeadsView<const typename A::Scalar>& k,
                const HeadsView<const typename A::Scalar>& v, const HeadsView<typename A::Scalar>& out,
                std::span<const Mask> masks, Context& context) {
  multi_head(a, HeadInputs<typename A::Scalar>{q, k, v, masks}, out, context);
}

/// The same for training.
template <Approximator A>
void multi_head(const A& a, const HeadsView<const typename A::Scalar>& q, const HeadsView<const typename A::Scalar>& k,
                const HeadsView<const typename A::Scalar>& v, const HeadsView<typename A::Scalar>& out,
                std::span<const Mask> masks, Context& context, std::vector<typename A::Saved>& saved) {
  multi_head(a, HeadInputs<typename A::Scalar>{q, k, v, masks}, out, context, saved);
}

/// @{ Without a mask, with one for all batch items, and with a list in braces; saved: of a training step, or nothing.
template <Approximator A, detail::SavedHeadsOf<A>... Training>
void multi_head(const A& a, const HeadsView<const typename A::Scalar>& q, const HeadsView<const typename A::Scalar>& k,
                const HeadsView<const typename A::Scalar>& v, const HeadsView<typename A::Scalar>& out,
                Context& context, Training&... saved) {
  multi_head(a, q, k, v, out, std::span<const Mask>{}, context, saved...);
}

template <Approximator A, detail::SavedHeadsOf<A>... Training>
void multi_head(const A& a, const HeadsView<const typename A::Scalar>& q, const HeadsView<const typename A::Scalar>& k,
                const HeadsView<const typename A::Scalar>& v, const HeadsView<typename A::Scalar>& out,
                const Mask& mask, Context& context, Training&... saved) {
  multi_head(a, q, k, v, out, std::span<const Mask>(&mask, 1), context, saved...);
}

template <Approximator A, detail::SavedHeadsOf<A>... Training>
void multi_head(const A& a, const HeadsView<const typename A::Scalar>& q, const HeadsView<const typename A::Scalar>& k,
                const HeadsView<const typename A::Scalar>& v, const HeadsView<typename A::Scalar>& out,
                std::initializer_list<Mask> masks, Context& context, Training&... saved) {
  multi_head(a, q, k, v, out, std::span<const Mask>(masks.begin(), masks.size()), context, saved...);
}
/// @}

/// gradients <- those of a loss by q, k and v, given its gradient dout (batch, H_q, n_q, d_v) by out, for the same
/// inputs and the out and saved of multi_head. Query heads that share a key head add up in their order, of narrow types
/// in float. Throws std::invalid_argument before anything is written when shapes disagree, saved is of another number
/// of heads, or any head of a gradient overlaps any other array or head. What a.backward throws beyond that, where a
/// head's saved is not of its inputs, arrives on the calling thread, with gradients partly written.
template <Approximator A>
void multi_head_backward(const A& a, const HeadInputs<typename A::Scalar>& in,
                         const HeadsView<const typename A::Scalar>& out,
                         const HeadsView<const typename A::Scalar>& dout, const std::vector<typename A::Saved>& saved,
                         const HeadGradients<typename A::Scalar>& gradients, Context& context) {
  using T = typename A::Scalar;
  const detail::HeadItems<T> inputs{in};
  detail::check_heads<T>(inputs, out);
  detail::check_gradients<T>(inputs, out, dout, gradients);
  const Index heads = inputs.count() * in.q.heads, group = in.q.heads / in.k.heads;
  if (static_cast<Index>(saved.size()) != heads) {
    detail::refuse(detail::kMultiHeadName, "saved is of %zu heads, there are %td", saved.size(), heads);
  }
  if (heads == 0) return;
  detail::for_each_head(inputs, in.k.heads, 3 * group, context, [&](Index b, Index kv, Context& on) {
    const bool empty = detail::sees_nothing(inputs(b, kv * group));
    const typename A::Saved* const of_group = saved.data() + b * in.q.heads + kv * group;
    if (!empty) detail::run_group_backward(a, inputs, out, dout, b, kv * group, of_group, gradients, on);
    detail::clear_gradients(inputs, gradients, b, kv, empty);
  });
}

/// multi_head_backward of whole arrays.
template <Approximator A>
void multi_head_backward(const A& a, const HeadsView<const typename A::Scalar>& q,
                         const HeadsView<const typename A::Scalar>& k, const HeadsView<const typename A::Scalar>& v,
                         const HeadsView<const typename A::Scalar>& out,
                         const HeadsView<const typename A::Scalar>& dout, std::span<const Mask> masks,
                         const std::vector<typename A::Saved>& saved,
                         const HeadGradients<typename A::Scalar>& gradients, Context& context) {
  multi_head_backward(a, HeadInputs<typename A::Scalar>{q, k, v, masks}, out, dout, saved, gradients, context);
}

/// @{ The same without a mask, with one for all batch items, and with a list in braces.
template <Approximator A>
void multi_head_backward(const A& a, const HeadsView<const typename A::Scalar>& q,
                         const HeadsView<const typename A::Scalar>& k, const HeadsView<const typename A::Scalar>& v,
                         const HeadsView<const typename A::Scalar>& out,
                         const HeadsView<const typename A::Scalar>& dout, const std::vector<typename A::Saved>& saved,
                         const HeadGradients<typename A::Scalar>& gradients, Context& context) {
  multi_head_backward(a, q, k, v, out, dout, std::span<const Mask>{}, saved, gradients, context);
}

template <Approximator A>
void multi_head_backward(const A& a, const HeadsView<const typename A::Scalar>& q,
                         const HeadsView<const typename A::Scalar>& k, const HeadsView<const typename A::Scalar>& v,
                         const HeadsView<const typename A::Scalar>& out,
                         const HeadsView<const typename A::Scalar>& dout, const Mask& mask,
                         const std::vector<typename A::Saved>& saved,
                         const HeadGradients<typename A::Scalar>& gradients, Context& context) {
  multi_head_backward(a, q, k, v, out, dout, std::span<const Mask>(&mask, 1), saved, gradients, context);
}

template <Approximator A>
void multi_head_backward(const A& a, const HeadsView<const typename A::Scalar>& q,
                         const HeadsView<const typename A::Scalar>& k, const HeadsView<const typename A::Scalar>& v,
                         const HeadsView<const typename A::Scalar>& out,
                         const HeadsView<const typename A::Scalar>& dout, std::initializer_list<Mask> masks,
                         const std::vector<typename A::Saved>& saved,
                         const HeadGradients<typename A::Scalar>& gradients, Context& context) {
  multi_head_backward(a, q, k, v, out, dout, std::span<const Mask>(masks.begin(), masks.size()), saved, gradients,
                      context);
}
/// @}

}  // namespace attn
