/// A progress bar.
#pragma once

#include <attn/matrix.hpp>

#include <cstdio>
#include <string>
#include <string_view>
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
