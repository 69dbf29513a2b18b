/// Skyformer: Gaussian attention through landmarks, by a Nystrom method lifted to a positive semidefinite matrix.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/divided_rows.hpp>
#include <attn/detail/kernel_matrix.hpp>
#include <attn/detail/nystrom_factors.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/narrow.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <string_view>

namespace attn {

/// kappa(q, k) v ~ kappa(q, L) (kappa(L, L) + gamma I)^-1 kappa(L, k) v with the Gaussian kernel kappa and landmarks L, rows of [q; k].
/// The kernel matrix of [q; k] is positive semidefinite, and so is what its Nystrom approximation leaves, which bounds the error of
/// the block that is wanted. Normalised rows: (C~ v)_i / (C~ 1)_i, the divisor kept above 1e-6 of the sum of its terms' magnitudes.
/// q (n_q, d), k (n_k, d), v (n_k, d_v), out (n_q, d_v). O((n_q + n_k) m (d + d_v) + m^3) time, O(m (d + d_v + m)) memory; not causal.
/// Throws std::invalid_argument when shapes disagree or are empty, an option is out of range, or the mask is causal.
/// Chen et al. 2021, eq. 6 and Theorem 2.
template <class T, class Landmarks = UniformSample, class Inverse = RidgeInverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class Skyformer {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "skyformer";

  explicit constexpr Skyformer(Landmarks landmarks = {}, Inverse inverse = {}, GaussianKernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}

  bool supports(const Inputs<T>& in) const { return in.mask.causal == Causal::none; }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    check(in, out);
    Scratch scratch = context.scratch();
    MatrixRef<T> land = landmarks_.select(in, scratch);
    if (land.rows() == 0) return void(out.setZero());  // no query or no key is kept
    MatrixRef<T> sums = scratch.matrix<T>(land.rows(), in.v.cols() + 1);
    sum_over_keys(in, land, sums, context);
    run(in, land, sums, out, context);
  }

  /// The landmarks (m, d) of n_q queries and n_k keys, and sums = kappa(L, k) [v 1] (m, d_v + 1), divided by 2^top where
  /// rows are normalized.
  struct Saved {
    Index n_q = 0, n_k = 0;
    Matrix<T> land{}, sums{};
    T top = 0;
  };

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    check(in, out);
    Scratch scratch = context.scratch();
    saved.n_q = in.q.rows();
    saved.n_k = in.k.rows();
    saved.land = landmarks_.select(in, scratch);
    saved.sums.resize(saved.land.rows(), in.v.cols() + 1);
    if (saved.land.rows() == 0) return void(out.setZero());
    saved.top = sum_over_keys(in, saved.land, saved.sums, context);
    run(in, saved.land, saved.sums, out, context);
  }

  /// Through the landmarks, wherever they were sampled, and through the inverse. About 3 times the forward pass; where rows are
  /// normalized one product more, and memory for two copies of v.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved, const Gradients<T>& gradients,
                Context& context) const {
    backward(in, out, dout, saved, gradients, std::span<T>{}, context);
  }

  /// The same, and dbias (n_k), unless empty, <- the gradient by the key bias.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved, const Gradients<T>& gradients,
                std::span<T> dbias, Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients);
    check_saved(in, saved);
    const Gradients<T> to = gradients;
    if (saved.land.rows() == 0) return set_zero(to, dbias);
    Scratch scratch = context.scratch();
    const Index m = saved.land.rows(), d = in.q.cols();
    MatrixRef<T> dland = scratch.matrix<T>(m, d), added = scratch.matrix<T>(m, d), dsums = scratch.matrix<T>(m, in.v.cols() + 1);
    MatrixRef<T> a = scratch.matrix<T>(m, m), da = scratch.matrix<T>(m, m), values = scratch.matrix<T>(m, in.v.cols() + 1);
    solve(saved.land, saved.sums, a, values, context);
    backward_queries(in, saved, values, out, dout, to.dq, dland, dsums, context);                // kappa(q, L) values
    backward_core(saved, a, values, dsums, da, added, context);                                  // (kappa(L, L) + gamma I)^-1 sums
    dland += added;
    backward_keys(in, saved, dsums, {added, to.dk, to.dv}, dbias, context);                      // kappa(L, k) [v 1]
    dland += added;
    if constexpr (requires { landmarks_.scatter(in, dland, to.dq, to.dk, scratch); }) landmarks_.scatter(in, dland, to.dq, to.dk, scratch);
  }

 private:
  void check(const Inputs<T>& in, const MatrixRef<T>& out) const {
    detail::check(kName, in, out);
    detail::check_kernel(kName, kernel_);
    detail::check_not_causal(kName, in);
    detail::check_landmarks(kName, landmarks_);
    inverse_.check(kName);
  }

  static void check_saved(const Inputs<T>& in, const Saved& saved) {
    detail::check_saved(kName, "rows of q", saved.n_q, in.q.rows());
    detail::check_saved(kName, "rows of k", saved.n_k, in.k.rows());
    detail::check_saved(kName, "columns of k", saved.land.cols(), in.k.cols());
    detail::check_saved(kName, "columns of v", saved.sums.cols() - 1, in.v.cols());
  }

  /// kappa(L, L) has raw rows whatever those of the result are.
  GaussianKernel raw_kernel() const { return {.bandwidth = kernel_.bandwidth, .rows = Rows::raw}; }

  /// sums (m, d_v + 1) <- kappa(L, k) [v 1]; where the rows of the result are normalized, relative to the largest of kappa's maxima, a
  /// factor that cancels, so that large key biases do not overflow. Returns log2 of it.
  T sum_over_keys(const Inputs<T>& in, const ConstMatrixRef<T>& land, MatrixRef<T> sums, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = land.rows(), d_v = in.v.cols();
    const RowStates<T> states{scratch.array<T>(m), scratch.array<T>(m), sums.leftCols(d_v)};
    kernel_matmul_partial(kernel_, Inputs<T>{land, in.k, in.v, keys_only(in.mask), in.key_bias}, states, context);
    T top = 0;
    if (kernel_.rows == Rows::normalized) top = *std::max_element(states.maximum.begin(), states.maximum.end());
    for (Index j = 0; j < m; ++j) {
      const T factor = std::exp2(states.maximum[static_cast<std::size_t>(j)] - top);
      sums.row(j).head(d_v) *= factor;
      sums(j, d_v) = factor * states.sum[static_cast<std::size_t>(j)];
    }
    return top;
  }

  /// values (m, d_v + 1) <- (kappa(L, L) + gamma I)^-1 sums. a (m, m) is overwritten.
  void solve(const ConstMatrixRef<T>& land, const ConstMatrixRef<T>& sums, MatrixRef<T> a, MatrixRef<T> values, Context& context) const {
    values = sums;
    detail::kernel_matrix<GaussianKernel, T>(raw_kernel(), land, land, a, context);
    inverse_.apply(a, values, context);
  }

  /// out <- kappa(q, L) (kappa(L, L) + gamma I)^-1 sums.
  void run(const Inputs<T>& in, const ConstMatrixRef<T>& land, const ConstMatrixRef<T>& sums, MatrixRef<T> out, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = land.rows(), d_v = in.v.cols();
    MatrixRef<T> values = scratch.matrix<T>(m, d_v + 2), a = scratch.matrix<T>(m, m);
    solve(land, sums, a, values.leftCols(d_v + 1), context);
    if (kernel_.rows == Rows::raw) {
      return kernel_matmul(kernel_, Inputs<T>{in.q, land, values.leftCols(d_v), queries_only(in.mask)}, out, context);
    }
    values.col(d_v + 1) = values.col(d_v).cwiseAbs();
    detail::divide_rows(kernel_, in, land, values, out, context);
  }

  void backward_queries(const Inputs<T>& in, const Saved& saved, const MatrixRef<T>& values, const ConstMatrixRef<T>& out,
                        const ConstMatrixRef<T>& dout, MatrixRef<T> dq, MatrixRef<T> dland, MatrixRef<T> dvalues, Context& context) const {
    const Index d_v = in.v.cols();
    if (kernel_.rows == Rows::normalized) {
      return detail::divide_rows_backward<T>(kernel_, in, saved.land, values, out, dout, dq, dland, dvalues, context);
    }
    dvalues.col(d_v).setZero();
    kernel_matmul_backward(kernel_, Inputs<T>{in.q, saved.land, values.leftCols(d_v), queries_only(in.mask)}, out, {}, dout,
                           {dq, dland, dvalues.leftCols(d_v)}, context);
  }

  /// dsums: the gradient by values -> that by sums; dland <- that by the landmarks within kappa(L, L).
  void backward_core(const Saved& saved, MatrixRef<T> a, MatrixRef<T> sums, MatrixRef<T> dsums, MatrixRef<T> da, MatrixRef<T> dland,
                     Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = a.rows();
    const MatrixRef<T> identity = detail::identity_matrix<T>(m, scratch), unused = scratch.matrix<T>(m, m);
    MatrixRef<T> again = scratch.matrix<T>(dland.rows(), dland.cols());
    sums = saved.sums;
    detail::kernel_matrix<GaussianKernel, T>(raw_kernel(), saved.land, saved.land, a, context);
    inverse_.backward(a, sums, dsums, da, context);
    kernel_matmul_backward(raw_kernel(), Inputs<T>{saved.land, saved.land, identity}, a, {}, da, {dland, again, unused}, context);
    dland += again;
  }

  /// By the landmarks, k and v: dsums times 2^-top, which the key biases take on.
  void backward_keys(const Inputs<T>& in, const Saved& saved, const MatrixRef<T>& dsums, const Gradients<T>& to, std::span<T> dbias,
                     Context& context) const {
    const Index n = in.v.rows(), d_v = in.v.cols();
    if (kernel_.rows == Rows::raw) {
      const Inputs<T> keys{saved.land, in.k, in.v, keys_only(in.mask), in.key_bias};
      return kernel_matmul_backward(kernel_, keys, saved.sums.leftCols(d_v), {}, dsums.leftCols(d_v), to, context, dbias);
    }
    Scratch scratch = context.scratch();
    MatrixRef<T> v = scratch.matrix<T>(n, d_v + 1), dv = scratch.matrix<T>(n, d_v + 1);
    const std::span<T> bias = scratch.array<T>(n);
    v.leftCols(d_v) = in.v;
    v.col(d_v).setOnes();
    for (std::size_t j = 0; j < bias.size(); ++j) {
      bias[j] = (in.key_bias.empty() ? T(0) : in.key_bias[j]) - std::numbers::ln2_v<T> * saved.top;
    }
    const Inputs<T> keys{saved.land, in.k, v, keys_only(in.mask), bias};
    kernel_matmul_backward(raw_kernel(), keys, saved.sums, {}, dsums, {to.dq, to.dk, dv}, context, dbias);
    MatrixRef<T>(to.dv) = dv.leftCols(d_v);
  }

  static void set_zero(Gradients<T> gradients, std::span<T> dbias) {
    for (MatrixRef<T>* gradient : {&gradients.dq, &gradients.dk, &gradients.dv}) gradient->setZero();
    std::fill(dbias.begin(), dbias.end(), T(0));
  }

  Landmarks landmarks_;
  Inverse inverse_;
  GaussianKernel kernel_;
};

/// With narrow types in memory.
template <NarrowScalar T, class Landmarks, class Inverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class Skyformer<T, Landmarks, Inverse> : public detail::Widened<T, Skyformer<float, Landmarks, Inverse>> {
  using Wide = Skyformer<float, Landmarks, Inverse>;

 public:
  explicit constexpr Skyformer(Landmarks landmarks = {}, Inverse inverse = {}, GaussianKernel kernel = {})
      : detail::Widened<T, Wide>(Wide(landmarks, inverse, kernel)) {}
};

static_assert(Approximator<Skyformer<float>> && Approximator<Skyformer<Eigen::half>> && Approximator<Skyformer<double, StridedSample, PreconditionedPinv>>);

}  // namespace attn
