/// Tokens in few coordinates: along the principal axes of a sample of them, or those of their features that vary most.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

namespace attn::detail {

/// Coordinates of each token. Where tokens have no more features than that, coordinates are the features.
inline constexpr Index kCoordinates = 16;

/// Which axes: the principal ones are the better, features take a fraction of the time.
enum class Axes { principal, features };

/// The kCoordinates principal axes of a sample of rows, by orthogonal iteration from the features of largest variance;
/// or these features themselves.
///   y_i  = (x_i - mean) / largest        of at most kSample rows, those that are not finite left out
///   axes = orthonormal rows of axes y^T y, some times over
template <class T>
class PrincipalAxes {
 public:
  PrincipalAxes(const TokenRows<T>& x, std::span<const Index> rows, Axes axes, Context& context, Scratch& scratch)
      : count_(std::min(kCoordinates, x.cols())),
        mean_(scratch.matrix<T>(1, x.cols())),
        axes_(scratch.matrix<T>(axes == Axes::principal ? count_ : 0, x.cols())),
        features_(axes == Axes::features ? scratch.elements<Index>(count_) : nullptr),
        panel_(axes == Axes::principal && count_ < x.cols() ? scratch.elements<T>(x.cols() * kCoordinates) : nullptr) {
    set_zero(mean_);
    set_zero(axes_);
    Scratch own = context.scratch();
    const Index most = axes == Axes::principal ? kSample : kSmallSample;
    const auto sample = own.template matrix<T>(std::min(most, static_cast<Index>(rows.size())), x.cols());
    const Index finite = copy_finite(x, rows, sample);
    center(rows_of(sample, {0, finite}));
    if (features_ != nullptr) {
      choose_features(rows_of(sample, {0, finite}), own.template elements<T>(x.cols()));
    } else if (panel_ != nullptr) {
      iterate(rows_of(sample, {0, finite}), context, own);
      set_transposed<T>({panel_, x.cols(), kCoordinates, kCoordinates}, T(1), axes_);
    }
  }

  /// to <- axes (x - mean) / largest of some rows, at most kTileRows, kCoordinates elements each, or without axes where
  /// they have room; those beyond the last 0; all 0 if the square of any is not finite. buffer has room for the rows.
  void set_coordinates(const TokenRows<T>& x, std::span<const Index> rows, T* buffer, T* to) const {
    const Index d = mean_.cols(), count = static_cast<Index>(rows.size());
    for (Index i = 0; i < count; ++i) {
      T* const centered = buffer + i * d;
      const T* const row = x.row(rows.data()[i], centered);
      for (Index c = 0; c < d; c += kLanes<T>) {
        store_row(centered, c, d, (load_row(row, c, d) - load_row(mean_.data(), c, d)) * broadcast(scale_));
      }
      if (panel_ == nullptr) set_features(centered, to + i * kCoordinates);
    }
    if (panel_ != nullptr) project(buffer, count, to);
    for (Index i = 0; i < count; ++i) hide_unless_finite(to + i * kCoordinates);
  }

 private:
  static constexpr Index kSample = 256, kSmallSample = 128;
  static constexpr int kSteps = 4;

  void set_features(const T* centered, T* to) const {
    const Index d = mean_.cols();
    if (count_ == d) {
      std::copy_n(centered, d, to);
      std::fill(to + d, to + kCoordinates, T(0));
    } else {
      for (Index a = 0; a < kCoordinates; ++a) to[a] = centered[features_[a]];
    }
  }

  void project(const T* centered, Index count, T* to) const {
    constexpr int kPackets = kCoordinates / kLanes<T>;
    Packet<T> tile[array_size(kTileRows)][array_size(kPackets)];
    multiply_tile(centered, count, axes_.cols(), 1, panel_, axes_.cols(), tile);
    for (Index i = 0; i < count * kPackets; ++i) store(to + i * kLanes<T>, tile[i / kPackets][i % kPackets]);
  }

  static void hide_unless_finite(T* coordinates) {
    FiniteLanes<T> squares;
    for (Index c = 0; c < kCoordinates; c += kLanes<T>) squares.add(load(coordinates + c) * load(coordinates + c));
    if (!squares.all()) std::fill_n(coordinates, kCoordinates, T(0));
  }

  /// Evenly spaced rows, as far as they are finite. Returns how many.
  static Index copy_finite(const TokenRows<T>& x, std::span<const Index> rows, const MatrixRef<T>& sample) {
    const auto n = static_cast<Index>(rows.size());
    Index count = 0;
    for (Index i = 0; i < sample.rows(); ++i) {
      T* const to = row_of(sample, count);
      x.copy_row(rows.data()[(2 * i + 1) * n / (2 * sample.rows())], to);
      count += is_finite(squared_norm(to, x.cols())) ? 1 : 0;
    }
    return count;
  }

  void center(const MatrixRef<T>& sample) {
    if (sample.rows() == 0) return;
    const T share = 1 / static_cast<T>(sample.rows());
    for (Index i = 0; i < sample.rows(); ++i) add_row(share, row_of(sample, i), mean_.data(), sample.cols());
    for (Index i = 0; i < sample.rows(); ++i) add_row(T(-1), mean_.data(), row_of(sample, i), sample.cols());
    const T largest = largest_magnitude<T>(sample);
    if (largest > 0 && is_finite(1 / largest)) scale_ = 1 / largest;
    for (Index i = 0; i < sample.rows(); ++i) scale_row(scale_, row_of(sample, i), row_of(sample, i), sample.cols());
  }

  /// features_ <- those of largest variance, the largest first; ties go to the lower number.
  void choose_features(const MatrixRef<T>& sample, T* variance) const {
    const Index d = sample.cols();
    std::fill_n(variance, d, T(0));
    for (Index i = 0; i < sample.rows(); ++i) {
      const T* const row = row_of(sample, i);
      for (Index c = 0; c < d; ++c) variance[c] += row[c] * row[c];
    }
    for (Index a = 0; a < count_; ++a) {
      T* const widest = std::max_element(variance, variance + d);
      features_[a] = widest - variance;
      *widest = -1;
    }
  }

  void iterate(const MatrixRef<T>& sample, Context& context, Scratch& scratch) {
    const Index d = sample.cols();
    const auto square = scratch.template matrix<T>(d, d), next = scratch.template matrix<T>(count_, d);
    gemm<T>(1, transposed(sample), sample, T(0), square, context);
    begin_at_widest(square, scratch.template elements<T>(d));
    for (int step = 0; step < kSteps; ++step) {
      gemm<T>(1, axes_, square, T(0), next, context);
      orthonormalize(next);
      for (Index i = 0; i < count_; ++i) std::copy_n(row_of(next, i), d, row_of(axes_, i));
    }
  }

  void begin_at_widest(const MatrixRef<T>& square, T* variance) const {
    for (Index c = 0; c < square.rows(); ++c) variance[c] = row_of(square, c)[c];
    for (Index i = 0; i < count_; ++i) {
      T* const widest = std::max_element(variance, variance + square.rows());
      row_of(axes_, i)[widest - variance] = 1;
      *widest = -1;
    }
  }

  /// Gram and Schmidt's, one row after another; a row that depends on those before becomes zeros.
  static void orthonormalize(const MatrixRef<T>& a) {
    const Index d = a.cols();
    for (Index i = 0; i < a.rows(); ++i) {
      T* const row = row_of(a, i);
      const T before = squared_norm(row, d);
      for (Index j = 0; j < i; ++j) add_row(-dot_product(row, row_of(a, j), d), row_of(a, j), row, d);
      const T norm = squared_norm(row, d);
      const bool independent = norm > T(1e-8) * before && is_finite(norm);
      scale_row(independent ? 1 / std::sqrt(norm) : T(0), row, row, d);
    }
  }

  Index count_;
  MatrixRef<T> mean_, axes_;
  Index* features_;  ///< null where axes are principal ones
  T* panel_;         ///< principal axes, transposed; null where there are none
  T scale_ = 1;
};

/// The coordinates of some rows, side by side.
template <class T>
T* coordinates_of(const TokenRows<T>& x, std::span<const Index> rows, Axes kind, Context& context, Scratch& scratch) {
  constexpr Index kBlock = 8 * kTileRows;
  const Index n = static_cast<Index>(rows.size()), d = x.cols();
  const PrincipalAxes<T> axes(x, rows, kind, context, scratch);
  T* const to = scratch.elements<T>(n * kCoordinates);
  T* const buffers = scratch.elements<T>(context.workers() * kTileRows * d);
  context.for_each((n + kBlock - 1) / kBlock, [&](Index block, int worker) {
    for (Index i = block * kBlock; i < std::min(n, (block + 1) * kBlock); i += kTileRows) {
      axes.set_coordinates(
          x, rows.subspan(static_cast<std::size_t>(i), static_cast<std::size_t>(std::min<Index>(kTileRows, n - i))),
          buffers + worker * kTileRows * d, to + i * kCoordinates);
    }
  });
  return to;
}

}  // namespace attn::detail
