/// Spectral shifting as a linear operator.
#pragma once

#include <attn/attention_operator.hpp>
#include <attn/context.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>
#include <attn/nystrom.hpp>
#include <attn/spectral_shift.hpp>

#include <utility>
#include <vector>

/// ShiftedNystrom in its default mode, whose gate depends on v, with the gate frozen at one v: diag(scale) N +
/// diag(shift), N the matrix of Nystrom with as many landmarks. Applied to that v it is ShiftedNystrom's result, up to
/// rounding. q, k (n, d) are views that must outlive it, as must the mask. Throws what ShiftedNystrom throws.
template <class T>
class FrozenShift {
 public:
  using Scalar = T;

  FrozenShift(attn::SegmentMeans landmarks, const attn::Inputs<T>& in, attn::Context& context)
      : nystrom_(attn::Nystrom<T>(landmarks), in.q, in.k, in.mask) {
    typename attn::ShiftedNystrom<T>::Saved saved;
    attn::Matrix<T> out(in.q.rows(), in.v.cols());
    attn::ShiftedNystrom<T>(landmarks).forward(in, out, context, saved);
    if (saved.nystrom.exact) return;
    scale_ = std::move(saved.scale);
    shift_ = std::move(saved.shift);
  }

  attn::Index rows() const { return nystrom_.rows(); }
  attn::Index cols() const { return nystrom_.cols(); }

  void apply(const attn::ConstMatrixRef<T>& x, attn::MatrixRef<T> y, attn::Context& context) const {
    nystrom_.apply(x, y, context);
    for (attn::Index i = 0; i < changed(); ++i) y.row(i) = at(scale_, i) * y.row(i) + at(shift_, i) * x.row(i);
  }

  void apply_transpose(const attn::ConstMatrixRef<T>& x, attn::MatrixRef<T> y, attn::Context& context) const {
    attn::Matrix<T> scaled = x;
    for (attn::Index i = 0; i < changed(); ++i) scaled.row(i) *= at(scale_, i);
    nystrom_.apply_transpose(scaled, y, context);
    for (attn::Index i = 0; i < changed(); ++i) y.row(i) += at(shift_, i) * x.row(i);
  }

 private:
  static T at(const std::vector<T>& values, attn::Index i) { return values[static_cast<std::size_t>(i)]; }

  /// How many rows have a scale and a shift: none where the method is exact.
  attn::Index changed() const { return static_cast<attn::Index>(scale_.size()); }

  attn::ApproximatorOperator<attn::Nystrom<T>> nystrom_;
  std::vector<T> scale_, shift_;
};

static_assert(attn::LinearOperator<FrozenShift<float>>);
