// compiles
#include <attn/approximator.hpp>

struct Copies {
  using Scalar = float;
  static constexpr std::string_view kName = "copies";
  bool supports(const attn::Inputs<float>&) const { return true; }
  struct Saved {};
  void forward(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context&) const { out = in.v; }
  void forward(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context&, Saved&) const { out = in.v; }
  void backward(const attn::Inputs<float>&, attn::ConstMatrixRef<float>, attn::ConstMatrixRef<float> dout, const Saved&,
                const attn::Gradients<float>& gradients, attn::Context&) const {
    attn::MatrixRef<float>(gradients.dv) = dout;
  }
};

void call(const attn::Matrix<float>& q, attn::Matrix<float>& out, attn::Context& context) {
  Copies{}.forward({.q = q, .k = q, .v = q.leftCols(3)}, out, context);
  Copies{}.forward({.q = q, .k = q, .v = q}, out.topRows(2), context);
  out = attn::attention(Copies{}, q, q, q);
}
