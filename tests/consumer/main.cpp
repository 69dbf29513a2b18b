// Two equal keys share every query's weight, so each row of the result is the mean of the two values. The other
// translation unit does the same, on OpenMP's threads where it is on.
#include "means.hpp"

#include <cmath>
#include <cstdlib>
#include <iostream>

#ifdef CONSUMER_EIGEN_MAJOR
static_assert(EIGEN_MAJOR_VERSION == CONSUMER_EIGEN_MAJOR, "another Eigen than the one to be tested");
#endif

#if defined(CONSUMER_COMPILED) != defined(ATTN_EXTERN_TEMPLATES)
#error attn::compiled alone should declare the templates that another file has
#endif

int main() {
  attn::Matrix<float> v(2, 1);
  v << 1.0f, 3.0f;
  const attn::Matrix<float> out = attn::attention(attn::SoftmaxAttention<float>{}, ones(3), ones(2), v);
  std::cout << "attn " << ATTN_VERSION_MAJOR << '.' << ATTN_VERSION_MINOR << '.' << ATTN_VERSION_PATCH << ": "
            << out.transpose() << '\n';
  const bool good = out.rows() == 3 && out.cols() == 1 && std::abs(out.mean() - 2.0f) < 1e-6f;
  return good && out == by_other_unit(v) ? EXIT_SUCCESS : EXIT_FAILURE;
}
