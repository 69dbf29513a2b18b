/// Nystromformer of tokens that are spread over ranks: segment means are added up, then the states of the landmarks
/// over all keys are merged; what is m x m every rank computes for itself.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/exact.hpp>
#include <attn/mpi/landmarks.hpp>
#include <attn/mpi/ranks.hpp>
#include <attn/mpi/shares.hpp>
#include <attn/nystrom.hpp>

#include <cmath>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace attn::detail {

/// What backward needs of a forward pass: of factors all but the log-sums of B's rows, which log_sums has; where the
/// method was exact attention, that has those of the rows of this rank.
template <class T>
struct DistributedNystromState {
  NystromState<T> factors{};
  std::vector<double> log_sums{};
};

/// NystromFactors of all ranks' tokens.
template <class T>
class SharedFactors {
 public:
  SharedFactors(const Shares& shares, Index m, Scratch& scratch)
      : segments_q_{shares.kept_q(), m},
        segments_k_{shares.kept_k(), m},
        land_(2 * m, shares.d(), scratch),
        states_(m, shares.d_v(), scratch),
        f{rows_of(land_.matrix, {0, m}), rows_of(land_.matrix, {m, 2 * m}), states_.states.weighted,
          scratch.array<RowLog<T>>(m)},
        log_sums(scratch.array<double>(m)) {}

  /// All of it, from this rank's share.
  template <ScoreKernel Kernel>
  void compute(const Kernel& kernel, const Sources<T>& in, const Shares& shares, Agreement& agreement,
               Context& context) {
    agreement.guard([&] {
      Scratch scratch = context.scratch();
      const KeptShare queries(in.q.rows(), kept_queries(in), shares.own().first_kept_q, scratch),
          keys(in.k.rows(), kept_keys(in), shares.own().first_kept_k, scratch);
      segments_q_.add_means(in.q, queries, f.q_land, context);
      segments_k_.add_means(in.k, keys, f.k_land, context);
    });
    land_.add_up(shares.ranks);
    agreement.guard([&] {
      multiply_partial<Kernel, T>(kernel, {f.q_land, in.k, in.v, keys_only(in.mask)}, states_.states, context);
    });
    states_.merge_all(shares.ranks);
    agreement.guard([&] { finish_states(kernel); });
  }

  const SharedSegments<T> segments_q_, segments_k_;

 private:
  /// log_sums, and B v in the place of its states.
  template <ScoreKernel Kernel>
  void finish_states(const Kernel& kernel) {
    const RowStates<T>& states = states_.states;
    for (std::size_t l = 0; l < log_sums.size(); ++l)
      log_sums[l] = row_log_sum(static_cast<double>(states.maximum[l]), static_cast<double>(states.sum[l]));
    finish(kernel, states, f.q_land.cols(), states.weighted);
  }

  ReducibleMatrix<T> land_;
  ReducibleStates<T> states_;

 public:
  NystromFactors<T> f;  ///< but for lse_land
  std::span<double> log_sums;
};

template <class T, class Inverse, ScoreKernel Kernel>
struct Distributed<Nystrom<T, SegmentMeans, Inverse, Kernel>> {
  using Method = Nystrom<T, SegmentMeans, Inverse, Kernel>;
  using Wide = Arithmetic<T>;
  using Saved = DistributedNystromState<Wide>;

  static void add_options(const Method& method, Index d, Fingerprint& to) {
    to.add(score_parameters(method.kernel_, d));
    to.add(static_cast<std::uint64_t>(method.landmarks_.num_landmarks));
  }

  static bool exact(const Method& method, const Shares& shares) {
    return method.landmarks_.num_landmarks >= std::min(shares.kept_q(), shares.kept_k());
  }

  static void forward(const Method& method, const Inputs<T>& in, const MatrixRef<T>& out, const Shares& shares,
                      Agreement& agreement, Context& context, Saved* saved) {
    if (saved != nullptr) saved->factors.exact = exact(method, shares);
    if (exact(method, shares)) {
      return attend_ring(
          method.kernel_, in, out, shares, agreement, context, saved == nullptr ? nullptr : &saved->log_sums,
          [&](const Inputs<T>& some, const auto& to) { kernel_matmul_partial(method.kernel_, some, to, context); });
    }
    Scratch scratch = context.scratch();
    std::optional<SharedFactors<Wide>> factors;
    std::optional<Sources<Wide>> from;
    agreement.guard([&] {
      from.emplace(arithmetic_sources<RowMask>(in, scratch));
      factors.emplace(shares, method.landmarks_.num_landmarks, scratch);
    });
    agreement.settle();
    factors->compute(method.kernel_, *from, shares, agreement, context);
    agreement.guard([&] {
      RowLog<Wide>* const lse = saved == nullptr ? nullptr : save(*factors, in.q.rows(), *saved);
      if (in.q.rows() != 0) wide_method(method).multiply(*from, factors->f, ResultRows<Wide>(out), lse, context);
    });
    agreement.settle();
  }

  static void check_saved(const Inputs<T>& in, const Saved& saved) {
    const std::size_t rows = saved.factors.exact ? saved.log_sums.size() : saved.factors.lse.size();
    detail::check_saved(Method::kName, "rows of q", static_cast<Index>(rows), in.q.rows());
  }

  static void backward(const Method& method, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                       const ConstMatrixRef<T>& dout, const Saved& saved, const Gradients<T>& gradients,
                       const Shares& shares, Agreement& agreement, Context& context) {
    if (saved.factors.exact) {
      return attend_ring_backward(method.kernel_, in, out, dout, saved.log_sums, gradients, shares, agreement, context);
    }
    Scratch scratch = context.scratch();
    std::optional<WideBackward<Wide>> pass;
    std::optional<LandmarkGradients> landmarks;
    agreement.guard([&] {
      pass.emplace(in, out, dout, gradients, scratch, context);
      landmarks.emplace(shares, saved.factors.q_land.rows(), scratch);
    });
    agreement.settle();
    differentiate(wide_method(method), *pass, saved, saved.factors.lse, *landmarks, shares, agreement, context);
    agreement.guard([&] { pass->write(gradients, context); });
    agreement.settle();
  }

  /// Gradients by the landmarks and by Z B v that ranks add up.
  struct LandmarkGradients {
    LandmarkGradients(const Shares& shares, Index m, Scratch& scratch)
        : of_f(m, shares.d() + shares.d_v(), scratch),
          of_b(m, shares.d(), scratch),
          dq_land(scratch.matrix<Wide>(m, shares.d())),
          dk_land(scratch.matrix<Wide>(m, shares.d())),
          dbv(scratch.matrix<Wide>(m, shares.d_v())) {}

    ReducibleMatrix<Wide> of_f, of_b;
    MatrixRef<Wide> dq_land, dk_land, dbv;
  };

  /// As Nystrom::differentiate_product, with the gradients by the landmarks added up over all ranks. lse:
  /// of F's rows.
  template <class WideMethod>
  static void differentiate(const WideMethod& method, const WideBackward<Wide>& pass, const Saved& saved,
                            std::span<const RowLog<Wide>> lse, const LandmarkGradients& g, const Shares& shares,
                            Agreement& agreement, Context& context) {
    agreement.guard([&] { differentiate_f(method, pass, saved.factors, lse, g, context); });
    g.of_f.add_up(shares.ranks);
    agreement.guard([&] {
      set_scaled(g.dk_land, 1, left_of(g.of_f.matrix, 0, g.dk_land.cols()));
      set_scaled(g.dbv, 1, left_of(g.of_f.matrix, g.dk_land.cols(), g.dbv.cols()));
      Scratch scratch = context.scratch();
      const MatrixRef<Wide> added = scratch.matrix<Wide>(g.dk_land.rows(), g.dk_land.cols());
      method.differentiate_core(saved.factors, g.dbv, g.dq_land, added, context);
      add_rows_to(g.dk_land, added);
      differentiate_b(method, pass, saved, g, context);
    });
    g.of_b.add_up(shares.ranks);
    agreement.guard([&] {
      add_rows_to(g.dq_land, g.of_b.matrix);
      Scratch scratch = context.scratch();
      const Index m = g.dq_land.rows();
      const KeptShare queries(pass.in.q.rows(), kept_queries(pass.in), shares.own().first_kept_q, scratch),
          keys(pass.in.k.rows(), kept_keys(pass.in), shares.own().first_kept_k, scratch);
      SharedSegments<Wide>{shares.kept_q(), m}.scatter(g.dq_land, queries, pass.to.dq);
      SharedSegments<Wide>{shares.kept_k(), m}.scatter(g.dk_land, keys, pass.to.dk);
    });
  }

 private:
  static RowLog<Wide>* save(const SharedFactors<Wide>& factors, Index n, Saved& saved) {
    saved.factors.copy(factors.f);
    saved.log_sums.assign(factors.log_sums.begin(), factors.log_sums.end());
    return saved.factors.reset(n, false);
  }

  static MatrixRef<Wide> left_of(const MatrixRef<Wide>& m, Index first, Index count) {
    return {m.data() + first, m.rows(), count, m.outerStride()};
  }

  /// Of F: dq, and of_f <- the gradients by k_land and by Z B v of this rank's queries.
  template <class WideMethod>
  static void differentiate_f(const WideMethod& method, const WideBackward<Wide>& pass, const NystromState<Wide>& f,
                              std::span<const RowLog<Wide>> lse, const LandmarkGradients& g, Context& context) {
    if (pass.in.q.rows() == 0) return;
    Scratch scratch = context.scratch();
    const Index d = g.dk_land.cols(), d_v = g.dbv.cols();
    const MatrixRef<Wide> zbv = scratch.matrix<Wide>(g.dbv.rows(), d_v);
    method.apply_core(f, zbv, context);
    multiply_backward<Kernel, Wide>(
        method.kernel_, {pass.in.q, f.k_land, zbv, queries_only(pass.in.mask)}, pass.out, lse, pass.dout,
        {pass.to.dq, left_of(g.of_f.matrix, 0, d), left_of(g.of_f.matrix, d, d_v)}, context);
  }

  /// Of B: dk and dv, and of_b <- the gradient by q_land of this rank's keys.
  template <class WideMethod>
  static void differentiate_b(const WideMethod& method, const WideBackward<Wide>& pass, const Saved& saved,
                              const LandmarkGradients& g, Context& context) {
    if (pass.in.k.rows() == 0) return;
    Scratch scratch = context.scratch();
    const Inputs<Wide> keys{saved.factors.q_land, pass.in.k, pass.in.v, keys_only(pass.in.mask)};
    RowGradients<Wide> rows{g.dbv, {}, {}};
    if (score_parameters(method.kernel_, keys.q.cols()).rows == Rows::normalized) {
      rows.log_sum = relative_to_keys<Kernel, Wide>(method.kernel_, sources(keys), saved.log_sums, scratch);
      rows.dot = row_dots<Wide>(saved.factors.bv, g.dbv, scratch);
    }
    multiply_rows_backward<Kernel, Wide>(method.kernel_, keys, rows, {g.of_b.matrix, pass.to.dk, pass.to.dv}, context,
                                         {});
  }
};

}  // namespace attn::detail
