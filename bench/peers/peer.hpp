/// What a peer is: somebody else's products, made into softmax attention.
#pragma once

#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <string_view>

namespace bench {

/// out <- softmax(q k^T / sqrt(d)) v by a peer, on the calling thread; causal only where it says that it can, and then
/// with n_q = n_k. Takes no key mask and no bias. A peer in blocks has their weights in the context's scratch memory.
struct Peer {
  std::string_view name;
  bool has_causal;
  void (*forward)(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context& context);
};

Peer eigen_blocks();     ///< Eigen's products on blocks of queries: what one writes by hand
Peer openblas_blocks();  ///< the same with OpenBLAS's sgemm
Peer onednn_blocks();    ///< oneDNN's matmul and softmax primitives on blocks of queries
Peer libtorch();         ///< matmul, softmax, matmul on all queries at once

/// OpenBLAS picks its kernels when it is loaded, and those for SSE3 on a processor newer than itself; libtorch uses it
/// too. There, starts the program again with the kernels for the vectors that attn is compiled for, unless the
/// environment chooses some.
void restart_with_wide_openblas(char** argv);

}  // namespace bench
