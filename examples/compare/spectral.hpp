/// How far a method's matrix is from its target's in the spectral norm.
#pragma once

#include "compare/any_operator.hpp"
#include "compare/methods.hpp"
#include "compare/options.hpp"
#include "compare/sequences.hpp"

#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <vector>

/// |A~ - A|_2 / |A|_2 of operators: A~ of a method, A of exact attention, by power iteration through products with both
/// and with their transposes; no n x n matrix is stored. An estimate: both norms are approached from below. Of several
/// heads the largest counts. All rows together take no longer than options.spectral_seconds, and one for which fewer
/// steps than kFewest are left is not measured.
class SpectralErrors {
 public:
  static constexpr int kFewest = 4;

  /// For so many rows, the exact methods' included. The options and the sequences must outlive it.
  SpectralErrors(const Options& options, const Sequences& sequences, attn::Index rows);

  /// The target of all calls that follow, and the milliseconds of its exact method.
  void set_target(Target target, double exact_ms);

  /// The error of a method that takes so many milliseconds; NaN where it is not measured, as with causal masks.
  double of(const MethodFacts& method, attn::Index size, double milliseconds);

  /// The same of the mean of the values.
  double of_mean();

 private:
  template <class MatrixOfHead>
  double largest(double milliseconds, const MatrixOfHead& matrix_of_head);
  int affordable_steps(double milliseconds) const;
  double norm(const AnyOperator& a, int steps);

  const Options& options_;
  const Sequences& s_;
  attn::Index rows_left_;
  double seconds_left_;
  attn::Context context_;
  double exact_ms_ = 0;
  std::vector<AnyOperator> exact_;  // one a head
  std::vector<double> norms_;       // of exact_
};
