#include "blocks.hpp"
#include "peer.hpp"

#include <dnnl.hpp>
#include <omp.h>

#include <algorithm>

namespace bench {
namespace {

using dnnl::memory;

/// The primitives of attention on one shape, which take as long to make as some blocks to run.
class Blocks {
 public:
  Blocks(attn::Index rows, attn::Index n, attn::Index d) : queries_(matrix(rows, d, d, 1)), keys_(matrix(d, n, 1, d)) {
    weights_ = matrix(rows, n, n, 1);
    values_ = matrix(n, d, d, 1);
    dnnl::primitive_attr scaled;
    scaled.set_output_scales(0, {softmax_scale(d)});
    scores_ = dnnl::matmul({{queries_, keys_, weights_}, scaled, engine_});
    softmax_ = dnnl::softmax_forward({{dnnl::prop_kind::forward_inference, weights_, 1}, engine_});
    product_ = dnnl::matmul({{weights_, values_, queries_}, engine_});
  }

  void run(const float* q, const float* k, const float* v, float* weights, float* out) {
    const memory of_q = read(queries_, q), of_k = read(keys_, k), of_v = read(values_, v);
    const memory of_weights(weights_, engine_, weights), of_out(queries_, engine_, out);
    scores_.execute(stream_, {{DNNL_ARG_SRC, of_q}, {DNNL_ARG_WEIGHTS, of_k}, {DNNL_ARG_DST, of_weights}});
    softmax_.execute(stream_, {{DNNL_ARG_SRC, of_weights}, {DNNL_ARG_DST, of_weights}});
    product_.execute(stream_, {{DNNL_ARG_SRC, of_weights}, {DNNL_ARG_WEIGHTS, of_v}, {DNNL_ARG_DST, of_out}});
    stream_.wait();
  }

 private:
  static memory::desc matrix(attn::Index rows, attn::Index cols, attn::Index row_stride, attn::Index col_stride) {
    return {{rows, cols}, memory::data_type::f32, {row_stride, col_stride}};
  }

  memory read(const memory::desc& shape, const float* data) { return {shape, engine_, const_cast<float*>(data)}; }

  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  memory::desc queries_, keys_, weights_, values_;
  dnnl::matmul scores_, product_;
  dnnl::softmax_forward softmax_;
};

void forward(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context& context) {
  const attn::Index n_q = in.q.rows(), n_k = in.k.rows(), d = in.q.cols(), block = std::min<attn::Index>(128, n_q);
  attn::Scratch scratch = context.scratch();
  float* weights = scratch.array<float>(block * n_k).data();
  Blocks blocks(block, n_k, d);
  for (attn::Index first = 0; first < n_q; first += block) {
    const attn::Index start = std::min(first, n_q - block);  // the last block may do some queries again
    blocks.run(in.q.row(start).data(), in.k.data(), in.v.data(), weights, out.row(start).data());
  }
}

}  // namespace

Peer onednn_blocks() {
  omp_set_num_threads(1);
  return {.name = "onednn_blocks", .has_causal = false, .forward = forward};
}

}  // namespace bench
