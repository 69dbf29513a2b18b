/// A progress bar, and a method that shows one.
#pragma once

#include <attn/any_approximator.hpp>

#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>
#include <unistd.h>

/// One line on standard error that is drawn over itself and wiped at the end; nothing at all where that is no terminal.
class ProgressBar {
 public:
  explicit ProgressBar(std::string_view label) : label_(label), visible_(isatty(STDERR_FILENO) == 1) {}
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  ~ProgressBar() {
    if (visible_) std::fputs("\r\x1b[K", stderr);
  }

  /// Shows that done of all is done.
  void show(attn::Index done, attn::Index all) const {
    if (!visible_) return;
    constexpr attn::Index kWidth = 40;
    const auto filled = static_cast<std::size_t>(kWidth * done / all);
    std::string bar(filled, '=');
    bar.resize(kWidth, ' ');
    std::fprintf(stderr, "\r%s [%s] %3ld %%", label_.c_str(), bar.c_str(), static_cast<long>(100 * done / all));
    std::fflush(stderr);
  }

 private:
  std::string label_;
  bool visible_;
};

/// A method applied to kRowsAtATime queries at a time, with a progress bar. Only for exact methods, in which a query's result
/// does not depend on the other queries. The inputs are viewed, not copied.
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
      exact_.forward({.q = in.q.middleRows(first, rows), .k = in.k, .v = in.v, .mask = in.mask, .key_bias = in.key_bias},
                     out.middleRows(first, rows), context);
    }
  }

 private:
  attn::AnyApproximator<float> exact_;
};
