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
#include <attn/heads.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
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

/// What the heads of one call read.
template <class T>
struct HeadInputs {
  const HeadsView<const T>&q, &k, &v;
  std::span<const Mask> masks;

  /// Those of query head h of batch item b, with the key and value head of its group.
  Inputs<T> operator()(Index b, Index h) const {
    const Index kv = h / (q.heads / k.heads);
    return {q(b, h), k(b, kv), v(b, kv), mask(b)};
  }

  Mask mask(Index b) const {
    if (masks.empty()) return {};
    return masks.size() == 1 ? masks.front() : masks[static_cast<std::size_t>(b)];
  }

  /// As many batch items as it takes to see every mask; their shapes are the same.
  Index different_items() const { return std::max<Index>(1, static_cast<Index>(masks.size())); }
};

template <class T>
void check_view(const char* name, const HeadsView<T>& x) {
  if (x.batch < 0 || x.heads < 1 || x.length < 1 || x.dim < 1) {
    refuse(kMultiHeadName, "%s is %td x %td x %td x %td (batch, heads, length, dim), should be at least 0 x 1 x 1 x 1",
           name, x.batch, x.heads, x.length, x.dim);
  }
  if (x.row_stride < x.dim) {
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

/// The number of masks, and the shapes of one head with each of them.
template <class T>
void check_masks(const HeadInputs<T>& in, const HeadsView<const T>& out) {
  if (in.masks.size() > 1 && static_cast<Index>(in.masks.size()) != in.q.batch) {
    refuse(kMultiHeadName, "masks has %zu entries, should have none, one, or one for each of the %td batch items",
           in.masks.size(), in.q.batch);
  }
  for (Index b = 0; b < in.different_items(); ++b) {
    check_inputs(kMultiHeadName, in(b, 0));
    check_shape(kMultiHeadName, "out", out(b, 0), in.q.length, in.v.dim);
  }
}

/// All that can be checked without the method.
template <class T>
void check_heads(const HeadInputs<T>& in, const HeadsView<const T>& out) {
  for (const auto& [name, x] : {std::pair{"q", in.q}, {"k", in.k}, {"v", in.v}, {"out", out}}) check_view(name, x);
  check_count("k.batch", in.k.batch, "q.batch", in.q.batch);
  check_count("v.batch", in.v.batch, "q.batch", in.q.batch);
  check_count("out.batch", out.batch, "q.batch", in.q.batch);
  check_count("v.heads", in.v.heads, "k.heads", in.k.heads);
  check_count("out.heads", out.heads, "q.heads", in.q.heads);
  if (in.q.heads % in.k.heads != 0) {
    refuse(kMultiHeadName, "q has %td heads, k has %td, which do not divide them", in.q.heads, in.k.heads);
  }
  check_masks(in, out);
}

/// No head of a result shares memory with one of an input, or of another result, or with a mask.
template <class T>
void check_heads_apart(const Memories& results, const HeadInputs<T>& in) {
  const Memory inputs[] = {memory_of("q", in.q), memory_of("k", in.k), memory_of("v", in.v)};
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
void check_gradients(const HeadInputs<T>& in, const HeadsView<const T>& out, const HeadsView<const T>& dout,
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

/// Refuses what forward would refuse amid the batch.
template <Approximator A>
void check_supported(const A& a, const HeadInputs<typename A::Scalar>& heads) {
  for (Index b = 0; b < heads.different_items(); ++b) {
    const Inputs<typename A::Scalar> in = heads(b, 0);
    if (a.supports(in)) continue;
    const std::string_view name = method_name(a);
    refuse(kMultiHeadName, "%.*s does not support batch item %td: %td queries, %td keys%s%s%s%s",
           static_cast<int>(name.size()), name.data(), b, in.q.rows(), in.k.rows(),
           in.mask.causal == Causal::none ? "" : ", causal", in.mask.window == 0 ? "" : ", window",
           in.mask.keep_key.empty() ? "" : ", keep_key", in.mask.keep_query.empty() ? "" : ", keep_query");
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

/// Of the exact scores and sums of one head: few queries take as long as 16.
template <class T>
Index multiply_adds(const HeadInputs<T>& in) {
  constexpr Index kFewQueries = 16;
  return std::max(in.q.length, kFewQueries) * in.k.length * (in.k.dim + in.v.dim);
}

/// One of A's saved for each head.
template <class S, class A>
concept SavedHeadsOf = std::same_as<S, std::vector<typename A::Saved>>;

/// All that is refused before anything is written.
template <Approximator A>
void check_call(const A& a, const HeadInputs<typename A::Scalar>& inputs, const HeadsView<typename A::Scalar>& out) {
  check_heads<typename A::Scalar>(inputs, out);
  check_disjoint("out", out);
  const Memory result = memory_of("out", out);
  check_heads_apart<typename A::Scalar>({&result, 1}, inputs);
  if (inputs.q.batch > 0) check_supported(a, inputs);
}

/// forward(i, inputs, out, context) for every query head i = b heads + h.
template <class T, class Forward>
void run_heads(const HeadInputs<T>& inputs, const HeadsView<T>& out, Context& context, const Forward& forward) {
  for_each_problem(inputs.q.batch * inputs.q.heads, multiply_adds(inputs), context, [&](Index i, Context& on) {
    const Index b = i / inputs.q.heads, h = i % inputs.q.heads;
    forward(i, inputs(b, h), out(b, h), on);
  });
}

/// a.most_shared_queries(d): up to so many queries, of query heads that share a key head, take less time as rows of one
/// product, and get bitwise what they would get head by head.
template <class A>
concept SharesKeys = Approximator<A> && requires(const A& a, Index d) {
  { a.most_shared_queries(d) } -> std::same_as<Index>;
};

/// Query heads that are computed together.
template <Approximator A>
Index heads_at_once(const A& a, const HeadInputs<typename A::Scalar>& in) {
  if constexpr (SharesKeys<A>) {
    return std::clamp<Index>(a.most_shared_queries(in.q.dim) / in.q.length, 1, in.q.heads / in.k.heads);
  }
  return 1;
}

/// The rows of x's heads [first, last) of item b one after another, copied.
template <class T>
MatrixRef<T> stacked_rows(const HeadsView<const T>& x, Index b, Range heads, Scratch& scratch) {
  MatrixRef<T> rows = scratch.matrix<T>((heads.last - heads.first) * x.length, x.dim);
  for (Index h = heads.first; h < heads.last; ++h) {
    for (Index i = 0; i < x.length; ++i) {
      std::copy_n(row_of(x(b, h), i), x.dim, row_of(rows, (h - heads.first) * x.length + i));
    }
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
template <SharesKeys A>
void run_heads_together(const A& a, const HeadInputs<typename A::Scalar>& inputs,
                        const HeadsView<typename A::Scalar>& out, Index b, Range heads, Context& context) {
  using T = typename A::Scalar;
  const auto& method = wide_method(a);
  Scratch scratch = context.scratch();
  const Index count = heads.last - heads.first, n_q = inputs.q.length;
  Inputs<T> in = inputs(b, heads.first);
  const MatrixRef<T> q = stacked_rows(inputs.q, b, heads, scratch);
  in.mask.keep_query = repeated(in.mask.keep_query, count, scratch);
  auto from = arithmetic_sources(Inputs<T>{q, in.k, in.v, in.mask}, scratch);
  from.heads = count;
  method.check(from);
  const MatrixRef<T> results = scratch.matrix<T>(count * n_q, out.dim);
  method.attend(from, ResultRows<Arithmetic<T>>(results), context, nullptr);
  for (Index i = 0; i < count * n_q; ++i) {
    std::copy_n(row_of(results, i), out.dim, row_of(out(b, heads.first + i / n_q), i % n_q));
  }
}

/// Some query heads of each key head at a time.
template <Approximator A>
void run_groups(const A& a, const HeadInputs<typename A::Scalar>& inputs, const HeadsView<typename A::Scalar>& out,
                Index at_once, Context& context) {
  if constexpr (SharesKeys<A>) {
    const Index group = inputs.q.heads / inputs.k.heads, parts = (group + at_once - 1) / at_once;
    const Index item = inputs.k.heads * parts;
    for_each_problem(inputs.q.batch * item, multiply_adds(inputs), context, [&](Index i, Context& on) {
      const Index first = i % item / parts * group;
      const Range part = nth_part(group, parts, i % parts);
      run_heads_together(a, inputs, out, i / item, {first + part.first, first + part.last}, on);
    });
  }
}

/// The backward pass of the query heads of batch item b that share a key head, from head first on, each with its saved:
/// dk and dv add up in their order, in the type of the arithmetic.
template <Approximator A>
void run_group_backward(const A& a, const HeadInputs<typename A::Scalar>& inputs,
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
  const MatrixRef<T> dk = gradients.dk(b, first / group), dv = gradients.dv(b, first / group);
  MatrixRef<Wide> sum_dk = result_in_type<Wide>(dk, scratch), sum_dv = result_in_type<Wide>(dv, scratch);
  const Index more = group > 1 ? dk.rows() : 0;
  MatrixRef<Wide> more_dk = scratch.matrix<Wide>(more, dk.cols()), more_dv = scratch.matrix<Wide>(more, dv.cols());
  for (Index h = first; h < first + group; ++h, ++saved) {
    Scratch of_head = scratch.nested();
    const MatrixRef<T> dq = gradients.dq(b, h);
    const Gradients<Wide> to{result_in_type<Wide>(dq, of_head), h == first ? sum_dk : more_dk,
                             h == first ? sum_dv : more_dv};
    const ConstMatrixRef<Wide> q = in_type<Wide>(inputs.q(b, h), of_head, context);
    method.backward({q, k, v, in.mask}, in_type<Wide>(out(b, h), of_head, context),
                    in_type<Wide>(dout(b, h), of_head, context), *saved, to, context);
    set_converted(dq, to.dq, context);
    if (h == first) continue;
    sum_dk += more_dk;
    sum_dv += more_dv;
  }
  set_converted(dk, sum_dk, context);
  set_converted(dv, sum_dv, context);
}

}  // namespace detail

/// out <- attention of every head by method a. Query head h reads key and value head h / (H_q / H_k), so H_k must
/// divide H_q (grouped queries; H_k = 1: multi-query). No key bias.
///   q (batch, H_q, n_q, d)   k (batch, H_k, n_k, d)   v (batch, H_k, n_k, d_v)   out (batch, H_q, n_q, d_v)
/// masks: none, one for all batch items, or one for each. An empty batch is allowed, and nothing is done. Results are
/// bitwise those of a.forward, head by head, whatever the executor; few queries of an exact method read the keys that
/// their heads share once. Scratch memory: that of a, once a worker. Throws
/// std::invalid_argument before anything is written when shapes disagree or are empty, any head of out overlaps another
/// or any input, or a does not support a mask or the shapes. What a.forward throws beyond that arrives on the calling
/// thread, with out partly written.
template <Approximator A>
void multi_head(const A& a, const HeadsView<const typename A::Scalar>& q, const HeadsView<const typename A::Scalar>& k,
                const HeadsView<const typename A::Scalar>& v, const HeadsView<typename A::Scalar>& out,
                std::span<const Mask> masks, Context& context) {
  const detail::HeadInputs<typename A::Scalar> inputs{q, k, v, masks};
  detail::check_call(a, inputs, out);
  const Index at_once = detail::heads_at_once(a, inputs);
  if (at_once > 1) return detail::run_groups(a, inputs, out, at_once, context);
  detail::run_heads(inputs, out, context,
                    [&](Index, const auto& in, const auto& to, Context& on) { a.forward(in, to, on); });
}

/// The same for training: saved becomes one A::Saved for each query head of each batch item, b heads + h, made at the
/// first step.
template <Approximator A>
void multi_head(const A& a, const HeadsView<const typename A::Scalar>& q, const HeadsView<const typename A::Scalar>& k,
                const HeadsView<const typename A::Scalar>& v, const HeadsView<typename A::Scalar>& out,
                std::span<const Mask> masks, Context& context, std::vector<typename A::Saved>& saved) {
  const detail::HeadInputs<typename A::Scalar> inputs{q, k, v, masks};
  detail::check_call(a, inputs, out);
  saved.resize(static_cast<std::size_t>(q.batch * q.heads));
  detail::run_heads(inputs, out, context, [&](Index i, const auto& in, const auto& to, Context& on) {
    a.forward(in, to, on, saved[static_cast<std::size_t>(i)]);
  });
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
/// arguments and the out and saved of multi_head. Query heads that share a key head add up in their order, of narrow
/// types in float. Throws std::invalid_argument before anything is written when shapes disagree, saved is of another
/// number of heads, or any head of a gradient overlaps any other array or head. What a.backward throws beyond that,
/// where a head's saved is not of its inputs, arrives on the calling thread, with gradients partly written.
template <Approximator A>
void multi_head_backward(const A& a, const HeadsView<const typename A::Scalar>& q,
                         const HeadsView<const typename A::Scalar>& k, const HeadsView<const typename A::Scalar>& v,
                         const HeadsView<const typename A::Scalar>& out,
                         const HeadsView<const typename A::Scalar>& dout, std::span<const Mask> masks,
                         const std::vector<typename A::Saved>& saved,
                         const HeadGradients<typename A::Scalar>& gradients, Context& context) {
  using T = typename A::Scalar;
  const detail::HeadInputs<T> inputs{q, k, v, masks};
  detail::check_heads<T>(inputs, out);
  detail::check_gradients<T>(inputs, out, dout, gradients);
  if (static_cast<Index>(saved.size()) != q.batch * q.heads) {
    detail::refuse(detail::kMultiHeadName, "saved is of %zu heads, there are %td", saved.size(), q.batch * q.heads);
  }
  if (q.batch == 0) return;
  const Index group = q.heads / k.heads;
  detail::for_each_problem(
      k.batch * k.heads, 3 * group * detail::multiply_adds(inputs), context, [&](Index i, Context& on) {
        const Index b = i / k.heads, first = i % k.heads * group;
        detail::run_group_backward(a, inputs, out, dout, b, first, saved.data() + b * q.heads + first, gradients, on);
      });
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
