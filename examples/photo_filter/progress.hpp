/// A method that shows a progress bar.
#pragma once

#include "common/progress_bar.hpp"

#include <attn/any_approximator.hpp>

#include <algorithm>
#include <string_view>
#include <utility>

/// A method applied to kRowsAtATime queries at a time, with a progress bar. Only for exact methods, in which a query's
/// result does not depend on the other queries. The inputs are viewed, not copied.
class WithProgress {
 public:
  using Scalar = float;
  static constexpr std::string_view kName = "exact";
  static constexpr attn::Index kRowsAtATime = 2048;

  explicit WithProgress(attn::AnyApproximator<float> exact) : exact_(std::move(exact)) {}

  bool supports(const attn::Inputs<float>& in) const {
    return in.mask.causal == attn::Causal::none && in.mask.keep_query.empty() && exact_.supports(in);
  }

  void forward(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context& context) const {
    const ProgressBar bar(exact_.name());
    const attn::Index n = in.q.rows();
    for (attn::Index first = 0; first < n; first += kRowsAtATime) {
      bar.show(first, n);
      const attn::Index rows = std::min(kRowsAtATime, n - first);
      exact_.forward(
          {.q = in.q.middleRows(first, rows), .k = in.k, .v = in.v, .mask = in.mask, .key_bias = in.key_bias},
          out.middleRows(first, rows), context);
    }
  }

 private:
  attn::AnyApproximator<float> exact_;
};
