// compiles
#include <attn/exact.hpp>

void call(const attn::Matrix<float>& q, const Eigen::MatrixXf& columns, const Eigen::VectorXf& v,
          attn::Matrix<float>& out, attn::Context& context) {
  const attn::SoftmaxAttention<float> method;
  using Map = Eigen::Map<const attn::Matrix<float>>;
  using Ref = Eigen::Ref<const attn::Matrix<float>>;
  method.forward({.q = q.topRows(2), .k = Map(q.data(), q.rows(), q.cols()), .v = Ref(q)}, out, context);
  method.forward({.q = columns.transpose(), .k = attn::ConstMatrixRef<float>(q), .v = v}, out, context);
  const attn::Inputs<float> in{.q = q, .k = q.leftCols(3), .v = out};
  method.forward({.q = in.q, .k = in.k.middleRows(1, 2), .v = in.v}, out, context);
  out = attn::attention(method, attn::Matrix<float>(2 * q), q, q);
}
