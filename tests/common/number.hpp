/// Numbers as the table and the texts show them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>

inline std::string number(const char* format, double value) {
  if (std::isnan(value)) return "nan";  // printf may show its sign
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

/// Four digits behind the point, or an exponent for errors that are very small or very large.
inline std::string error_text(double error) {
  return number(error == 0.0 || (error >= 1e-4 && error < 1e2) ? "%.4f" : "%.0e", error);
}

/// Three significant digits.
inline std::string milliseconds_text(double ms) {
  return number(ms < 1.0 ? "%.3f" : ms < 10.0 ? "%.2f" : ms < 100.0 ? "%.1f" : "%.0f", ms);
}

inline std::string bytes_text(std::size_t bytes) {
  const auto kib = static_cast<double>(bytes) / 1024;
  return kib < 1024 ? number("%.0f KiB", kib) : number("%.1f MiB", kib / 1024);
}
