// error: Approximator
#include <attn/approximator.hpp>

struct NoForward {
  using Scalar = float;
  static constexpr std::string_view kName = "no_forward";
  bool supports(const attn::Inputs<float>&) const { return true; }
};

attn::Matrix<float> call(const attn::Matrix<float>& q) {
  return attn::attention(NoForward{}, q, q, q);
}
