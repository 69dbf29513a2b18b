/// Checks of what a user gives to an option: an error's text, empty where there is none, as CLI11 asks for.
#pragma once

#include <attn/any_approximator.hpp>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

/// A finite number; NaN, which every check should refuse, for all else.
inline double parse_number(const std::string& text) {
  char* end = nullptr;
  const double x = std::strtod(text.c_str(), &end);
  return end == text.c_str() + text.size() && std::isfinite(x) ? x : std::numeric_limits<double>::quiet_NaN();
}

inline std::string check_positive(const std::string& text) {
  return parse_number(text) > 0.0 ? "" : "must be a number above 0, not " + text;
}

inline std::string check_not_negative(const std::string& text) {
  return parse_number(text) >= 0.0 ? "" : "must be a number of at least 0, not " + text;
}

/// A line for each of the library's methods.
inline std::string list_of_methods() {
  std::string lines;
  for (const auto& method : attn::methods<float>()) {
    lines += "\n  " + std::string(method.name) + ": " + std::string(method.description);
  }
  return lines;
}

inline std::string check_method(const std::string& text) {
  std::string names;
  for (const auto& method : attn::methods<float>()) {
    if (method.name == text) return "";
    names += (names.empty() ? "" : ", ") + std::string(method.name);
  }
  return "no method is called " + text + "; there are " + names;
}
