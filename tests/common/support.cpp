#include "common/support.hpp"

#include <algorithm>

namespace test {

double relative_error(const Matrix<double>& a, const reference::Matrix& b) {
  const double difference = (a - b).norm(), size = b.norm();
  return difference == 0 ? 0 : difference / size;
}

std::vector<std::pair<std::string, Context>> contexts() {
  std::vector<std::pair<std::string, Context>> all;
  all.emplace_back("serial", Context{});
  all.emplace_back("backwards", Context{Backwards{}});
  for (const int count : {1, 2, 3}) {
    all.emplace_back("threads " + std::to_string(count), Context{Threads{.count = count}});
#ifdef _OPENMP
    all.emplace_back("OpenMP " + std::to_string(count), Context{attn::OpenMP{.threads = count}});
#endif
  }
  return all;
}

void detail::expect_close(const reference::Matrix& out, const reference::Result& expected, const reference::Problem& p,
                          const reference::Kernel& kernel, double tolerance, double smallest) {
  EXPECT_LE(test::relative_error(out, expected.out), tolerance);
  double v_max = 0;
  for (Index j = 0; j < p.v.rows(); ++j) {
    if (reference::kept(p.mask.keep_key, j)) v_max = std::max(v_max, p.v.row(j).cwiseAbs().maxCoeff());
  }
  for (Index i = 0; i < out.rows(); ++i) {
    const double error = (out.row(i) - expected.out.row(i)).cwiseAbs().maxCoeff();
    const double weight = expected.lse[i] == -kInf<double> ? 0 : kernel.normalized ? 1 : std::exp(expected.lse[i]);
    const double underflow = kernel.normalized ? 0 : static_cast<double>(p.k.rows()) * smallest;
    ASSERT_LE(error, (20 * tolerance * weight + underflow) * v_max) << "row " << i;
  }
}

}  // namespace test
