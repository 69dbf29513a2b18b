/// A method of one's own: all that the Approximator concept asks for.
#pragma once

#include <attn/approximator.hpp>

#include <stdexcept>
#include <string_view>

/// Every query gets the mean of the values, as if all scores were equal: the baseline that an approximation has to beat.
/// O((n_q + n_k) d_v) time. Linear in v, and exact where the keys are all alike. No mask, no key bias.
template <class T>
class MeanPooling {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "mean-pooling";
  struct Saved {};  // backward needs nothing of the forward pass
  bool supports(const attn::Inputs<T>& in) const {
    return in.mask.causal == attn::Causal::none && in.mask.keep_key.empty() && in.mask.keep_query.empty() && in.key_bias.empty();
  }
  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, attn::Context& context) const {
    if (!supports(in)) throw std::invalid_argument("mean-pooling: masks and key biases are not supported");
    spread(in.v, out, in.v.rows(), context);
  }
  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, attn::Context& context, Saved&) const {
    forward(in, out, context);
  }
  void backward(const attn::Inputs<T>& in, attn::ConstMatrixRef<T>, attn::ConstMatrixRef<T> dout, const Saved&,
                const attn::Gradients<T>& gradients, attn::Context& context) const {
    for (attn::MatrixRef<T> zero : {gradients.dq, gradients.dk}) zero.setZero();  // the result depends on v alone
    spread(dout, gradients.dv, in.v.rows(), context);
  }

 private:  // every row of to <- the sum of from's rows / divisor, in memory that the context keeps from call to call
  static void spread(attn::ConstMatrixRef<T> from, attn::MatrixRef<T> to, attn::Index divisor, attn::Context& context) {
    attn::Scratch scratch = context.scratch();
    attn::MatrixRef<T> sum = scratch.matrix<T>(1, from.cols());
    sum.setZero();
    for (attn::Index row = 0; row < from.rows(); ++row) sum += from.row(row);
    for (attn::Index row = 0; row < to.rows(); ++row) to.row(row) = sum / static_cast<T>(divisor);
  }
};

static_assert(attn::Approximator<MeanPooling<float>> && attn::Approximator<MeanPooling<double>>);
