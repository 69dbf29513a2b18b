#include "blocks.hpp"

#include <dnnl.hpp>
#include <omp.h>

#include <limits>
#include <map>
#include <tuple>

namespace bench {
namespace {

using dnnl::memory;

/// The primitives of attention on one shape, which take as long to make as some blocks to run.
class Blocks {
 public:
  Blocks(Index rows, Index n, Index d) : queries_(matrix(rows, d, d, 1)), keys_(matrix(d, n, 1, d)) {
    weights_ = matrix(rows, n, n, 1);
    values_ = matrix(n, d, d, 1);
    dnnl::primitive_attr scaled;
    scaled.set_output_scales(0, {softmax_scale(d)});
    scores_ = dnnl::matmul({{queries_, keys_, weights_}, scaled, engine_});
    softmax_ = dnnl::softmax_forward({{dnnl::prop_kind::forward_inference, weights_, 1}, engine_});
    product_ = dnnl::matmul({{weights_, values_, queries_}, engine_});
  }

  /// Where causal, the scores of keys after the query become -inf before the softmax.
  void run(const float* q, const float* k, const float* v, View scores, float* out, bool causal) {
    const memory of_q = read(queries_, q), of_k = read(keys_, k), of_v = read(values_, v);
    const memory of_weights(weights_, engine_, scores.data()), of_out(queries_, engine_, out);
    scores_.execute(stream_, {{DNNL_ARG_SRC, of_q}, {DNNL_ARG_WEIGHTS, of_k}, {DNNL_ARG_DST, of_weights}});
    stream_.wait();
    if (causal) {
      constexpr float kHidden = -std::numeric_limits<float>::infinity();
      for (Index i = 0; i < scores.rows(); ++i) scores.row(i).tail(scores.rows() - 1 - i).setConstant(kHidden);
    }
    softmax_.execute(stream_, {{DNNL_ARG_SRC, of_weights}, {DNNL_ARG_DST, of_weights}});
    product_.execute(stream_, {{DNNL_ARG_SRC, of_weights}, {DNNL_ARG_WEIGHTS, of_v}, {DNNL_ARG_DST, of_out}});
    stream_.wait();
  }

 private:
  static memory::desc matrix(Index rows, Index cols, Index row_stride, Index col_stride) {
    return {{rows, cols}, memory::data_type::f32, {row_stride, col_stride}};
  }

  memory read(const memory::desc& shape, const float* data) { return {shape, engine_, const_cast<float*>(data)}; }

  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  memory::desc queries_, keys_, weights_, values_;
  dnnl::matmul scores_, product_;
  dnnl::softmax_forward softmax_;
};

void forward(const attn::Inputs<float>& in, View out, attn::Context& context) {
  static std::map<std::tuple<Index, Index, Index>, Blocks> made;  // by their shapes: queries, keys, dimension
  const bool causal = in.mask.causal != attn::Causal::none;
  attn::Scratch scratch = context.scratch();
  in_blocks_of_queries(in, out, scratch, [=](ConstView q, ConstView k, ConstView v, View weights, View block) {
    Blocks& blocks = made.try_emplace({q.rows(), k.rows(), q.cols()}, q.rows(), k.rows(), q.cols()).first->second;
    blocks.run(q.data(), k.data(), v.data(), weights, block.data(), causal);
  });
}

}  // namespace

Peer onednn_blocks() {
  omp_set_num_threads(1);
  return {.name = "onednn_blocks", .forward = forward};
}

}  // namespace bench
