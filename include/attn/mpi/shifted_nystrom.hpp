/// Spectral shifting of tokens that are spread over ranks: beside what Nystromformer adds up, the variance of segments
/// and the exact attention of probed rows.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/shift.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/exact.hpp>
#include <attn/mpi/landmarks.hpp>
#include <attn/mpi/nystrom.hpp>
#include <attn/mpi/ranks.hpp>
#include <attn/mpi/shares.hpp>
#include <attn/spectral_shift.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace attn::detail {

/// What backward needs of a forward pass. Factors and log-sums are in nystrom alone.
template <class T>
struct DistributedShiftState {
  ShiftState<T> shift{};
  DistributedNystromState<T> nystrom{};
};

/// Probed rows of all ranks' tokens, the same on each: q, k and v side by side, and the exact attention of the queries.
template <class T>
class SharedProbes {
 public:
  SharedProbes(const Shares& shares, int num_probes, Scratch& scratch)
      : ranks_(scratch.array<Index>(std::min<Index>(num_probes, shares.kept_k()))),
        places_(scratch.array<Index>(static_cast<Index>(ranks_.size()))),
        tokens_(static_cast<Index>(ranks_.size()), 2 * shares.d() + shares.d_v(), scratch),
        states_(static_cast<Index>(ranks_.size()), shares.d_v(), scratch),
        lse_(scratch.array<T>(static_cast<Index>(ranks_.size()))) {
    const Index n = shares.kept_k(), r = tokens_.matrix.rows();
    for (Index j = 0; j < r; ++j) {
      ranks_[static_cast<std::size_t>(j)] = (2 * j + 1) * n / (2 * r);
      places_[static_cast<std::size_t>(j)] = j;
    }
  }

  /// A collective call.
  void compute(const SoftmaxKernel& kernel, const Sources<T>& in, const RankedRows& rows, const Shares& shares,
               Agreement& agreement, Context& context) {
    agreement.guard([&] { copy_own(in, rows); });
    tokens_.add_up(shares.ranks);
    agreement.guard([&] {
      multiply_partial<SoftmaxKernel, T>(kernel, {tokens().q, in.k, in.v, keys_only(in.mask)}, states_.states, context);
    });
    states_.merge_all(shares.ranks);
    agreement.guard([&] { finish(kernel, states_.states, in.q.cols(), states_.states.weighted, lse_); });
  }

  Sources<T> tokens() const {
    const Index d = (tokens_.matrix.cols() - states_.states.weighted.cols()) / 2;
    return {columns(0, d), columns(d, d), columns(2 * d, states_.states.weighted.cols())};
  }

  ShiftProbes<T> probes() const { return {places_, states_.states.weighted, lse_}; }

  /// These rows in the place of those that factors list.
  ShiftFactors<T> listed_in(ShiftFactors<T> factors) const {
    factors.rows = {places_, factors.rows.count, 0, ranks_};
    return factors;
  }

 private:
  ConstMatrixRef<T> columns(Index first, Index count) const {
    return {tokens_.matrix.data() + first, tokens_.matrix.rows(), count, tokens_.matrix.outerStride()};
  }

  void copy_own(const Sources<T>& in, const RankedRows& rows) const {
    for (std::size_t j = 0; j < ranks_.size(); ++j) {
      const Range own = rows.within({ranks_[j], ranks_[j] + 1});
      if (own.first == own.last) continue;
      const Index row = rows.numbers[static_cast<std::size_t>(own.first)], d = in.q.cols();
      T* const to = row_of(tokens_.matrix, static_cast<Index>(j));
      in.q.copy_row(row, to);
      in.k.copy_row(row, to + d);
      in.v.copy_row(row, to + 2 * d);
    }
  }

  std::span<Index> ranks_, places_;
  ReducibleMatrix<T> tokens_;
  ReducibleStates<T> states_;
  std::span<T> lse_;
};

template <class T, class Landmarks, ScoreKernel Kernel>
struct Distributed<ShiftedNystrom<T, Landmarks, Kernel>> {
  using Method = ShiftedNystrom<T, Landmarks, Kernel>;
  using Wide = Arithmetic<T>;
  using Saved = DistributedShiftState<Wide>;

  static void add_options(const Method& method, Index d, Fingerprint& to) {
    to.add(score_parameters(method.kernel_, d));
    to.add(static_cast<std::uint64_t>(method.landmarks_.num_landmarks));
    to.add(static_cast<std::uint64_t>(method.shift_.mode));
    to.add(static_cast<std::uint64_t>(method.shift_.iterations));
    to.add(static_cast<std::uint64_t>(method.shift_.num_probes));
  }

  static void forward(const Method& method, const Inputs<T>& in, const MatrixRef<T>& out, const Shares& shares,
                      Agreement& agreement, Context& context, Saved* saved) {
    const bool exact = method.landmarks_.num_landmarks >= shares.kept_k();
    if (saved != nullptr) saved->nystrom.factors.exact = exact;
    if (exact) {
      return attend_ring(
          method.kernel_, in, out, shares, agreement, context, saved == nullptr ? nullptr : &saved->nystrom.log_sums,
          [&](const Inputs<T>& some, const auto& to) { kernel_matmul_partial(method.kernel_, some, to, context); });
    }
    Scratch scratch = context.scratch();
    std::optional<Parts> parts;
    agreement.guard([&] { parts.emplace(method, in, shares, scratch); });
    agreement.settle();
    parts->factors.compute(method.kernel_, parts->from, shares, agreement, context);
    agreement.guard([&] {
      for (std::size_t l = 0; l < parts->factors.log_sums.size(); ++l)
        parts->factors.f.lse_land[l] = {static_cast<Wide>(parts->factors.log_sums[l]), Wide(0)};
      if (saved != nullptr) save(*parts, in.q.rows(), *saved);
    });
    const auto& wide = wide_method(method);
    const ResultRows<Wide> to(out);
    ShiftState<Wide>* const shift = saved == nullptr ? nullptr : &saved->shift;
    if (method.shift_.mode != ShiftMode::paper) {
      shift_by_probes(wide, *parts, to, shift, shares, agreement, context);
    } else if (in.q.rows() != 0) {
      agreement.guard([&] { wide.shift_by_trace(parts->from, parts->factors.f, to, shift, context); });
    }
    agreement.settle();
  }

  static void check_saved(const Inputs<T>& in, const Saved& saved) {
    const bool exact = saved.nystrom.factors.exact;
    const std::size_t rows = exact ? saved.nystrom.log_sums.size() : saved.shift.scale.size();
    detail::check_saved(Method::kName, "rows of q", static_cast<Index>(rows), in.q.rows());
  }

  static void backward(const Method& method, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                       const ConstMatrixRef<T>& dout, const Saved& saved, const Gradients<T>& gradients,
                       const Shares& shares, Agreement& agreement, Context& context) {
    if (saved.nystrom.factors.exact) {
      return attend_ring_backward(method.kernel_, in, out, dout, saved.nystrom.log_sums, gradients, shares, agreement,
                                  context);
    }
    using Plain = Nystrom<Wide, SegmentMeans, ShiftedPinv, Kernel>;
    Scratch scratch = context.scratch();
    const Plain nystrom(method.landmarks_, ShiftedPinv{method.shift_.iterations, saved.shift.delta}, method.kernel_);
    std::optional<WideBackward<Wide>> pass, of_product;
    std::optional<typename Distributed<Plain>::LandmarkGradients> landmarks;
    std::span<RowLog<Wide>> lse{};
    agreement.guard([&] {
      pass.emplace(in, out, dout, gradients, scratch, context);
      landmarks.emplace(shares, saved.nystrom.factors.q_land.rows(), scratch);
      const MatrixRef<Wide> nv = scratch.matrix<Wide>(out.rows(), out.cols()),
                            dnv = scratch.matrix<Wide>(out.rows(), out.cols());
      lse = scratch.array<RowLog<Wide>>(out.rows());
      if (out.rows() != 0) nystrom.multiply(sources(pass->in), saved.nystrom.factors, nv, lse.data(), context);
      set_zero(dnv);
      for_each_kept(pass->in, [&](Index i, std::size_t at) {
        scale_row(saved.shift.scale[at], row_of(pass->dout, i), row_of(dnv, i), dnv.cols());
      });
      of_product.emplace(pass->in, ConstMatrixRef<Wide>(nv), ConstMatrixRef<Wide>(dnv), pass->to, scratch, context);
    });
    agreement.settle();
    Distributed<Plain>::differentiate(nystrom, *of_product, saved.nystrom, lse, *landmarks, shares, agreement, context);
    agreement.guard([&] {
      for_each_kept(pass->in, [&](Index i, std::size_t at) {
        add_row(saved.shift.shift[at], row_of(pass->dout, i), row_of(pass->to.dv, i), pass->to.dv.cols());
      });
      pass->write(gradients, context);
    });
    agreement.settle();
  }

 private:
  /// What a forward pass adds up over ranks, in memory of its own.
  struct Parts {
    Parts(const Method& method, const Inputs<T>& in, const Shares& shares, Scratch& scratch)
        : from(arithmetic_sources<RowMask>(in, scratch)),
          factors(shares, method.landmarks_.num_landmarks, scratch),
          variance(method.landmarks_.num_landmarks, shares.d(), scratch),
          probes(shares, method.shift_.num_probes, scratch),
          rows{list_kept_keys(from, scratch), shares.kept_k(), shares.own().first_kept_k} {}

    Sources<Wide> from;
    SharedFactors<Wide> factors;
    ReducibleMatrix<Wide> variance;
    SharedProbes<Wide> probes;
    RankedRows rows;
  };

  static void save(const Parts& parts, Index n, Saved& saved) {
    saved.shift.reset(n, false);
    saved.nystrom.factors.copy(parts.factors.f);
    saved.nystrom.log_sums.assign(parts.factors.log_sums.begin(), parts.factors.log_sums.end());
  }

  /// The modes scalar and row.
  template <class WideMethod>
  static void shift_by_probes(const WideMethod& method, Parts& parts, const ResultRows<Wide>& out,
                              ShiftState<Wide>* saved, const Shares& shares, Agreement& agreement, Context& context) {
    agreement.guard(
        [&] { set_variance<Wide>(parts.from.k, parts.rows, parts.factors.f.k_land, parts.variance.matrix, context); });
    parts.variance.add_up(shares.ranks);
    parts.probes.compute(method.kernel_, parts.from, parts.rows, shares, agreement, context);
    agreement.guard([&] {
      if (out.rows() == 0) return;
      Scratch scratch = context.scratch();
      const auto& f = parts.factors.f;
      const ShiftFactors<Wide> factors(parts.rows, parts.variance.matrix, method.kernel_, f, method.shift_.iterations,
                                       context, scratch);
      const ShiftFactors<Wide> of_probes = parts.probes.listed_in(factors);
      const ShiftProbes<Wide> probes = parts.probes.probes();
      const Sources<Wide> tokens = parts.probes.tokens();
      if (method.shift_.mode == ShiftMode::row)
        return add_row_shift<Wide>(fit_gate(probes, tokens, of_probes, context), parts.from, factors, out, saved,
                                   context);
      const Wide delta = probed_shift(probes, tokens, of_probes, context);
      set_scaled(factors.zbv, 1 - delta, factors.zbv);
      add_one_shift<Wide>(method.kernel_, parts.from, f.k_land, factors.zbv, factors.rows.numbers, 1 - delta, delta,
                          out, saved, context);
    });
  }

  template <class Body>
  static void for_each_kept(const Inputs<Wide>& in, const Body& body) {
    for (Index i = 0; i < in.q.rows(); ++i) {
      if (keeps_query(in, i)) body(i, static_cast<std::size_t>(i));
    }
  }
};

}  // namespace attn::detail
