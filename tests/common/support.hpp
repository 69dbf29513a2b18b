/// What the tests share: comparisons, padded matrices, executors.
#pragma once

#include <attn/context.hpp>
#include <attn/matrix.hpp>
#ifdef _OPENMP
#include <attn/openmp.hpp>
#endif

#include "common/inputs.hpp"
#include "common/reference.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace test {

/// What the std::invalid_argument that call throws says.
template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "no error";
}

using attn::ConstMatrixRef;
using attn::Context;
using attn::Inputs;
using attn::Mask;
using attn::MatrixRef;

using Scalars = ::testing::Types<float, double>;
using NarrowScalars = ::testing::Types<Eigen::half, Eigen::bfloat16>;

template <class T>
inline constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <class T>
inline constexpr T kInf = std::numeric_limits<T>::infinity();

/// Largest relative Frobenius error of the exact methods.
template <class T>
inline constexpr double kExactTolerance = std::is_same_v<T, float> ? 2e-6 : 1e-13;

/// |a - b|_F / |b|_F; 0 where both are zero.
double relative_error(const Matrix<double>& a, const reference::Matrix& b);

template <class T>
double relative_error(const Matrix<T>& a, const reference::Matrix& b) {
  return relative_error(Matrix<double>(a.template cast<double>()), b);
}

template <class T>
bool bitwise_equal(const Matrix<T>& a, const Matrix<T>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

/// Whether row i of a and of b have the same bits.
template <class T>
bool same_row(const Matrix<T>& a, const Matrix<T>& b, Index i) {
  return std::memcmp(a.row(i).data(), b.row(i).data(), static_cast<std::size_t>(a.cols()) * sizeof(T)) == 0;
}

/// A matrix in a buffer with padding columns that hold a sentinel, and not an element more, so that an address
/// sanitizer sees what is read behind it.
template <class T>
class Padded {
 public:
  Padded(Index rows, Index cols, Index padding, T sentinel)
      : rows_(rows),
        cols_(cols),
        stride_(cols + padding),
        sentinel_(sentinel),
        data_(static_cast<std::size_t>((rows - 1) * stride_ + cols), sentinel) {}
  Padded(const Matrix<T>& m, Index padding, T sentinel) : Padded(m.rows(), m.cols(), padding, sentinel) { view() = m; }

  MatrixRef<T> view() { return {data_.data(), rows_, cols_, stride_}; }
  Matrix<T> matrix() { return view(); }

  bool padding_untouched() const {
    for (std::size_t at = 0; at < data_.size(); ++at) {
      const bool is_padding = static_cast<Index>(at) % stride_ >= cols_;
      if (is_padding && std::memcmp(&data_[at], &sentinel_, sizeof(T)) != 0) return false;
    }
    return true;
  }

 private:
  Index rows_, cols_, stride_;
  T sentinel_;
  std::vector<T> data_;
};

/// An executor as a user would write it: threads that take items from a counter.
struct Threads {
  int count = 2;

  int workers() const { return count; }

  template <class Task>
  void run(Index n, const Task& task) const {
    std::atomic<Index> next = 0;
    const auto work = [&](int worker) {
      for (Index item = next++; item < n; item = next++) task(item, worker);
    };
    std::vector<std::thread> threads;
    for (int worker = 1; worker < count; ++worker) threads.emplace_back(work, worker);
    work(0);
    for (auto& thread : threads) thread.join();
  }
};

/// An executor that runs items last to first.
struct Backwards {
  int workers() const { return 1; }
  template <class Task>
  void run(Index n, const Task& task) const {
    for (Index item = n - 1; item >= 0; --item) task(item, 0);
  }
};

/// A context for each kind of executor.
std::vector<std::pair<std::string, Context>> contexts();

/// What a method makes of the inputs, in a matrix that held NaN.
template <class A>
Matrix<typename A::Scalar> forward(const A& method, const Inputs<typename A::Scalar>& in, Context& context) {
  using T = typename A::Scalar;
  Matrix<T> out = Matrix<T>::Constant(in.q.rows(), in.v.cols(), static_cast<T>(kNaN<float>));
  method.forward(in, out, context);
  return out;
}

template <class A>
Matrix<typename A::Scalar> forward(const A& method, const Inputs<typename A::Scalar>& in) {
  Context context;
  return forward(method, in, context);
}

/// Shapes and masks, for messages.
template <class T>
std::string describe(const Inputs<T>& in) {
  const auto text = [](Index x) { return std::to_string(x); };
  return "n_q " + text(in.q.rows()) + ", n_k " + text(in.k.rows()) + ", d " + text(in.q.cols()) + ", d_v " +
         text(in.v.cols()) + ", causal " + text(static_cast<Index>(in.mask.causal)) +
         (in.mask.keep_key.empty() ? "" : ", keep_key") + (in.mask.keep_query.empty() ? "" : ", keep_query") +
         (in.key_bias.empty() ? "" : ", key_bias");
}

/// The oracle's view of the same problem.
template <class T>
reference::Problem to_reference(const Inputs<T>& in) {
  reference::Problem p{in.q.template cast<double>(),
                       in.k.template cast<double>(),
                       in.v.template cast<double>(),
                       in.mask,
                       {},
                       in.alibi_slope};
  const auto n_bias = static_cast<Index>(in.key_bias.size());
  if (n_bias > 0) p.key_bias = Eigen::Map<const Eigen::VectorX<T>>(in.key_bias.data(), n_bias).template cast<double>();
  return p;
}

namespace detail {

void expect_close(const reference::Matrix& out, const reference::Result& expected, const reference::Problem& p,
                  const reference::Kernel& kernel, double tolerance, double smallest);

}  // namespace detail

/// out agrees with the oracle: in Frobenius norm; row by row relative to the row's weight times the largest |v|, so
/// that a small row counts as much as a large one; and exactly where a row is zero.
template <class T>
void expect_close(const Matrix<T>& out, const reference::Result& expected, const reference::Problem& p,
                  const reference::Kernel& kernel, double tolerance = kExactTolerance<T>) {
  detail::expect_close(out.template cast<double>(), expected, p, kernel, tolerance,
                       static_cast<double>(std::numeric_limits<T>::min()));
}

}  // namespace test
