/// Any linear operator of floats as one type.
#pragma once

#include <attn/attention_operator.hpp>
#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <functional>
#include <memory>
#include <utility>

/// Copies share the operator inside.
class AnyOperator {
 public:
  using Scalar = float;

  template <attn::LinearOperator A>
  explicit AnyOperator(A a) : AnyOperator(std::make_shared<const A>(std::move(a))) {}

  attn::Index rows() const { return rows_; }
  attn::Index cols() const { return cols_; }

  void apply(const attn::ConstMatrixRef<float>& x, attn::MatrixRef<float> y, attn::Context& context) const {
    product_(x, y, context);
  }

  void apply_transpose(const attn::ConstMatrixRef<float>& x, attn::MatrixRef<float> y, attn::Context& context) const {
    transposed_(x, y, context);
  }

 private:
  using Product = std::function<void(const attn::ConstMatrixRef<float>&, attn::MatrixRef<float>, attn::Context&)>;

  template <class A>
  explicit AnyOperator(std::shared_ptr<const A> a)
      : rows_(a->rows()),
        cols_(a->cols()),
        product_([a](const auto& x, auto y, auto& context) { a->apply(x, y, context); }),
        transposed_([a](const auto& x, auto y, auto& context) { a->apply_transpose(x, y, context); }) {}

  attn::Index rows_, cols_;
  Product product_, transposed_;
};
