#include "blocks.hpp"

namespace bench {
namespace {

struct EigenProducts {
  static void multiply_transposed(float s, ConstView a, ConstView b, View c) { c.noalias() = (s * a) * b.transpose(); }
  static void multiply(ConstView a, ConstView b, View c) { c.noalias() = a * b; }
};

}  // namespace

Peer eigen_blocks() {
  Eigen::setNbThreads(1);
  return {.name = "eigen_blocks", .forward = attend<EigenProducts>, .nystrom = nystrom<EigenProducts>};
}

}  // namespace bench
