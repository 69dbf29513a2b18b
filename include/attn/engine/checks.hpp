/// Checks of arguments at public entry points: one std::invalid_argument that names the argument and the numbers.
#pragma once

#include <attn/engine/simd.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <numbers>
#include <span>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn::detail {

using Eigen::Index;

/// A sum of whole numbers x of [first, last], times a stride each: up to six terms, strides in descending order, 0
/// after the last. Those of the same stride are one.
struct StrideSum {
  struct Term {
    Index stride = 0, first = 0, last = 0;
  };

  [[gnu::noinline]] void add(Term term) {
    for (Term& other : terms) {
      if (other.stride == term.stride) {
        other.first += term.first;
        other.last += term.last;
        return;
      }
      if (other.stride < term.stride) std::swap(other, term);
    }
  }

  /// Whether the terms from the given one on can add up to something in [least, most]. What the others reach leaves few
  /// x of the first one where they span no more than its stride, as in arrays whose rows, heads and items do not
  /// interleave.
  [[gnu::noinline]] bool reaches(Index least, Index most, int from = 0) const {
    if (from == kMost || terms[from].stride == 0) return least <= 0 && most >= 0;
    const auto [stride, first, last] = terms[from];
    Index lowest = least, highest = most;
    for (int i = from + 1; i < kMost; ++i) {
      lowest -= terms[i].last * terms[i].stride;
      highest -= terms[i].first * terms[i].stride;
    }
    const auto floor_of = [](Index a, Index b) { return a / b - (a % b < 0 ? 1 : 0); };
    const Index end = std::min(last, floor_of(highest, stride));
    for (Index x = std::max(first, -floor_of(-lowest, stride)); x <= end; ++x) {
      if (reaches(least - x * stride, most - x * stride, from + 1)) return true;
    }
    return false;
  }

  static constexpr int kMost = 6;
  Term terms[kMost];
};

/// So many places, one stride from each to the next.
struct MemoryStep {
  Index count = 1, stride = 0;
};

/// What an argument takes in memory: a run of bytes that lie side by side, and its repetitions along up to three
/// strides.
class Memory {
 public:
  /// A run of so many bytes at data, and its repetitions, strides in bytes. Empty where a count is 0.
  [[gnu::noinline]] Memory(const char* argument, const void* data, Index run, const std::array<MemoryStep, 3>& steps)
      : name(argument),
        run_(run),
        steps_(steps),
        first_(static_cast<Index>(reinterpret_cast<std::intptr_t>(data))),
        last_(first_ + run) {
    for (const auto& [count, stride] : steps_) {
      if (count <= 0) run_ = 0;
      (stride < 0 ? first_ : last_) += (count - 1) * stride;
    }
  }

  /// A matrix or a view of one.
  template <class M>
    requires requires(const M& m) { m.outerStride(); }
  static Memory of(const char* argument, const M& m) {
    constexpr Index kBytes = sizeof(typename M::Scalar);
    return Memory(argument, m.data(), m.cols() * kBytes, {{{m.rows(), m.outerStride() * kBytes}}});
  }

  template <class T>
  static Memory of(const char* argument, std::span<T> x) {
    return Memory(argument, x.data(), static_cast<Index>(x.size_bytes()), {});
  }

  /// Whether they share a byte: seldom more than a look at where they begin and end.
  bool overlaps(const Memory& other) const {
    if (run_ <= 0 || other.run_ <= 0 || last_ <= other.first_ || other.last_ <= first_) return false;
    return meets(other);
  }

  /// Whether two of its runs share a byte: two that differ by a positive number of one stride, and by any numbers of
  /// shorter ones.
  [[gnu::noinline]] bool overlaps_itself() const {
    StrideSum difference;
    int repeated = 0;
    for (const auto& [count, stride] : steps_) {
      if (count > 1) difference.add({std::abs(stride), 1 - count, count - 1}), ++repeated;
    }
    for (int i = 0; i < repeated && run_ > 0; ++i) {
      if (difference.terms[i].stride == 0) return true;  // strides that are 0, or the same
      difference.terms[i].first = 1;
      if (difference.reaches(1 - run_, run_ - 1, i)) return true;
    }
    return false;
  }

  /// Bytes of a run, and from each to the next.
  Index run() const { return run_; }
  Index row_stride() const { return steps_[0].stride; }

  const char* name;  ///< of the argument

 private:
  /// Whether a run of this and one of the other share a byte.
  [[gnu::noinline]] bool meets(const Memory& other) const {
    StrideSum difference;
    for (const auto& [count, stride] : steps_) difference.add({std::abs(stride), 0, count - 1});
    for (const auto& [count, stride] : other.steps_) difference.add({std::abs(stride), 1 - count, 0});
    const Index distance = first_ - other.first_;
    return difference.reaches(1 - run_ - distance, other.run_ - 1 - distance);
  }

  Index run_;
  std::array<MemoryStep, 3> steps_;
  Index first_, last_;
};

/// Throws std::invalid_argument("<who>: <text>"), the text as printf formats it. A stream would do the same, but takes
/// the compiler longer.
[[noreturn, gnu::noinline, gnu::format(printf, 2, 3)]] inline void refuse(std::string_view who, const char* format,
                                                                          ...) {
  char text[1024];
  const int printed = std::snprintf(text, sizeof text, "%.*s: ", static_cast<int>(who.size()), who.data());
  const std::size_t used = std::min(sizeof text - 1, static_cast<std::size_t>(printed));
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + used, sizeof text - used, format, arguments);
  va_end(arguments);
  throw std::invalid_argument(text);
}

/// What checks look at of a matrix: they are compiled once for all types.
struct Shape {
  template <class M>
  Shape(const M& m)  // NOLINT: implicit, so that a matrix can be passed as it is
      : rows(m.rows()), cols(m.cols()) {}

  Index rows, cols;
};

/// A map of a wrong size has a negative one.
[[gnu::noinline]] inline void check_not_empty(std::string_view who, const char* name, Shape m, Index fewest_rows = 1) {
  if (m.rows < 0 || m.cols < 0)
    refuse(who, "%s is %td x %td, should be at least %td x 1", name, m.rows, m.cols, fewest_rows);
  if (m.rows < fewest_rows || m.cols == 0) refuse(who, "%s is empty (%td x %td)", name, m.rows, m.cols);
}

[[gnu::noinline]] inline void check_length(std::string_view who, const char* name, std::size_t entries, const char* of,
                                           Index rows) {
  if (entries != 0 && entries != static_cast<std::size_t>(rows)) {
    refuse(who, "%s has %zu entries, %s has %td rows", name, entries, of, rows);
  }
}

[[gnu::noinline]] inline void check_shape(std::string_view who, const char* name, Shape m, Index rows, Index cols) {
  if (m.rows != rows || m.cols != cols)
    refuse(who, "%s is %td x %td, should be %td x %td", name, m.rows, m.cols, rows, cols);
}

/// The shapes of inputs, and how many key biases there are.
struct InputShapes {
  template <class In>
  InputShapes(const In& in)  // NOLINT: implicit, so that inputs can be passed as they are
      : q(in.q), k(in.k), v(in.v), mask(in.mask), key_biases(in.key_bias.size()), alibi_slope(in.alibi_slope) {}

  Shape q, k, v;
  const Mask& mask;
  std::size_t key_biases;
  double alibi_slope;
};

/// Windows, offsets and slopes change what a causal mask leaves.
[[gnu::noinline]] inline void check_positions(std::string_view who, const Mask& mask, double alibi_slope) {
  if (mask.window < 0) refuse(who, "window is %td, should be at least 0", mask.window);
  if (mask.num_sinks < 0) refuse(who, "num_sinks is %td, should be at least 0", mask.num_sinks);
  if (mask.window > 0 && mask.causal == Causal::none) refuse(who, "a window needs a causal mask");
  if (mask.first_query < 0) refuse(who, "first_query is %td, should be at least 0", mask.first_query);
  if (mask.first_key < 0) refuse(who, "first_key is %td, should be at least 0", mask.first_key);
  constexpr Index kMostRows = std::numeric_limits<Index>::max() / 4;  // sums of two do not overflow
  if (mask.first_query > kMostRows || mask.first_key > kMostRows) {
    refuse(who, "first_query is %td, first_key %td, should be at most %td", mask.first_query, mask.first_key,
           kMostRows);
  }
  if ((mask.first_query > 0 || mask.first_key > 0) && mask.causal != Causal::upper_left) {
    refuse(who, "first_query and first_key need the causal mask upper_left");
  }
  if (!(alibi_slope >= 0 && std::isfinite(alibi_slope))) {
    refuse(who, "alibi_slope is %g, should be finite and at least 0", alibi_slope);
  }
  constexpr double kSteepest = 0x1p64;  // times the largest distance a float
  if (alibi_slope > kSteepest) refuse(who, "alibi_slope is %g, should be at most %g", alibi_slope, kSteepest);
  if (alibi_slope > 0 && mask.causal == Causal::none) refuse(who, "an alibi_slope needs a causal mask");
}

/// Shapes of inputs agree with one another.
[[gnu::noinline]] inline void check_inputs(std::string_view who, const InputShapes& in, Index fewest_keys = 1,
                                           Index fewest_queries = 1) {
  check_not_empty(who, "q", in.q, fewest_queries);
  check_not_empty(who, "k", in.k, fewest_keys);
  check_not_empty(who, "v", in.v, fewest_keys);
  if (in.q.cols != in.k.cols) refuse(who, "q has %td columns, k has %td", in.q.cols, in.k.cols);
  if (in.k.rows != in.v.rows) refuse(who, "k has %td rows, v has %td", in.k.rows, in.v.rows);
  check_length(who, "keep_key", in.mask.keep_key.size(), "k", in.k.rows);
  check_length(who, "keep_query", in.mask.keep_query.size(), "q", in.q.rows);
  check_length(who, "key_bias", in.key_biases, "k", in.k.rows);
  check_positions(who, in.mask, in.alibi_slope);
}

/// Whether two views share an element.
template <class T>
bool overlap(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& b) {
  return Memory::of("", a).overlaps(Memory::of("", b));
}

/// Some of them: a span, but for the time that this takes the compiler.
struct Memories {
  Memories(const Memory* x, std::size_t n) : first(x), count(n) {}
  template <std::size_t kCount>
  Memories(const Memory (&x)[kCount]) : Memories(x, kCount) {}  // NOLINT: implicit, as a span would be
  template <std::size_t kCount>
  Memories(const std::array<Memory, kCount>& x) : Memories(x.data(), kCount) {}  // NOLINT: likewise

  const Memory* begin() const { return first; }
  const Memory* end() const { return first + count; }

  const Memory* first;
  std::size_t count;
};

/// What is written does not overlap what is read beside it.
[[gnu::noinline]] inline void check_apart_from(std::string_view who, const Memories& results, const Memories& inputs) {
  for (const Memory& result : results) {
    for (const Memory& input : inputs) {
      if (result.overlaps(input)) refuse(who, "%s overlaps %s", result.name, input.name);
    }
  }
}

/// Results overlap no inputs, no other results, and not themselves.
[[gnu::noinline]] inline void check_apart(std::string_view who, const Memories& results, const Memories& inputs) {
  for (std::size_t i = 0; i < results.count; ++i) {
    const Memory& result = results.first[i];
    if (result.overlaps_itself()) {
      refuse(who, "%s overlaps itself: its rows of %td bytes are %td bytes apart", result.name, result.run(),
             result.row_stride());
    }
    check_apart_from(who, {&result, 1}, inputs);
    check_apart_from(who, {&result, 1}, {results.first, i});
  }
}

/// All that a call reads.
template <class In>
  requires requires(const In& in) { in.mask.keep_query; }
std::array<Memory, 6> memory_of(const In& in) {
  return {Memory::of("q", in.q),
          Memory::of("k", in.k),
          Memory::of("v", in.v),
          Memory::of("key_bias", in.key_bias),
          Memory::of("keep_key", in.mask.keep_key),
          Memory::of("keep_query", in.mask.keep_query)};
}

/// Shapes of a backward pass agree with those of its inputs, which are checked, and what it writes, dbias included,
/// overlaps nothing. lse and dbias may be empty; where T is narrow, lse is float and dbias may be.
template <class T, class Bias = T>
void check_gradients(std::string_view who, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                     const ConstMatrixRef<T>& dout, const Gradients<T>& gradients,
                     std::span<const Arithmetic<T>> lse = {}, std::span<Bias> dbias = {}) {
  check_shape(who, "out", out, in.q.rows(), in.v.cols());
  check_shape(who, "dout", dout, in.q.rows(), in.v.cols());
  check_shape(who, "dq", gradients.dq, in.q.rows(), in.q.cols());
  check_shape(who, "dk", gradients.dk, in.k.rows(), in.k.cols());
  check_shape(who, "dv", gradients.dv, in.v.rows(), in.v.cols());
  check_length(who, "lse", lse.size(), "q", in.q.rows());
  check_length(who, "dbias", dbias.size(), "k", in.k.rows());
  const Memory results[] = {Memory::of("dq", gradients.dq), Memory::of("dk", gradients.dk),
                            Memory::of("dv", gradients.dv), Memory::of("dbias", dbias)};
  const Memory of_forward[] = {Memory::of("out", out), Memory::of("dout", dout), Memory::of("lse", lse)};
  check_apart(who, results, memory_of(in));
  check_apart_from(who, results, of_forward);
}

/// check_inputs and check_gradients.
template <class T, class Bias = T>
void check_backward(std::string_view who, const Inputs<T>& in, const ConstMatrixRef<T>& out,
                    const ConstMatrixRef<T>& dout, const Gradients<T>& gradients,
                    std::span<const Arithmetic<T>> lse = {}, std::span<Bias> dbias = {}) {
  check_inputs(who, in);
  check_gradients(who, in, out, dout, gradients, lse, dbias);
}

/// Of inputs that are checked, out has the shape of the result, lse is empty or has an entry for each of its rows, and
/// both overlap nothing.
template <class In, class T, class LogSum = T>
void check_results(std::string_view who, const In& in, const MatrixRef<T>& out, std::span<LogSum> lse = {}) {
  check_shape(who, "out", out, in.q.rows(), in.v.cols());
  check_length(who, "lse", lse.size(), "q", in.q.rows());
  const Memory results[] = {Memory::of("out", out), Memory::of("lse", lse)};
  check_apart(who, results, memory_of(in));
}

/// check_inputs and check_results.
template <class In, class T, class LogSum = T>
void check(std::string_view who, const In& in, const MatrixRef<T>& out, std::span<LogSum> lse = {}) {
  check_inputs(who, in);
  check_results(who, in, out, lse);
}

/// What a forward pass saved is of inputs like those of the backward pass: of as many of its rows or columns.
inline void check_saved(std::string_view who, const char* what, Index saved, Index expected) {
  if (saved != expected) {
    refuse(who, "saved holds %td %s, should hold %td: it is not of a forward pass of these inputs", saved, what,
           expected);
  }
}

inline void check_finite(std::string_view who, const char* name, double value) {
  if (!is_finite(value)) refuse(who, "%s is %g, should be finite", name, value);
}

inline void check_at_least(std::string_view who, const char* name, double value, double least) {
  if (!(value >= least)) refuse(who, "%s is %g, should be at least %g", name, value, least);
}

/// What a method takes beside masks of rows. positions: what depends on where tokens are in the sequence.
struct MaskSupport {
  bool causal = false, key_bias = false, positions = false;

  /// What of these inputs it does not take; null if it takes all.
  template <class In>
  constexpr const char* lacks(const In& in) const {
    if (in.mask.causal != Causal::none && !causal) return "causal masks";
    if (in.mask.window != 0 && !positions) return "windows";
    if ((in.mask.first_query != 0 || in.mask.first_key != 0) && !positions) return "offsets of rows";
    if (in.alibi_slope != 0 && !positions) return "ALiBi slopes";
    return in.key_bias.empty() || key_bias ? nullptr : "key biases";
  }

  template <class In>
  void check(std::string_view who, const In& in) const {
    if (const char* const what = lacks(in); what != nullptr) refuse(who, "%s are not supported", what);
  }
};

/// Landmark policies with a count have at least one; others are taken at their word.
template <class Landmarks>
void check_landmarks(std::string_view who, const Landmarks& landmarks) {
  if constexpr (requires { landmarks.num_landmarks; }) {
    check_at_least(who, "num_landmarks", static_cast<double>(landmarks.num_landmarks), 1);
  }
}

/// What a policy, perhaps a user's, gives as landmarks of a matrix of d features: at least so many, of as many
/// features.
template <class T>
void check_landmark_rows(std::string_view who, const char* of, const MatrixRef<T>& landmarks, Index least, Index d) {
  if (landmarks.rows() >= least && landmarks.cols() == d) return;
  refuse(who, "landmarks of %s are %td x %td, should be at least %td x %td", of, landmarks.rows(), landmarks.cols(),
         least, d);
}

/// What arithmetic with matrices of T is in: its limits are those of options.
template <class T>
using Computing = std::conditional_t<NarrowScalar<T>, float, T>;

template <class T>
inline constexpr const char* kComputingName = std::is_same_v<Computing<T>, float> ? "float" : "double";

/// The largest parameter of a kernel that the computing type holds in units of log2. Small ones may vanish: with them
/// all scores do.
template <class T>
inline constexpr double kMostScore =
    static_cast<double>(std::numeric_limits<Computing<T>>::max()) / std::numbers::log2e;

/// An option is a number of the type that computes, too.
template <class T>
void check_held(std::string_view who, const char* name, double value, double most) {
  check_finite(who, name, value);
  if (!(std::abs(value) <= most)) {
    refuse(who, "%s is %g, should be at most %g in magnitude for arithmetic in %s", name, value, most,
           kComputingName<T>);
  }
}

/// kernel is one for tokens of d features.
template <class T, ScoreKernel Kernel>
void check_kernel(std::string_view who, const Kernel& kernel, Index d) {
  if constexpr (std::is_same_v<Kernel, GaussianKernel>) {
    if (kernel.bandwidth && !(std::isfinite(*kernel.bandwidth) && *kernel.bandwidth > 0)) {
      refuse(who, "bandwidth is %g, should be positive and finite", *kernel.bandwidth);
    }
    const double scale = score_parameters(kernel, d).scale;
    if (scale <= kMostScore<T>) return;
    refuse(who, "bandwidth is %g, should be at least %g for arithmetic in %s", kernel.bandwidth.value_or(0),
           std::sqrt(1 / kMostScore<T>), kComputingName<T>);
  } else {
    const ScoreParameters parameters = score_parameters(kernel, d);
    check_held<T>(who, "scale", parameters.scale, kMostScore<T>);
    check_held<T>(who, "bias", parameters.bias, kMostScore<T>);
  }
}

/// gamma, what is added to a matrix's diagonal: as far as its inverse, and that of sums of so large numbers, has all
/// digits.
template <class T>
void check_gamma(std::string_view who, double gamma) {
  using Limits = std::numeric_limits<Computing<T>>;
  check_at_least(who, "gamma", gamma, 0);
  check_held<T>(who, "gamma", gamma, static_cast<double>(Limits::epsilon()) / static_cast<double>(Limits::min()));
}

/// Options of a core, by check<T>(who) where there is one, with T what it will compute in.
template <class T, class Inverse>
void check_core(std::string_view who, const Inverse& inverse) {
  if constexpr (requires { inverse.template check<Computing<T>>(who); }) {
    inverse.template check<Computing<T>>(who);
  } else {
    inverse.check(who);
  }
}

/// states, as RowStates, have the lengths and the shape of results of rows x cols.
template <class States>
void check_states(std::string_view who, const States& states, Index rows, Index cols) {
  check_shape(who, "weighted", states.weighted, rows, cols);
  for (const auto& [name, values] : {std::pair{"maximum", states.maximum}, std::pair{"sum", states.sum}}) {
    const auto entries = static_cast<Index>(values.size());
    if (entries != rows) refuse(who, "%s has %td entries, weighted has %td rows", name, entries, rows);
  }
}

template <class States>
  requires requires(const States& states) { states.weighted; }
std::array<Memory, 3> memory_of(const States& states) {
  return {Memory::of("weighted", states.weighted), Memory::of("maximum", states.maximum),
          Memory::of("sum", states.sum)};
}

/// states are those of the rows of in, which may have no keys and be of a narrower type, and overlap nothing.
template <class In, class States>
void check_partial(std::string_view who, const In& in, const States& states) {
  check_inputs(who, in, 0);
  check_states(who, states, in.q.rows(), in.v.cols());
  check_apart(who, memory_of(states), memory_of(in));
}

/// Both states are of as many rows, and into overlaps nothing.
template <class States>
void check_merge(std::string_view who, const States& into, const States& from) {
  check_not_empty(who, "weighted", into.weighted);
  check_states(who, into, from.weighted.rows(), from.weighted.cols());
  check_states(who, from, into.weighted.rows(), into.weighted.cols());
  check_apart(who, memory_of(into), memory_of(from));
}

/// out has the shape of states and lse is empty or has an entry for each row; both overlap nothing, but that out may be
/// states.weighted itself.
template <class T, class States, class S>
void check_finish(std::string_view who, const States& states, const MatrixRef<T>& out, std::span<S> lse) {
  check_not_empty(who, "out", out);
  check_states(who, states, out.rows(), out.cols());
  check_length(who, "lse", lse.size(), "out", out.rows());
  const std::array<Memory, 3> read = memory_of(states);
  const Memory results[] = {Memory::of("out", out), Memory::of("lse", lse)};
  const bool same_rows = out.rows() == 1 || out.outerStride() == states.weighted.outerStride();
  const bool in_place =
      std::is_same_v<T, S> && same_rows && static_cast<const void*>(out.data()) == states.weighted.data();
  const std::size_t written = in_place ? 1 : 0;
  check_apart(who, results, {read.data() + written, read.size() - written});
}

}  // namespace attn::detail
