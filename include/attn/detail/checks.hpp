/// Checks of arguments at public entry points: one std::invalid_argument that names the argument and the numbers.
#pragma once

#include <attn/detail/float_bits.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn::detail {

/// Throws std::invalid_argument("<who>: <text>"), the text as printf formats it. A stream would do the same, but takes the compiler longer.
[[noreturn, gnu::noinline, gnu::format(printf, 2, 3)]] inline void refuse(std::string_view who, const char* format, ...) {
  char text[1024];
  const int printed = std::snprintf(text, sizeof text, "%.*s: ", static_cast<int>(who.size()), who.data());
  const std::size_t used = std::min(sizeof text - 1, static_cast<std::size_t>(printed));
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + used, sizeof text - used, format, arguments);
  va_end(arguments);
  throw std::invalid_argument(text);
}

template <class M>
void check_not_empty(std::string_view who, const char* name, const M& m, Index fewest_rows = 1) {
  if (m.rows() < fewest_rows || m.cols() == 0) refuse(who, "%s is empty (%td x %td)", name, m.rows(), m.cols());
}

inline void check_length(std::string_view who, const char* name, std::size_t entries, const char* of, Index rows) {
  if (entries != 0 && entries != static_cast<std::size_t>(rows)) {
    refuse(who, "%s has %zu entries, %s has %td rows", name, entries, of, rows);
  }
}

/// Shapes of inputs agree with one another.
template <class T>
void check_inputs(std::string_view who, const Inputs<T>& in, Index fewest_keys = 1) {
  check_not_empty(who, "q", in.q);
  check_not_empty(who, "k", in.k, fewest_keys);
  check_not_empty(who, "v", in.v, fewest_keys);
  if (in.q.cols() != in.k.cols()) refuse(who, "q has %td columns, k has %td", in.q.cols(), in.k.cols());
  if (in.k.rows() != in.v.rows()) refuse(who, "k has %td rows, v has %td", in.k.rows(), in.v.rows());
  check_length(who, "keep_key", in.mask.keep_key.size(), "k", in.k.rows());
  check_length(who, "keep_query", in.mask.keep_query.size(), "q", in.q.rows());
  check_length(who, "key_bias", in.key_bias.size(), "k", in.k.rows());
}

template <class T>
void check_shape(std::string_view who, const char* name, const MatrixRef<T>& m, Index rows, Index cols) {
  if (m.rows() != rows || m.cols() != cols) refuse(who, "%s is %td x %td, should be %td x %td", name, m.rows(), m.cols(), rows, cols);
}

template <class T>
void check_shape(std::string_view who, const char* name, const ConstMatrixRef<T>& m, Index rows, Index cols) {
  if (m.rows() != rows || m.cols() != cols) refuse(who, "%s is %td x %td, should be %td x %td", name, m.rows(), m.cols(), rows, cols);
}

/// Whether two views share an element. Their rows are walked only where their memory may meet, as that of two heads'
/// columns does.
template <class T>
bool overlap(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& b) {
  const auto row = [](const ConstMatrixRef<T>& m, Index i) { return m.data() + i * m.outerStride(); };
  const std::less_equal<const T*> at_most;
  if (at_most(row(a, a.rows() - 1) + a.cols(), b.data())) return false;
  if (at_most(row(b, b.rows() - 1) + b.cols(), a.data())) return false;
  for (Index i = 0, j = 0; i < a.rows() && j < b.rows();) {
    if (at_most(row(a, i) + a.cols(), row(b, j))) {
      ++i;
    } else if (at_most(row(b, j) + b.cols(), row(a, i))) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

/// A result does not overlap what is read, or written, beside it.
template <class T>
void check_apart(std::string_view who, const char* name, const MatrixRef<T>& result, const char* other_name,
                 const std::type_identity_t<ConstMatrixRef<T>>& other) {
  if (overlap<T>(result, other)) refuse(who, "%s overlaps %s", name, other_name);
}

template <class T>
void check_apart(std::string_view who, const char* name, const MatrixRef<T>& result, const Inputs<T>& in) {
  check_apart(who, name, result, "q", in.q);
  check_apart(who, name, result, "k", in.k);
  check_apart(who, name, result, "v", in.v);
}

/// Shapes of a backward pass agree with those of its inputs, and the gradients overlap nothing.
template <class T>
void check_backward(std::string_view who, const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                    const Gradients<T>& gradients) {
  check_inputs(who, in);
  check_shape(who, "out", out, in.q.rows(), in.v.cols());
  check_shape(who, "dout", dout, in.q.rows(), in.v.cols());
  check_shape(who, "dq", gradients.dq, in.q.rows(), in.q.cols());
  check_shape(who, "dk", gradients.dk, in.k.rows(), in.k.cols());
  check_shape(who, "dv", gradients.dv, in.v.rows(), in.v.cols());
  const std::pair<const char*, const MatrixRef<T>&> results[] = {{"dq", gradients.dq}, {"dk", gradients.dk}, {"dv", gradients.dv}};
  for (const auto& [name, result] : results) {
    check_apart(who, name, result, in);
    check_apart(who, name, result, "out", out);
    check_apart(who, name, result, "dout", dout);
  }
  check_apart(who, "dk", gradients.dk, "dq", gradients.dq);
  check_apart(who, "dv", gradients.dv, "dq", gradients.dq);
  check_apart(who, "dv", gradients.dv, "dk", gradients.dk);
}

/// Shapes of inputs agree with one another, and out has the shape of the result and overlaps none of them.
template <class T>
void check(std::string_view who, const Inputs<T>& in, const MatrixRef<T>& out) {
  check_inputs(who, in);
  check_shape(who, "out", out, in.q.rows(), in.v.cols());
  check_apart(who, "out", out, in);
}

/// What a forward pass saved is of inputs like those of the backward pass: of as many of its rows or columns.
inline void check_saved(std::string_view who, const char* what, Index saved, Index expected) {
  if (saved != expected) {
    refuse(who, "saved holds %td %s, should hold %td: it is not of a forward pass of these inputs", saved, what, expected);
  }
}

inline void check_finite(std::string_view who, const char* name, double value) {
  if (!is_finite(value)) refuse(who, "%s is %g, should be finite", name, value);
}

inline void check_at_least(std::string_view who, const char* name, double value, double least) {
  if (!(value >= least)) refuse(who, "%s is %g, should be at least %g", name, value, least);
}

template <class In>
void check_not_causal(std::string_view who, const In& in) {
  if (in.mask.causal != Causal::none) refuse(who, "causal masks are not supported");
}

template <class In>
void check_no_bias(std::string_view who, const In& in) {
  if (!in.key_bias.empty()) refuse(who, "key biases are not supported");
}

/// Landmark policies with a count have at least one; others are taken at their word.
template <class Landmarks>
void check_landmarks(std::string_view who, const Landmarks& landmarks) {
  if constexpr (requires { landmarks.num_landmarks; }) {
    check_at_least(who, "num_landmarks", static_cast<double>(landmarks.num_landmarks), 1);
  }
}

inline void check_kernel(std::string_view who, const SoftmaxKernel& kernel) {
  if (kernel.scale) check_finite(who, "scale", *kernel.scale);
}

inline void check_kernel(std::string_view who, const GaussianKernel& kernel) {
  if (kernel.bandwidth && !(is_finite(*kernel.bandwidth) && *kernel.bandwidth > 0)) {
    refuse(who, "bandwidth is %g, should be positive and finite", *kernel.bandwidth);
  }
}

/// A kernel of the user's has no fields to name; kernel_matmul checks what it returns.
template <ScoreKernel Kernel>
void check_kernel(std::string_view, const Kernel&) {}

}  // namespace attn::detail
