/// What a peer is: somebody else's products, made into attention.
#pragma once

#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <string_view>

namespace bench {

using attn::Index;

inline constexpr Index kPeerLandmarks = 64;

/// Somebody's attention on the calling thread, without key masks and biases. One in blocks has their weights in the
/// context's scratch memory.
///   forward: out <- softmax(q k^T / sqrt(d)) v, or causal, and then with n_q = n_k
///   nystrom: Nystromformer with kPeerLandmarks landmarks and six iterations; nullptr where there is none
struct Peer {
  using Forward = void (*)(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context& context);

  std::string_view name;
  Forward forward, nystrom = nullptr;
};

Peer eigen_blocks();     ///< Eigen's products on blocks of queries: what one writes by hand
Peer openblas_blocks();  ///< the same with OpenBLAS's sgemm
Peer onednn_blocks();    ///< oneDNN's matmul and softmax primitives on blocks of queries
Peer libtorch();         ///< its tensors' matmul and softmax, likewise

/// OpenBLAS picks its kernels when it is loaded, and those for SSE3 on a processor newer than itself; libtorch uses it
/// too. There, starts the program again with the kernels for the vectors that attn is compiled for, unless the
/// environment chooses some.
void restart_with_wide_openblas(char** argv);

}  // namespace bench
