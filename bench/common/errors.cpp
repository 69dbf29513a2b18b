#include "errors.hpp"

#include "common/reference.hpp"

#include <algorithm>
#include <cmath>

namespace bench {
namespace {

reference::Kernel target(std::string_view method, attn::Index d) {
  return method == "gaussian" || method == "skyformer" ? reference::gaussian_kernel(d) : reference::softmax_kernel(d);
}

}  // namespace

Errors errors(std::string_view method, const Tokens<double>& tokens, attn::Causal causal) {
  const reference::Kernel kernel = target(method, tokens.q.cols());
  const attn::Index n = tokens.q.rows(), rows = std::min<attn::Index>(n, 8);
  double of_out = 0, of_mean = 0, norm = 0;
  for (attn::Index r = 1; r <= rows; ++r) {
    const attn::Index i = r * n / rows - 1, seen = causal == attn::Causal::none ? n : i + 1;
    const reference::Matrix v = tokens.v.topRows(seen);
    const auto exact = reference::attend(kernel, {.q = tokens.q.row(i), .k = tokens.k.topRows(seen), .v = v});
    const double sum = kernel.normalized ? 1 : std::exp(exact.lse[0]);
    of_out += (tokens.out.row(i) - exact.out).squaredNorm();
    of_mean += (sum * v.colwise().mean() - exact.out).squaredNorm();
    norm += exact.out.squaredNorm();
  }
  return {.out = std::sqrt(of_out / norm), .mean_v = std::sqrt(of_mean / norm)};
}

}  // namespace bench
