/// A method of one's own: what the concept asks for, and what it then fits into. Checked against exact attention.
#include <attn/attn.hpp>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <span>
#include <stdexcept>
#include <string_view>
#include <vector>

/// Every query gets the mean of the kept keys' values, as if all scores were equal: the baseline that an approximation has to beat.
/// O(n d_v) time. Linear in v, and exact where the keys are all alike. Not causal, no key bias.
template <class T>
class MeanPooling {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "mean-pooling";

  bool supports(const attn::Inputs<T>& in) const { return in.mask.causal == attn::Causal::none && in.key_bias.empty(); }

  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, attn::Context& context) const {
    if (!supports(in)) throw std::invalid_argument("mean-pooling: causal masks and key biases are not supported");
    attn::Scratch scratch = context.scratch();  // memory that the context keeps from call to call
    attn::MatrixRef<T> mean = scratch.matrix<T>(1, in.v.cols());
    mean.setZero();
    attn::Index kept = 0;
    for (attn::Index j = 0; j < in.v.rows(); ++j) {
      if (!keeps(in.mask.keep_key, j)) continue;
      mean.row(0) += in.v.row(j);
      ++kept;
    }
    if (kept > 0) mean /= static_cast<T>(kept);
    out.rowwise() = mean.row(0);
    for (attn::Index i = 0; i < out.rows(); ++i) {
      if (!keeps(in.mask.keep_query, i)) out.row(i).setZero();
    }
  }

 private:
  static bool keeps(std::span<const std::uint8_t> keep, attn::Index row) {
    return keep.empty() || keep[static_cast<std::size_t>(row)] != 0;
  }
};

static_assert(attn::Approximator<MeanPooling<float>> && attn::Approximator<MeanPooling<double>>);

bool check(bool holds, const char* what) {
  std::cout << (holds ? "yes  " : "NO   ") << what << '\n';
  return holds;
}

int main() {
  constexpr attn::Index kTokens = 100;
  const attn::Matrix<float> q = attn::Matrix<float>::Random(kTokens, 16), k = attn::Matrix<float>::Random(kTokens, 16);
  const attn::Matrix<float> v = attn::Matrix<float>::Random(kTokens, 8), alike = k.row(0).replicate(kTokens, 1);
  std::vector<std::uint8_t> keep(kTokens, 1);
  keep[0] = keep[7] = keep[99] = 0;
  const attn::Mask mask{.keep_key = keep, .keep_query = keep};

  // In one line, with and without a mask
  const attn::SoftmaxAttention<float> softmax;
  const MeanPooling<float> pooling;
  const bool plain = attn::attention(pooling, q, alike, v).isApprox(attn::attention(softmax, q, alike, v), 1e-5f);
  const bool masked = attn::attention(pooling, q, alike, v, mask).isApprox(attn::attention(softmax, q, alike, v, mask), 1e-5f);

  // As one of several methods of one type, chosen at run time
  const std::vector<attn::AnyApproximator<float>> methods{attn::AnyApproximator<float>(softmax), attn::AnyApproximator<float>(pooling),
                                                          attn::make_approximator<float>("skyformer", {.num_landmarks = 32})};
  for (const auto& method : methods) {
    std::cout << method.name() << ": a mean magnitude of " << attn::attention(method, q, k, v).cwiseAbs().mean() << '\n';
  }
  const bool same = attn::attention(methods[1], q, k, v) == attn::attention(pooling, q, k, v) &&
                    methods[1].name() == "mean-pooling";

  bool good = check(plain, "equal to softmax attention where all keys are alike");
  good &= check(masked, "and with a mask");
  good &= check(same, "the same as AnyApproximator");
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
