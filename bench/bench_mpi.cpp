/// Attention over the ranks of MPI, measured: how its time scales with ranks, strong (n tokens in all) and weak (n
/// tokens a rank), what a rank sends, and what messages cost here.
///   mpiexec -n 2 bench_mpi [--n tokens] [--rounds rounds]
/// And a model of P nodes from one node's measured rates, without MPI's help: bench_mpi --model [--n tokens]
///   exact      max(2 n^2 (d + d_v) / (P F), (P - 1) (L + n (d + d_v) b / (P B)))
///   nystrom    t n / P + c + 4 ceil(log2 P) L + (m (2 d) + m (d_v + 2)) b (ceil(log2 P) + 1) / B
/// F flop/s, t seconds a token, c seconds for what is m x m, all measured here; L and B those of the network.
#include <attn/attn.hpp>
#include <attn/mpi.hpp>

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using attn::Index;
using attn::Matrix;

constexpr Index kFeatures = 64, kLandmarks = 64;
std::size_t sent = 0;

void count_bytes(int n, MPI_Datatype type) {
  int size = 0;
  MPI_Type_size(type, &size);
  sent += static_cast<std::size_t>(n) * static_cast<std::size_t>(size);
}

int own_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

int rank_count() {
  int ranks = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  return ranks;
}

struct Tokens {
  Matrix<float> q, k, v, out;

  explicit Tokens(Index n)
      : q(Matrix<float>::Random(n, kFeatures)),
        k(Matrix<float>::Random(n, kFeatures)),
        v(Matrix<float>::Random(n, kFeatures)),
        out(n, kFeatures) {}

  attn::Inputs<float> inputs(attn::Causal causal = attn::Causal::none) const {
    return {.q = q, .k = k, .v = v, .mask = {.causal = causal}};
  }
};

/// The least seconds that run takes on all ranks.
template <class Run>
double seconds_of(int rounds, const Run& run) {
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i <= rounds; ++i) {
    MPI_Barrier(MPI_COMM_WORLD);
    const double start = MPI_Wtime();
    run();
    const double own = MPI_Wtime() - start;
    double longest = 0;
    MPI_Allreduce(&own, &longest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    if (i > 0) least = std::min(least, longest);  // the first one makes memory
  }
  return least;
}

template <class Method>
void measure(const char* name, const Method& method, Index n, bool causal, int rounds) {
  const int rank = own_rank(), ranks = rank_count();
  const attn::Share share = causal ? attn::causal_share(n, ranks, rank) : attn::even_share(n, ranks, rank);
  Tokens x(share.count);
  attn::Context context;
  const double seconds = seconds_of(rounds, [&] {
    sent = 0;
    const auto in = x.inputs(causal ? attn::Causal::upper_left : attn::Causal::none);
    attn::distributed_forward(method, in, x.out, MPI_COMM_WORLD, context);
  });
  const auto own = static_cast<double>(sent);
  double most = 0;
  MPI_Reduce(&own, &most, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (rank == 0)
    std::printf("%-22s %8td tokens  %9.2f ms  %10.0f bytes sent by a rank at most\n", name, n, 1e3 * seconds, most);
}

void measure_all(Index n, int rounds) {
  measure("softmax", attn::SoftmaxAttention<float>{}, n, false, rounds);
  measure("softmax, causal", attn::SoftmaxAttention<float>{}, n, true, rounds);
  measure("multipole", attn::Multipole<float>{}, n, false, rounds);
  measure("nystrom", attn::Nystrom<float>{{.num_landmarks = kLandmarks}}, n, false, rounds);
  measure("skyformer", attn::Skyformer<float>{{.num_landmarks = 2 * kLandmarks}}, n, false, rounds);
}

/// Seconds of a message of so many bytes from rank 0 to rank 1, or back, over many of them.
double message_seconds(std::size_t bytes, int repeats, int rounds) {
  std::vector<char> data(bytes);
  const int rank = own_rank(), n = static_cast<int>(bytes);
  return seconds_of(rounds,
                    [&] {
                      for (int i = 0; i < repeats && rank < 2; ++i) {
                        const int other = 1 - rank;
                        if (rank == 0) MPI_Send(data.data(), n, MPI_BYTE, other, 0, MPI_COMM_WORLD);
                        MPI_Recv(data.data(), n, MPI_BYTE, other, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
                        if (rank == 1) MPI_Send(data.data(), n, MPI_BYTE, other, 0, MPI_COMM_WORLD);
                      }
                    }) /
         (2.0 * repeats);
}

template <class Method>
double single_seconds(const Method& method, Index n, int rounds) {
  Tokens x(n);
  attn::Context context;
  return seconds_of(rounds, [&] { method.forward(x.inputs(), x.out, context); });
}

/// What one node does here, and the time of P of them on a network.
struct Model {
  double flops, token, fixed;

  static Model measured(int rounds) {
    constexpr Index kTokens = 4096;
    const attn::Nystrom<float> nystrom{{.num_landmarks = kLandmarks}};
    const double exact = single_seconds(attn::SoftmaxAttention<float>{}, kTokens, rounds),
                 some = single_seconds(nystrom, kTokens, rounds), more = single_seconds(nystrom, 4 * kTokens, rounds);
    const double token = (more - some) / (3 * kTokens);
    return {2.0 * kTokens * kTokens * 2 * kFeatures / exact, token, std::max(0.0, some - kTokens * token)};
  }

  double exact(double n, double nodes, double latency, double bandwidth) const {
    const double compute = 2 * n * n * 2 * kFeatures / (nodes * flops),
                 messages = (nodes - 1) * (latency + n / nodes * 2 * kFeatures * 4 / bandwidth);
    return std::max(compute, messages);
  }

  double nystrom(double n, double nodes, double latency, double bandwidth) const {
    const double levels = std::ceil(std::log2(nodes)), bytes = 4.0 * kLandmarks * (2 * kFeatures + kFeatures + 2);
    return token * n / nodes + fixed + 4 * levels * latency + (levels + 1) * bytes / bandwidth;
  }
};

void print_model(double n, int rounds) {
  const Model model = Model::measured(rounds);
  std::printf("one core: %.1f Gflop/s exact, %.1f ns a token and %.2f ms through %td landmarks\n", model.flops / 1e9,
              model.token * 1e9, model.fixed * 1e3, kLandmarks);
  std::printf("%.0f tokens of %td features, float; seconds\n", n, kFeatures);
  std::printf("nodes  exact 10 Gb/s  exact 100 Gb/s  nystrom 10 Gb/s  nystrom 100 Gb/s\n");
  constexpr double kSlow = 10e9 / 8, kFast = 100e9 / 8, kSlowLatency = 30e-6, kFastLatency = 3e-6;
  for (int nodes = 2; nodes <= 1024; nodes *= 2) {
    std::printf("%5d  %13.4g  %14.4g  %15.4g  %16.4g\n", nodes, model.exact(n, nodes, kSlowLatency, kSlow),
                model.exact(n, nodes, kFastLatency, kFast), model.nystrom(n, nodes, kSlowLatency, kSlow),
                model.nystrom(n, nodes, kFastLatency, kFast));
  }
}

/// The number after an option, or another one.
Index option(int argc, char** argv, const char* name, Index otherwise) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) return std::atoll(argv[i + 1]);
  }
  return otherwise;
}

}  // namespace

extern "C" {

int MPI_Isend(const void* from, int n, MPI_Datatype type, int to, int tag, MPI_Comm all, MPI_Request* request) {
  count_bytes(n, type);
  return PMPI_Isend(from, n, type, to, tag, all, request);
}

int MPI_Send(const void* from, int n, MPI_Datatype type, int to, int tag, MPI_Comm all) {
  count_bytes(n, type);
  return PMPI_Send(from, n, type, to, tag, all);
}

int MPI_Bcast(void* data, int n, MPI_Datatype type, int root, MPI_Comm all) {
  if (root == own_rank()) count_bytes(n, type);
  return PMPI_Bcast(data, n, type, root, all);
}

}  // extern "C"

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  const Index n = option(argc, argv, "--n", 4096);
  const auto rounds = static_cast<int>(option(argc, argv, "--rounds", 3));
  const int ranks = rank_count();
  if (argc > 1 && std::strcmp(argv[1], "--model") == 0) {
    print_model(static_cast<double>(option(argc, argv, "--n", 1 << 20)), rounds);
  } else {
    if (own_rank() == 0) std::printf("%d ranks, strong scaling\n", ranks);
    measure_all(n, rounds);
    if (own_rank() == 0) std::printf("%d ranks, weak scaling\n", ranks);
    measure_all(n * ranks, rounds);
    if (ranks > 1) {
      constexpr std::size_t kLarge = std::size_t{1} << 23;
      const double latency = message_seconds(8, 200 * rounds, 3), large = message_seconds(kLarge, 1, rounds);
      if (own_rank() == 0) {
        std::printf("messages: latency %.2f us, bandwidth %.2f GB/s\n", latency * 1e6,
                    static_cast<double>(kLarge) / large / 1e9);
      }
    }
  }
  MPI_Finalize();
}
