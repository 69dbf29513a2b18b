/// Multipole attention as a linear operator.
#pragma once

#include <attn/attention_operator.hpp>
#include <attn/context.hpp>
#include <attn/matrix.hpp>
#include <attn/multipole.hpp>

#include <utility>

/// Multipole, which chooses near clusters by the spread of v, with the clusters that it chooses for one v. Applied to
/// that v it is Multipole's result, up to rounding: x goes beside v, so much smaller that it has no say in the choice.
/// q, k (n, d) and v (n, d_v) are views that must outlive it, as must the mask.
template <class T>
class FrozenNearField {
 public:
  using Scalar = T;

  FrozenNearField(attn::Multipole<T> method, const attn::Inputs<T>& in) : method_(std::move(method)), in_(in) {}

  attn::Index rows() const { return in_.q.rows(); }
  attn::Index cols() const { return in_.k.rows(); }

  void apply(const attn::ConstMatrixRef<T>& x, attn::MatrixRef<T> y, attn::Context& context) const {
    const attn::Matrix<T> v = beside_v(kSmall * x);
    attn::Matrix<T> out(rows(), v.cols());
    method_.forward(with(v), out, context);
    y = out.rightCols(x.cols()) / kSmall;
  }

  void apply_transpose(const attn::ConstMatrixRef<T>& x, attn::MatrixRef<T> y, attn::Context& context) const {
    const attn::Matrix<T> v = beside_v(attn::Matrix<T>::Zero(cols(), x.cols()));
    attn::Matrix<T> out(rows(), v.cols()), dout = attn::Matrix<T>::Zero(rows(), v.cols());
    attn::Matrix<T> dq(rows(), in_.q.cols()), dk(cols(), in_.k.cols()), dv(cols(), v.cols());
    dout.rightCols(x.cols()) = x;
    typename attn::Multipole<T>::Saved saved;
    method_.forward(with(v), out, context, saved);
    method_.backward(with(v), out, dout, saved, {dq, dk, dv}, context);
    y = dv.rightCols(x.cols());
  }

 private:
  static constexpr T kSmall = T(0x1p-40);  // its square is below the last digit of 1

  attn::Matrix<T> beside_v(const attn::Matrix<T>& x) const {
    attn::Matrix<T> both(cols(), in_.v.cols() + x.cols());
    both << in_.v, x;
    return both;
  }

  attn::Inputs<T> with(const attn::Matrix<T>& v) const { return {in_.q, in_.k, v, in_.mask}; }

  attn::Multipole<T> method_;
  attn::Inputs<T> in_;
};

static_assert(attn::LinearOperator<FrozenNearField<float>>);
