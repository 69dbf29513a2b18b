// error: a\.backward\(
#include <attn/approximator.hpp>

struct NoBackward {
  using Scalar = float;
  static constexpr std::string_view kName = "no_backward";
  struct Saved {};
  bool supports(const attn::Inputs<float>&) const { return true; }
  void forward(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context&) const { out = in.v; }
  void forward(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context&, Saved&) const { out = in.v; }
};

attn::Matrix<float> call(const attn::Matrix<float>& q) {
  return attn::attention(NoBackward{}, q, q, q);
}
