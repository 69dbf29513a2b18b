// Every rank holds one key, all of them equal, so that each row of the result is the mean of the values.
#include <attn/attn.hpp>
#include <attn/mpi.hpp>

#include <mpi.h>

#include <cmath>
#include <cstdlib>

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const attn::Matrix<float> ones = attn::Matrix<float>::Ones(1, 1);
  const attn::Matrix<float> v = static_cast<float>(rank) * ones;
  attn::Matrix<float> out(1, 1);
  attn::Context context;
  attn::distributed_forward(attn::SoftmaxAttention<float>{}, {.q = ones, .k = ones, .v = v}, out, MPI_COMM_WORLD,
                            context);
  const float mean = static_cast<float>(ranks - 1) / 2;
  MPI_Finalize();
  return std::abs(out(0, 0) - mean) < 1e-6f ? EXIT_SUCCESS : EXIT_FAILURE;
}
