/// Skyformer: Gaussian attention through landmarks, by a Nystrom method lifted to a positive semidefinite matrix.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/kernel_matrix.hpp>
#include <attn/exact.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>

#include <algorithm>
#include <cmath>
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
    detail::check(kName, in, out);
    detail::check_kernel(kName, kernel_);
    detail::check_not_causal(kName, in);
    detail::check_landmarks(kName, landmarks_);
    inverse_.check(kName);
    Scratch scratch = context.scratch();
    MatrixRef<T> land = landmarks_.select(in, scratch);
    if (land.rows() == 0) return void(out.setZero());  // no query or no key is kept
    const Index m = land.rows(), d_v = in.v.cols();
    MatrixRef<T> values = scratch.matrix<T>(m, d_v + 2), a = scratch.matrix<T>(m, m);
    sum_over_keys(in, land, values.leftCols(d_v + 1), context, scratch);  // kappa(L, k) [v 1]
    detail::kernel_matrix<GaussianKernel, T>(gram_kernel(), land, land, a, context);  // kappa(L, L)
    inverse_.apply(a, MatrixRef<T>(values.leftCols(d_v + 1)), context);  // (kappa(L, L) + gamma I)^-1 kappa(L, k) [v 1]
    if (kernel_.rows == Rows::raw) {
      kernel_matmul(kernel_, Inputs<T>{in.q, land, values.leftCols(d_v), queries_only(in.mask)}, out, context);
    } else {
      values.col(d_v + 1) = values.col(d_v).cwiseAbs();
      divide_rows(in, land, values, out, context, scratch);
    }
  }

 private:
  /// kappa(L, L) has raw rows whatever those of the result are.
  GaussianKernel gram_kernel() const { return {.bandwidth = kernel_.bandwidth, .rows = Rows::raw}; }

  /// sums (m, d_v + 1) <- kappa(L, k) [v 1]; where the rows of the result are normalized, relative to the largest of kappa's maxima, a
  /// factor that cancels, so that large key biases do not overflow.
  void sum_over_keys(const Inputs<T>& in, MatrixRef<T> land, MatrixRef<T> sums, Context& context, Scratch& scratch) const {
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
  }

  /// out <- (F z) / max(F z1, 1e-6 F |z1|) for values = [z z1 |z1|], F = kappa(q, L) up to a factor of each row, which cancels: its rows
  /// are normalised, so that queries far from every landmark stay finite. Some queries at a time, to keep the three columns small.
  void divide_rows(const Inputs<T>& in, MatrixRef<T> land, MatrixRef<T> values, MatrixRef<T> out, Context& context,
                   Scratch& scratch) const {
    constexpr Index kQueries = 4096;
    const Index d_v = out.cols();
    MatrixRef<T> parts = scratch.matrix<T>(std::min(kQueries, out.rows()), d_v + 2);
    for (Index first = 0; first < out.rows(); first += kQueries) {
      const Index count = std::min(kQueries, out.rows() - first);
      Mask mask = queries_only(in.mask);
      if (!mask.keep_query.empty()) mask.keep_query = mask.keep_query.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
      kernel_matmul(kernel_, Inputs<T>{in.q.middleRows(first, count), land, values, mask}, parts.topRows(count), context);
      for (Index i = 0; i < count; ++i) {
        const T divisor = std::max(parts(i, d_v), T(1e-6) * parts(i, d_v + 1));
        if (divisor == 0) {
          out.row(first + i).setZero();
        } else {
          out.row(first + i) = parts.row(i).head(d_v) / divisor;
        }
      }
    }
  }

  Landmarks landmarks_;
  Inverse inverse_;
  GaussianKernel kernel_;
};

static_assert(Approximator<Skyformer<float>> && Approximator<Skyformer<double, StridedSample, PreconditionedPinv>>);

}  // namespace attn
