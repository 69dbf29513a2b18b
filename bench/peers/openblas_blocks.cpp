#include "../common/fma_peak.hpp"
#include "blocks.hpp"

#include <cblas.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace bench {
namespace {

int as_int(Index i) {
  return static_cast<int>(i);
}

/// c <- alpha a op(b), where op(b) has the columns of c.
void sgemm(CBLAS_TRANSPOSE op, float alpha, ConstView a, ConstView b, View c) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, op, as_int(c.rows()), as_int(c.cols()), as_int(a.cols()), alpha, a.data(),
              as_int(a.outerStride()), b.data(), as_int(b.outerStride()), 0, c.data(), as_int(c.outerStride()));
}

struct OpenBlasProducts {
  static void multiply_transposed(float scale, ConstView a, ConstView b, View c) { sgemm(CblasTrans, scale, a, b, c); }
  static void multiply(ConstView a, ConstView b, View c) { sgemm(CblasNoTrans, 1, a, b, c); }
};

}  // namespace

void restart_with_wide_openblas(char** argv) {
  const bool takes_it_for_old = std::string_view(openblas_get_corename()) == "Prescott" && kVectorBytes >= 32;
  if (!takes_it_for_old || std::getenv("OPENBLAS_CORETYPE") != nullptr) return;
  setenv("OPENBLAS_CORETYPE", kVectorBytes == 64 ? "SkylakeX" : "Haswell", 1);
  execv("/proc/self/exe", argv);  // comes back only where it fails
}

Peer openblas_blocks() {
  openblas_set_num_threads(1);
  return {.name = "openblas_blocks", .forward = attend<OpenBlasProducts>, .nystrom = nystrom<OpenBlasProducts>};
}

}  // namespace bench
