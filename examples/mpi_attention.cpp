/// A sequence that is spread over the ranks of MPI: exact causal attention, and an approximation through landmarks.
///   mpiexec -n 4 mpi_attention [tokens]
#include <attn/attn.hpp>
#include <attn/mpi.hpp>

#include <mpi.h>

#include <cstdlib>
#include <exception>
#include <iostream>

namespace {

struct Tokens {
  attn::Matrix<float> q, k, v, out;
};

/// What one rank holds. Each makes its own here; a program would read or compute them.
Tokens make_share(attn::Index rows, int rank) {
  constexpr attn::Index kFeatures = 64;
  std::srand(static_cast<unsigned>(rank + 1));
  const auto random = [&]() -> attn::Matrix<float> { return attn::Matrix<float>::Random(rows, kFeatures); };
  return {random(), random(), random(), attn::Matrix<float>(rows, kFeatures)};
}

template <class Method>
void run(const Method& method, attn::Share share, attn::Causal causal, int rank) {
  Tokens x = make_share(share.count, rank);
  attn::Context context;
  const double start = MPI_Wtime();
  attn::distributed_forward(method, {.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}}, x.out, MPI_COMM_WORLD,
                            context);
  const double seconds = MPI_Wtime() - start, sum = static_cast<double>(x.out.sum());
  double total = 0, longest = 0;
  MPI_Reduce(&sum, &total, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
  MPI_Reduce(&seconds, &longest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (rank == 0) std::cout << Method::kName << ": sum of the result " << total << ", " << longest << " s\n";
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const attn::Index n = argc > 1 ? std::atoi(argv[1]) : 4096;
  int status = EXIT_SUCCESS;
  try {
    run(attn::SoftmaxAttention<float>{}, attn::causal_share(n, ranks, rank), attn::Causal::upper_left, rank);
    run(attn::Nystrom<float>{}, attn::even_share(n, ranks, rank), attn::Causal::none, rank);
  } catch (const std::exception& e) {  // the same on all ranks
    if (rank == 0) std::cerr << "mpi_attention: " << e.what() << '\n';
    status = EXIT_FAILURE;
  }
  MPI_Finalize();
  return status;
}
