/// Problems whose shapes, strides, masks and options are drawn from a source of numbers, and how far a method's result
/// is from the oracle's. A source has below(n), uniform in [0, n), and normal(rows, cols).
#pragma once

#include <attn/landmarks.hpp>
#include <attn/any_approximator.hpp>

#include "common/support.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace test {

/// Inputs in padded buffers, where padding holds NaN, and room for the result. size: standard deviation of q's and k's
/// entries.
template <class T>
class RandomProblem {
 public:
  template <class Source>
  RandomProblem(Source& source, Index longest, bool equal_lengths, bool any_mask)
      : shape_(draw_shape(source, longest, equal_lengths)),
        q_(draw(source, shape_.n_q, shape_.d, kSizes[source.below(3)])),
        k_(draw(source, shape_.n_k, shape_.d, kSizes[source.below(3)])),
        v_(draw(source, shape_.n_k, shape_.d_v, 1)),
        out_(shape_.n_q, shape_.d_v, source.below(9), kSentinel),
        keep_query_(draw_mask(source, shape_.n_q)),
        keep_key_(equal_lengths ? keep_query_ : draw_mask(source, shape_.n_k)) {
    if (!any_mask) return;
    causal_ = static_cast<attn::Causal>(source.below(3));
    if (source.below(3) == 0)
      key_bias_ = random_key_bias<T>(shape_.n_k, 0.1, static_cast<std::uint64_t>(source.below(1000)));
  }

  Inputs<T> inputs() {
    return {.q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .mask = {.causal = causal_, .keep_key = keep_key_, .keep_query = keep_query_},
            .key_bias = key_bias_};
  }
  MatrixRef<T> out() { return out_.view(); }
  bool padding_untouched() const { return out_.padding_untouched(); }

  std::string text() { return describe(inputs()) + (sizeof(T) == 4 ? ", float" : ", double"); }

 private:
  static constexpr double kSizes[] = {0.05, 0.55, 1.0};
  static constexpr T kSentinel = T(-7);

  /// Lengths and widths at which loops end early, or one of any other.
  template <class Source>
  static Index draw_length(Source& source, Index longest) {
    constexpr Index kEdges[] = {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129};
    const Index n = source.below(2) == 0 ? kEdges[source.below(std::size(kEdges))] : 1 + source.below(longest);
    return std::min(n, longest);
  }

  template <class Source>
  static Shape draw_shape(Source& source, Index longest, bool equal_lengths) {
    constexpr Index kWidest = 70;
    const Index n_q = draw_length(source, longest), n_k = draw_length(source, longest);
    return {n_q, equal_lengths ? n_q : n_k, draw_length(source, kWidest), draw_length(source, kWidest)};
  }

  template <class Source>
  static Padded<T> draw(Source& source, Index rows, Index cols, double size) {
    const Matrix<T> m = (size * source.normal(rows, cols)).template cast<T>();
    return Padded<T>(m, source.below(9), kNaN<T>);
  }

  /// None, or one that keeps nothing, everything, or some.
  template <class Source>
  static std::vector<std::uint8_t> draw_mask(Source& source, Index n) {
    if (source.below(2) == 0) return {};
    constexpr double kKept[] = {0, 0.1, 0.5, 0.9, 1};
    return random_keep(n, kKept[source.below(5)], static_cast<std::uint64_t>(source.below(1000)));
  }

  Shape shape_;
  Padded<T> q_, k_, v_, out_;
  std::vector<std::uint8_t> keep_query_, keep_key_;
  attn::Causal causal_ = attn::Causal::none;
  std::vector<T> key_bias_{};
};

/// What the oracle gives for a method, and the Frobenius norm of the error that its arithmetic may have.
struct Expected {
  reference::Matrix out;
  double error;
};

namespace detail {

inline Index count_kept(std::span<const std::uint8_t> keep, Index n) {
  return keep.empty() ? n : static_cast<Index>(keep.size()) - std::count(keep.begin(), keep.end(), std::uint8_t{0});
}

/// The rows that UniformSample draws, which have tests of their own.
template <class T>
reference::Matrix uniform_sample(const Inputs<T>& in, const attn::MethodOptions& options) {
  Context context;
  attn::Scratch scratch = context.scratch();
  return attn::UniformSample{.num_landmarks = *options.num_landmarks, .seed = options.seed}
      .template select<T>(in, scratch)
      .template cast<double>();
}

}  // namespace detail

/// For softmax, gaussian, nystrom, skyformer or lifted-softmax, with a number of landmarks and gamma in options.
template <class T>
Expected expected(std::string_view name, const attn::MethodOptions& options, const Inputs<T>& in) {
  const reference::Problem p = to_reference(in);
  const Index d = in.q.cols(), m = *options.num_landmarks;
  const bool normalized = options.rows == attn::Rows::normalized;
  const auto softmax = reference::softmax_kernel(d), gaussian = reference::gaussian_kernel(d, {}, normalized);
  const double logits =
      1 + softmax.scale * std::sqrt(p.q.rowwise().squaredNorm().maxCoeff() * p.k.rowwise().squaredNorm().maxCoeff());
  const double exact = kExactTolerance<T> * logits, landmarks = (sizeof(T) == 4 ? 1e-4 : 1e-9) * logits;
  reference::Problem terms = p;
  terms.v = p.v.cwiseAbs();  // the sizes of what is added up
  const auto of_exact = [&](const reference::Kernel& kernel) -> Expected {
    return {attend(kernel, p).out, exact * attend(kernel, terms).out.norm()};
  };
  const auto of_landmarks = [&](const auto& method) -> Expected {
    const reference::Matrix out = method(p);
    return {out, landmarks * std::max(out.norm(), method(terms).norm())};
  };
  if (name == "softmax") return of_exact(softmax);
  if (name == "gaussian") return of_exact(gaussian);
  if (name == "nystrom") {
    const Index kept =
        std::min(detail::count_kept(in.mask.keep_query, p.q.rows()), detail::count_kept(in.mask.keep_key, p.k.rows()));
    if (m >= kept) return of_exact(softmax);
    return of_landmarks([&](const reference::Problem& x) { return nystrom(softmax, x, m, 6); });
  }
  const reference::Matrix sampled = detail::uniform_sample(in, options);
  if (name == "skyformer") {
    const auto inverse = [&](const reference::Matrix& a) { return reference::ridge_inverse(a, *options.gamma); };
    return of_landmarks([&](const reference::Problem& x) { return skyformer(gaussian, x, sampled, inverse); });
  }
  const Expected lifted = of_landmarks(
      [&](const reference::Problem& x) { return lifted_softmax(softmax.scale, x, sampled, *options.gamma); });
  return {lifted.out, 100 * lifted.error};  // its divisors may come near 0
}

/// How many times the error that it may have a result has: infinitely many if it holds a NaN that it should not.
template <class T>
double error_ratio(const reference::Matrix& out, const Expected& expected) {
  const double error = (out - expected.out).norm();
  if (error == 0) return 0;
  const double underflow = static_cast<double>(std::numeric_limits<T>::min()) * static_cast<double>(out.size());
  const double ratio = error / (expected.error + underflow);
  return std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
}

}  // namespace test
