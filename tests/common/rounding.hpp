/// How results in half and bfloat16 are held against exact ones: each entry within half a unit in the last place.
#pragma once

#include "common/reference.hpp"

#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace test {

/// The share of entries of a result in T that are further from the exact ones than one rounding of an intermediate in
/// float would leave them: more than .52 units in the last place.
template <class T>
double share_beyond_one_rounding(const attn::Matrix<T>& actual, const reference::Matrix& exact) {
  constexpr bool kIsHalf = std::is_same_v<T, Eigen::half>;  // for which Eigen 3.4 has another epsilon
  constexpr double unit = kIsHalf ? 0x1p-10 : 0x1p-7, smallest = kIsHalf ? 0x1p-14 : 0x1p-126;
  if (actual.rows() != exact.rows() || actual.cols() != exact.cols()) return 1;
  attn::Index beyond = 0;
  for (attn::Index i = 0; i < exact.rows(); ++i) {
    for (attn::Index c = 0; c < exact.cols(); ++c) {
      const double size = std::max(std::abs(exact(i, c)), smallest);
      const double place = unit * std::exp2(std::floor(std::log2(size)));
      if (!(std::abs(static_cast<double>(static_cast<float>(actual(i, c))) - exact(i, c)) <= 0.52 * place)) ++beyond;
    }
  }
  return static_cast<double>(beyond) / static_cast<double>(std::max<attn::Index>(1, exact.size()));
}

/// Of entries that cancel, or lie just amid two numbers.
inline constexpr double kShareOfHardCases = 0.02;

}  // namespace test
