/// Skyformer and lifted softmax of tokens that are spread over ranks: sampled landmarks come from the ranks that own
/// them, then their states over all keys are merged; what is m x m every rank computes for itself.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/landmarks.hpp>
#include <attn/lifted_softmax.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/exact.hpp>
#include <attn/mpi/landmarks.hpp>
#include <attn/mpi/ranks.hpp>
#include <attn/mpi/shares.hpp>
#include <attn/skyformer.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string_view>

namespace attn::detail {

/// A landmark policy that takes rows by their numbers alone.
template <class L>
concept SamplesRows = std::same_as<L, UniformSample> || std::same_as<L, StridedSample>;

template <SamplesRows Landmarks>
void add_landmark_options(const Landmarks& landmarks, Fingerprint& to) {
  to.add(static_cast<std::uint64_t>(landmarks.num_landmarks));
  if constexpr (requires { landmarks.seed; }) to.add(landmarks.seed);
}

/// What backward needs of a forward pass of so many queries on this rank.
template <class T>
struct DistributedSkyformerState : SkyformerState<T> {
  Index n_q = -1;
};

/// The landmarks of all ranks' tokens, the same on each, and their sums over all keys.
template <class T, class Landmarks>
class SharedLandmarks {
 public:
  SharedLandmarks(const Landmarks& landmarks, const Sources<T>& in, const Shares& shares, Scratch& scratch)
      : rows_(SampledShares<Landmarks>::of(landmarks, shares.kept_q(), shares.kept_k(), scratch)),
        queries_(in.q.rows(), kept_queries(in), shares.own().first_kept_q, scratch),
        keys_(in.k.rows(), kept_keys(in), shares.own().first_kept_k, scratch),
        land_(rows_.count(), shares.d(), scratch),
        states_(std::max<Index>(rows_.count(), 1), shares.d_v(), scratch) {}

  /// The landmarks (m, d). A collective call.
  void gather(const Sources<T>& in, const Shares& shares) const {
    rows_.gather(in, queries_, keys_, land_.matrix);
    land_.add_up(shares.ranks);
  }

  const MatrixRef<T>& rows() const { return land_.matrix; }

  /// Their sums over the keys of all ranks, of which this one's biases are given. A collective call.
  std::optional<LandmarkSums<T>> sum(const GaussianKernel& kernel, const Sources<T>& in, const KeyBias<T>& bias,
                                     const Shares& shares, Agreement& agreement, Scratch& scratch,
                                     Context& context) const {
    agreement.guard([&] {
      if (rows().rows() == 0) return;
      multiply_partial(kernel, Sources<T>{rows(), in.k, in.v, keys_only(in.mask), bias.relative}, states_.states,
                       context);
    });
    states_.merge_all(shares.ranks);
    std::optional<LandmarkSums<T>> result;
    agreement.guard([&] {
      const MatrixRef<T> sums = scratch.matrix<T>(rows().rows(), shares.d_v() + 1);
      if (rows().rows() == 0) return void(result.emplace(LandmarkSums<T>{sums}));
      set_scaled(left_columns(sums, shares.d_v()), 1, states_.states.weighted);
      result.emplace(sums_of_states(kernel.rows, states_.states, sums, bias.common_exponent(kernel.rows), scratch));
    });
    return result;
  }

  void scatter(const MatrixRef<T>& dland, const Gradients<T>& to) const {
    rows_.scatter(dland, queries_, keys_, to.dq, to.dk);
  }

 private:
  SampledShares<Landmarks> rows_;
  KeptShare queries_, keys_;
  ReducibleMatrix<T> land_;
  ReducibleStates<T> states_;
};

/// The biases of this rank's keys, relative to the largest of all ranks; none where no rank has any. A collective call.
template <class T>
class SharedBias {
 public:
  /// in: those of this rank, or none. any: whether any rank has some.
  SharedBias(const Sources<T>& in, bool any, const Shares& shares, Agreement& agreement, Scratch& scratch) {
    if (!any) return;
    LargestBias<T> largest;
    Sources<T> with_bias = in;
    agreement.guard([&] {
      if (in.key_bias.empty()) with_bias.key_bias = zeros(in.k.rows(), scratch);
      for (Index j = 0; j < in.k.rows(); ++j) {
        if (keeps_key(in, j)) largest.add(with_bias.key_bias[static_cast<std::size_t>(j)]);
      }
    });
    const auto own = static_cast<double>(largest.value);
    double most = own;
    check_mpi(MPI_Allreduce(&own, &most, 1, MPI_DOUBLE, MPI_MAX, shares.ranks.communicator));
    largest.value = static_cast<T>(most);
    agreement.guard([&] { bias_ = bias_relative_to(largest.origin(), with_bias, scratch); });
  }

  const KeyBias<T>& get() const { return bias_; }

 private:
  static std::span<const T> zeros(Index n, Scratch& scratch) {
    const std::span<T> x = scratch.array<T>(n);
    std::fill(x.begin(), x.end(), T(0));
    return x;
  }

  KeyBias<T> bias_{};
};

template <class T, SamplesRows Landmarks, class Inverse>
struct Distributed<Skyformer<T, Landmarks, Inverse>> {
  using Method = Skyformer<T, Landmarks, Inverse>;
  using Wide = Arithmetic<T>;
  using Saved = DistributedSkyformerState<Wide>;

  static void add_options(const Method& method, Index d, Fingerprint& to) {
    to.add(score_parameters(method.kernel_, d));
    add_landmark_options(method.landmarks_, to);
  }

  static void forward(const Method& method, const Inputs<T>& in, const MatrixRef<T>& out, const Shares& shares,
                      Agreement& agreement, Context& context, Saved* saved) {
    Scratch scratch = context.scratch();
    std::optional<Sources<Wide>> from;
    agreement.guard([&] { from.emplace(arithmetic_sources<RowMask>(in, scratch)); });
    agreement.settle();
    const SharedBias<Wide> bias(*from, shares.have_bias(), shares, agreement, scratch);
    Distributed<Skyformer<Wide, Landmarks, Inverse>>::attend(wide_method(method), *from, bias.get(),
                                                             ResultRows<Wide>(out), shares, agreement, context, saved);
  }

  /// Skyformer::attend over all ranks, with the biases of this rank's keys.
  static void attend(const Method& method, const Sources<T>& in, const KeyBias<T>& bias, const ResultRows<T>& out,
                     const Shares& shares, Agreement& agreement, Context& context, Saved* saved) {
    Scratch scratch = context.scratch();
    std::optional<SharedLandmarks<T, Landmarks>> land;
    agreement.guard([&] {
      land.emplace(method.landmarks_, in, shares, scratch);
      if (saved != nullptr) saved->n_q = in.q.rows();
    });
    agreement.settle();
    land->gather(in, shares);
    const auto sums = land->sum(method.kernel_, in, bias, shares, agreement, scratch, context);
    agreement.guard([&] {
      if (saved != nullptr) saved->copy(land->rows(), *sums);
      if (land->rows().rows() == 0) return out.set_zero();  // no query or no key is kept
      if (in.q.rows() == 0) return;
      if (sums->spread())
        return method.template multiply<typename Method::WideScalar>(in, land->rows(), *sums, out, context);
      method.template multiply<T>(in, land->rows(), *sums, out, context);
    });
    agreement.settle();
  }

  static void check_saved(const Inputs<T>& in, const Saved& saved) {
    detail::check_saved(Method::kName, "rows of q", saved.n_q, in.q.rows());
  }

  static void backward(const Method& method, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                       const ConstMatrixRef<T>& dout, const Saved& saved, const Gradients<T>& gradients,
                       const Shares& shares, Agreement& agreement, Context& context) {
    Scratch scratch = context.scratch();
    std::optional<WideBackward<Wide>> pass;
    agreement.guard([&] { pass.emplace(in, out, dout, gradients, scratch, context); });
    agreement.settle();
    const SharedBias<Wide> bias(sources(pass->in), shares.have_bias(), shares, agreement, scratch);
    Distributed<Skyformer<Wide, Landmarks, Inverse>>::differentiate(wide_method(method), *pass, bias.get(), saved, {},
                                                                    shares, agreement, context);
    agreement.guard([&] { pass->write(gradients, context); });
    agreement.settle();
  }

  /// As Skyformer::differentiate, with the gradients by the landmarks and by their sums added up over all ranks.
  static void differentiate(const Method& method, const WideBackward<T>& pass, const KeyBias<T>& bias,
                            const Saved& saved, std::span<T> dbias, const Shares& shares, Agreement& agreement,
                            Context& context) {
    const LandmarkSums<T> sums{saved.sums, saved.exponents, saved.top};
    if (sums.spread())
      refuse(Method::kName,
             "sums of the landmarks that are further apart than the type reaches have no gradients over "
             "MPI");
    Scratch scratch = context.scratch();
    std::optional<LandmarkGradients> g;
    agreement.guard([&] { g.emplace(method, pass, sums, saved.land, shares, scratch, context); });
    agreement.settle();
    agreement.guard([&] { differentiate_queries(method, pass, sums, saved.land, *g, context); });
    g->of_queries.add_up(shares.ranks);
    agreement.guard([&] { differentiate_keys(method, pass, bias, sums, saved.land, dbias, *g, context); });
    g->of_keys.add_up(shares.ranks);
    agreement.guard([&] {
      add_rows_to(g->dland, g->of_keys.matrix);
      g->land.scatter(g->dland, pass.to);
    });
  }

 private:
  template <class>
  friend struct Distributed;

  /// What lies between landmarks, and gradients by these that ranks add up: of_queries (m, d + d_v + 1) by them and by
  /// z.
  struct LandmarkGradients {
    LandmarkGradients(const Method& method, const WideBackward<T>& pass, const LandmarkSums<T>& sums,
                      const ConstMatrixRef<T>& rows, const Shares& shares, Scratch& scratch, Context& context)
        : land(method.landmarks_, sources(pass.in), shares, scratch),
          of_queries(rows.rows(), rows.cols() + sums.sums.cols(), scratch),
          of_keys(rows.rows(), rows.cols(), scratch),
          dland(scratch.matrix<T>(rows.rows(), rows.cols())),
          dz(scratch.matrix<T>(rows.rows(), sums.sums.cols())),
          a(scratch.matrix<T>(rows.rows(), rows.rows())),
          da(scratch.matrix<T>(rows.rows(), rows.rows())),
          system(method.kernel_, rows, sums, scratch, context) {}

    SharedLandmarks<T, Landmarks> land;
    ReducibleMatrix<T> of_queries, of_keys;
    MatrixRef<T> dland, dz, a, da;
    LandmarkSystem<T> system;
  };

  static void differentiate_queries(const Method& method, const WideBackward<T>& pass, const LandmarkSums<T>& sums,
                                    const ConstMatrixRef<T>& rows, const LandmarkGradients& g, Context& context) {
    if (pass.in.q.rows() == 0) return;
    Scratch scratch = context.scratch();
    const MatrixRef<T> solution = scratch.matrix<T>(g.dz.rows(), g.dz.cols());
    set_scaled(g.a, 1, g.system.a);
    set_scaled(solution, 1, g.system.sums);
    method.inverse_.apply(g.a, solution, context);
    const auto z = values_of<T>(solution, false, scratch);
    method.differentiate_queries({pass.in, rows, sums, pass.out, pass.dout}, z, g.system.top, pass.to.dq, g.dland, g.dz,
                                 context);
    for (Index l = 0; l < g.dland.rows(); ++l) {
      std::copy_n(row_of(g.dland, l), g.dland.cols(), row_of(g.of_queries.matrix, l));
      std::copy_n(row_of(g.dz, l), g.dz.cols(), row_of(g.of_queries.matrix, l) + g.dland.cols());
    }
  }

  static void differentiate_keys(const Method& method, const WideBackward<T>& pass, const KeyBias<T>& bias,
                                 const LandmarkSums<T>& sums, const ConstMatrixRef<T>& rows, std::span<T> dbias,
                                 const LandmarkGradients& g, Context& context) {
    for (Index l = 0; l < g.dland.rows(); ++l) {
      std::copy_n(row_of(g.of_queries.matrix, l), g.dland.cols(), row_of(g.dland, l));
      std::copy_n(row_of(g.of_queries.matrix, l) + g.dland.cols(), g.dz.cols(), row_of(g.dz, l));
    }
    set_scaled(g.a, 1, g.system.a);
    method.inverse_.backward(g.a, g.system.sums, g.dz, g.da, context);
    landmark_matrix_backward(method.kernel_, rows, g.system.a, g.da, g.dland, context);
    if (pass.in.k.rows() == 0) return;
    sum_over_keys_backward(method.kernel_, pass.in, bias, rows, sums, g.system.top, g.dz,
                           Gradients<T>{g.of_keys.matrix, pass.to.dk, pass.to.dv}, dbias, context);
  }
};

template <class T, SamplesRows Landmarks, class Inverse>
struct Distributed<LiftedSoftmax<T, Landmarks, Inverse>> {
  using Method = LiftedSoftmax<T, Landmarks, Inverse>;
  using Wide = Arithmetic<T>;
  using Saved = DistributedSkyformerState<Wide>;

  static void add_options(const Method& method, Index d, Fingerprint& to) {
    to.add(score_parameters(method.kernel_, d));
    add_landmark_options(method.landmarks_, to);
  }

  static void forward(const Method& method, const Inputs<T>& in, const MatrixRef<T>& out, const Shares& shares,
                      Agreement& agreement, Context& context, Saved* saved) {
    Scratch scratch = context.scratch();
    const auto& of_type = wide_method(method);
    std::optional<Sources<Wide>> from;
    agreement.guard([&] { from.emplace(arithmetic_sources<RowMask>(in, scratch)); });
    agreement.settle();
    const SharedBias<Wide> bias(*from, shares.have_bias(), shares, agreement, scratch);
    agreement.guard([&] { from->key_bias = of_type.log_weights(*from, bias.get().relative, scratch); });
    const SharedBias<Wide> weights(*from, true, shares, agreement, scratch);
    Distributed<Skyformer<Wide, Landmarks, Inverse>>::attend(of_type.skyformer(in.q.cols()), *from, weights.get(),
                                                             ResultRows<Wide>(out), shares, agreement, context, saved);
  }

  static void check_saved(const Inputs<T>& in, const Saved& saved) {
    detail::check_saved(Method::kName, "rows of q", saved.n_q, in.q.rows());
  }

  static void backward(const Method& method, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                       const ConstMatrixRef<T>& dout, const Saved& saved, const Gradients<T>& gradients,
                       const Shares& shares, Agreement& agreement, Context& context) {
    Scratch scratch = context.scratch();
    const auto& of_type = wide_method(method);
    std::optional<WideBackward<Wide>> pass;
    std::span<Wide> dbias{};
    agreement.guard([&] {
      pass.emplace(in, out, dout, gradients, scratch, context);
      dbias = scratch.array<Wide>(in.k.rows());
    });
    agreement.settle();
    const SharedBias<Wide> bias(sources(pass->in), shares.have_bias(), shares, agreement, scratch);
    agreement.guard([&] { pass->in.key_bias = of_type.log_weights(sources(pass->in), bias.get().relative, scratch); });
    const SharedBias<Wide> weights(sources(pass->in), true, shares, agreement, scratch);
    Distributed<Skyformer<Wide, Landmarks, Inverse>>::differentiate(
        of_type.skyformer(in.q.cols()), *pass, weights.get(), saved, dbias, shares, agreement, context);
    agreement.guard([&] {
      const auto s = static_cast<Wide>(of_type.scale(in.q.cols()));
      for (Index j = 0; j < in.k.rows(); ++j) {
        if (keeps_key(in, j))
          add_row(s * dbias[static_cast<std::size_t>(j)], row_of(pass->in.k, j), row_of(pass->to.dk, j), in.k.cols());
      }
      pass->write(gradients, context);
    });
    agreement.settle();
  }
};

}  // namespace attn::detail
