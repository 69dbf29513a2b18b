/// A method of one's own: all that the Approximator concept asks for.
#pragma once

#include <attn/approximator.hpp>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string_view>

/// Every query gets the mean of the kept keys' values, as if all scores were equal: the baseline that an approximation
/// has to beat. O((n_q + n_k) d_v) time. Linear in v, and exact where the keys are all alike. Not causal, no key bias.
template <class T>
class MeanPooling {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "mean-pooling";
  struct Saved {};  // backward needs nothing of the forward pass

  bool supports(const attn::Inputs<T>& in) const { return in.mask.causal == attn::Causal::none && in.key_bias.empty(); }

  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, attn::Context& context) const {
    if (!supports(in)) throw std::invalid_argument("mean-pooling: causal masks and key biases are not supported");
    spread(in.v, in.mask.keep_key, out, in.mask.keep_query, kept(in.mask.keep_key, in.v.rows()), context);
  }
  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, attn::Context& context, Saved&) const {
    forward(in, out, context);
  }

  /// dv_j = the sum of dout's kept rows / kept keys. The result does not depend on q and k.
  void backward(const attn::Inputs<T>& in, attn::ConstMatrixRef<T>, attn::ConstMatrixRef<T> dout, const Saved&,
                const attn::Gradients<T>& gradients, attn::Context& context) const {
    for (attn::MatrixRef<T> zero : {gradients.dq, gradients.dk}) zero.setZero();
    spread(dout, in.mask.keep_query, gradients.dv, in.mask.keep_key, kept(in.mask.keep_key, in.v.rows()), context);
  }

 private:
  using Keep = std::span<const std::uint8_t>;
  static bool keeps(Keep keep, attn::Index row) { return keep.empty() || keep[static_cast<std::size_t>(row)] != 0; }
  static attn::Index kept(Keep keep, attn::Index rows) {
    attn::Index count = 0;
    for (attn::Index row = 0; row < rows; ++row) count += keeps(keep, row) ? 1 : 0;
    return count;
  }

  /// Every kept row of to <- the sum of from's kept rows / divisor; the other rows <- 0.
  static void spread(attn::ConstMatrixRef<T> from, Keep keep_from, attn::MatrixRef<T> to, Keep keep_to,
                     attn::Index divisor, attn::Context& context) {
    attn::Scratch scratch = context.scratch();  // memory that the context keeps from call to call
    attn::MatrixRef<T> sum = scratch.matrix<T>(1, from.cols());
    sum.setZero();
    for (attn::Index row = 0; row < from.rows(); ++row) {
      if (keeps(keep_from, row)) sum += from.row(row);
    }
    if (divisor > 0) sum /= static_cast<T>(divisor);
    to.setZero();
    for (attn::Index row = 0; row < to.rows(); ++row) {
      if (keeps(keep_to, row)) to.row(row) = sum;
    }
  }
};

static_assert(attn::Approximator<MeanPooling<float>> && attn::Approximator<MeanPooling<double>>);
