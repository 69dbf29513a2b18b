/// Attention within an error: the cheapest setting that meets it, found on some of the queries.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/context.hpp>
#include <attn/detail/level_search.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/error_estimate.hpp>
#include <attn/exact.hpp>
#include <attn/kernel.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>
#include <attn/multipole.hpp>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

namespace attn {

/// A way to compute attention that Automatic chose.
struct Plan {
  bool exact = true;    ///< exact attention, or else multipole attention
  Clusters clusters{};  ///< of the latter

  /// Whether both are the same.
  friend bool operator==(const Plan&, const Plan&) = default;
};

/// What a call of Automatic did.
struct Choice {
  Plan plan{};               ///< what the result was computed by: the hint of later calls
  ErrorEstimate estimate{};  ///< of the result; of no rows where it is exact
  int trials = 0;            ///< settings tried on some of the queries; 0 if the plan was the hint's or needed no trial
};

namespace detail {

/// What a backward pass needs of a forward pass: which method it was, and what that one saved.
template <class T, class Kernel>
struct AutomaticSaved {
  Choice choice{};
  typename ExactAttention<T, Kernel>::Saved of_exact{};
  typename Multipole<T, Kernel>::Saved of_multipole{};
};

}  // namespace detail

/// Exact attention or an approximation of it: |out - exact|_F is at most max_error |exact|_F as far as an estimate with
/// a margin can tell, in as little time as possible. Multipole attention begins with few open branches and near
/// clusters; these are doubled, halved or set to what the errors so far predict, on some groups of queries alone, whose
/// error is estimated from rows that are computed exactly. Clusters and groups, and the summaries of branches, are made
/// once. Where nothing cheaper meets the error, or the search would take more than about a tenth of the time of exact
/// attention, as with less than some 2000 tokens, it is exact attention; so it is for causal masks.
/// A call remembers nothing. The plan that one has chosen may be the hint of later calls on similar tokens, as those of
/// the same layer are: the search is then left out, the error is estimated from 64 rows, and where it is too large the
/// search follows after all. A hint of exact attention is always followed.
/// The backward pass is that of the method chosen; in training the search's own rows are computed twice. Memory as
/// Multipole's, but for the summaries of all regions at once.
template <class T, ScoreKernel Kernel = SoftmaxKernel>
struct Automatic {
  double max_error = 0.03;     ///< at least 0, of exact attention: 0.03 is 3 %
  Kernel kernel{};             ///< what scores become
  std::optional<Plan> hint{};  ///< of an earlier call
  std::uint64_t seed = 0;      ///< of the rows that are computed exactly

  /// @{ As Approximator says.
  using Scalar = T;
  using Saved = detail::AutomaticSaved<T, Kernel>;
  static constexpr std::string_view kName = "automatic";

  bool supports(const Inputs<T>& in) const { return ExactAttention<T, Kernel>::kMasks.lacks(in) == nullptr; }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    Choice choice;
    forward(in, out, context, choice);
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    saved.choice = choose(in, out, context, true);
    compute(saved.choice.plan, in, out, context, &saved);
    if (holds(saved.choice, in, out, context)) return;
    saved.choice = {.trials = saved.choice.trials};
    compute(saved.choice.plan, in, out, context, &saved);
  }

  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients);
    const Plan& plan = saved.choice.plan;
    if (plan.exact) return exact().backward(in, out, dout, saved.of_exact, gradients, context);
    multipole(plan).backward(in, out, dout, saved.of_multipole, gradients, context);
  }

  constexpr auto wide() const
    requires NarrowScalar<T>
  {
    return Automatic<float, Kernel>{.max_error = max_error, .kernel = kernel, .hint = hint, .seed = seed};
  }
  /// @}

  /// forward that says what it chose.
  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Choice& choice) const {
    choice = choose(in, out, context, false);
    if (!holds(choice, in, out, context)) choice = {.trials = choice.trials};
    if (choice.plan.exact) compute(choice.plan, in, out, context, nullptr);
  }

 private:
  using Wide = detail::Arithmetic<T>;

  ExactAttention<T, Kernel> exact() const { return ExactAttention<T, Kernel>(kernel); }
  Multipole<T, Kernel> multipole(const Plan& plan) const { return Multipole<T, Kernel>(plan.clusters, kernel); }

  void compute(const Plan& plan, const Inputs<T>& in, const MatrixRef<T>& out, Context& context, Saved* saved) const {
    if (plan.exact) {
      saved == nullptr ? exact().forward(in, out, context) : exact().forward(in, out, context, saved->of_exact);
    } else {
      saved == nullptr ? multipole(plan).forward(in, out, context)
                       : multipole(plan).forward(in, out, context, saved->of_multipole);
    }
  }

  /// The plan and its estimate. out <- its result, unless it is exact attention, or for training.
  Choice choose(const Inputs<T>& in, const MatrixRef<T>& out, Context& context, bool training) const {
    detail::check(kName, in, out);
    detail::check_at_least(kName, "max_error", max_error, 0);
    detail::check_kernel<Wide>(kName, kernel, in.q.cols());
    if (hint) hint->clusters.check(kName);
    if (in.mask.causal != Causal::none || (hint && hint->exact)) return {};
    if (hint) {
      const Choice followed = follow(in, out, context);
      if (followed.estimate.error <= max_error) return followed;
    }
    return search(in, out, context, training);
  }

  /// Whether other rows than those that a search was made by do not show that its result misses the error.
  bool holds(const Choice& choice, const Inputs<T>& in, const MatrixRef<T>& out, Context& context) const {
    if (choice.plan.exact || choice.trials == 0) return true;
    return estimate_error(kernel, in, ConstMatrixRef<T>(out), {.seed = seed + 1}, context).lower <= max_error;
  }

  Choice follow(const Inputs<T>& in, const MatrixRef<T>& out, Context& context) const {
    compute(*hint, in, out, context, nullptr);
    return {*hint, estimate_error(kernel, in, ConstMatrixRef<T>(out), {.seed = seed}, context), 0};
  }

  Choice search(const Inputs<T>& in, const MatrixRef<T>& out, Context& context, bool training) const {
    Scratch scratch = context.scratch();
    const auto from = detail::arithmetic_sources<detail::RowMask>(in, scratch);
    detail::LevelSearch<Wide, Kernel> search(kernel, from, max_error, seed);
    if (!search.worthwhile()) return {};
    const MatrixRef<Wide> rows = detail::result_in_type<Wide>(out, scratch);
    const std::optional<Clusters> clusters = search.run(rows, !training, context);
    if (!clusters) return {.trials = search.tries()};
    if (!training) detail::set_converted(out, rows, context);
    return {{false, *clusters}, search.estimate(), search.tries()};
  }
};

}  // namespace attn
