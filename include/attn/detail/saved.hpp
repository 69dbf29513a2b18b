/// Whether what a forward pass saved is of the same inputs and options as a backward pass, which relies on it.
#pragma once

#include <attn/detail/split_mix64.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <concepts>
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace attn::detail {

/// A number that tells which of n rows are dropped, as good as different for different ones; 0 for none.
template <class Keeps>
std::uint64_t dropped_rows(Index n, const Keeps& keeps) {
  std::uint64_t all = 0;
  for (Index i = 0; i < n; ++i) {
    if (!keeps(i)) all += SplitMix64(static_cast<std::uint64_t>(i))();
  }
  return all;
}

/// The inputs of a pass but for their elements, and its kernel.
struct PassInputs {
  Index n_q = 0, n_k = 0, d = 0, d_v = 0;
  std::uint64_t dropped_queries = 0, dropped_keys = 0;
  Causal causal = Causal::none;
  Index window = 0, num_sinks = 0, offset = 0;
  Index first_key = 0;  ///< where there are first keys that stay in sight
  bool has_bias = false;
  double alibi_slope = 0;
  ScoreParameters kernel{};

  template <ScoreKernel Kernel, class T>
  static PassInputs of(const Kernel& kernel, const Sources<T>& in) {
    const bool drops_keys = !in.mask.keep_key.empty() || !in.key_bias.empty();
    return {.n_q = in.q.rows(),
            .n_k = in.k.rows(),
            .d = in.k.cols(),
            .d_v = in.v.cols(),
            .dropped_queries = in.mask.keep_query.empty() ? 0 : dropped_rows(in.q.rows(), kept_queries(in)),
            .dropped_keys = drops_keys ? dropped_rows(in.k.rows(), kept_keys(in)) : 0,
            .causal = in.mask.causal,
            .window = in.mask.window,
            .num_sinks = in.mask.num_sinks,
            .offset = in.mask.first_query - in.mask.first_key,
            .first_key = in.mask.window > 0 && in.mask.num_sinks > 0 ? in.mask.first_key : 0,
            .has_bias = !in.key_bias.empty(),
            .alibi_slope = in.alibi_slope,
            .kernel = score_parameters(kernel, in.k.cols())};
  }

  /// Throws std::invalid_argument unless now is the same.
  void check(std::string_view who, const PassInputs& now) const {
    check_saved(who, "rows of q", n_q, now.n_q);
    check_saved(who, "rows of k", n_k, now.n_k);
    check_saved(who, "columns of k", d, now.d);
    check_saved(who, "columns of v", d_v, now.d_v);
    const char* other = nullptr;
    if (has_bias != now.has_bias) other = has_bias ? "key biases" : "no key biases";
    if (dropped_queries != now.dropped_queries || dropped_keys != now.dropped_keys || causal != now.causal ||
        window != now.window || num_sinks != now.num_sinks || offset != now.offset || first_key != now.first_key)
      other = "another mask";
    if (alibi_slope != now.alibi_slope) other = "another alibi_slope";
    if (other != nullptr) refuse(who, "saved is of a forward pass with %s", other);
    if (kernel.scale == now.kernel.scale && kernel.bias == now.kernel.bias && kernel.rows == now.kernel.rows) return;
    const auto name = [](Rows rows) { return rows == Rows::raw ? "raw" : "normalized"; };
    refuse(who, "saved is of a forward pass with scale %g, bias %g and %s rows, should be of %g, %g and %s",
           kernel.scale, kernel.bias, name(kernel.rows), now.kernel.scale, now.kernel.bias, name(now.kernel.rows));
  }
};

/// In the place of an option whose type is not regular: nothing is known of it but its type.
struct AnyOption {
  AnyOption() = default;
  template <class Option>
  explicit AnyOption(const Option&) {}
  friend bool operator==(AnyOption, AnyOption) { return true; }
};

template <class Option>
using SavedOption = std::conditional_t<std::regular<Option>, Option, AnyOption>;

/// A forward pass of a method with a kernel, a choice of landmarks and another option: what its backward pass relies on
/// beside what is saved of the elements.
template <ScoreKernel Kernel, class Landmarks, class Option>
struct ForwardPass {
  PassInputs inputs{};
  Index num_landmarks = 0;  ///< that the policy says it chooses, or 0
  SavedOption<Landmarks> landmarks{};
  SavedOption<Option> option{};

  template <class T>
  static ForwardPass of(const Kernel& kernel, const Sources<T>& in, const Landmarks& landmarks, const Option& option) {
    Index num_landmarks = 0;
    if constexpr (requires { landmarks.num_landmarks; }) num_landmarks = static_cast<Index>(landmarks.num_landmarks);
    return {PassInputs::of(kernel, in), num_landmarks, SavedOption<Landmarks>(landmarks), SavedOption<Option>(option)};
  }

  /// Throws std::invalid_argument unless now is the same.
  void check(std::string_view who, const ForwardPass& now) const {
    inputs.check(who, now.inputs);
    check_saved(who, "landmarks", num_landmarks, now.num_landmarks);
    if (landmarks == now.landmarks && option == now.option) return;
    refuse(who, "saved is of a forward pass with other options");
  }
};

/// What a backward pass needs of a forward pass: State, of its elements, and what else it relies on.
template <class State, class Pass>
struct Saved : State {
  Pass pass{};
};

}  // namespace attn::detail
