// Everything that a user can instantiate, to be compiled with warnings that a careful user has on.
#include <attn/attn.hpp>

#include <cstddef>
#include <string_view>
#include <vector>

template class attn::AnyApproximator<float>;
template class attn::AnyApproximator<double>;
template class attn::AnyApproximator<Eigen::half>;
template class attn::AnyApproximator<Eigen::bfloat16>;
template class attn::Skyformer<float, attn::StridedSample, attn::PreconditionedPinv>;
template class attn::ExactAttention<float, attn::SoftmaxKernel>;
template attn::AnyApproximator<float> attn::make_approximator(std::string_view, const attn::MethodOptions&);
template attn::AnyApproximator<double> attn::make_approximator(std::string_view, const attn::MethodOptions&);
template attn::AnyApproximator<Eigen::half> attn::make_approximator(std::string_view, const attn::MethodOptions&);

template <class T>
void primitives(const attn::Inputs<T>& in, attn::MatrixRef<T> out, const attn::Gradients<T>& gradients,
                attn::Context& context) {
  std::vector<T> lse(static_cast<std::size_t>(in.q.rows())), maximum = lse;
  std::vector<T> dbias(static_cast<std::size_t>(in.k.rows()));
  const attn::RowStates<T> states{maximum, lse, out};
  const attn::GaussianKernel kernel{.rows = attn::Rows::normalized};
  attn::kernel_matmul_partial(kernel, in, states, context);
  attn::merge(states, states);
  attn::finish(kernel, states, in.q.cols(), out, lse);
  attn::kernel_matmul(kernel, in, out, lse, context);
  attn::kernel_matmul_backward(kernel, in, out, lse, out, gradients, context, dbias);
  attn::depthwise_conv(in.v, lse, out, context, in.mask);
  out = attn::attention(attn::SoftmaxAttention<T>{}, in.q, in.k, in.v, in.mask);
}

template void primitives(const attn::Inputs<float>&, attn::MatrixRef<float>, const attn::Gradients<float>&,
                         attn::Context&);
template void primitives(const attn::Inputs<double>&, attn::MatrixRef<double>, const attn::Gradients<double>&,
                         attn::Context&);

#ifdef _OPENMP
attn::Context on_two_threads() {
  return attn::Context{attn::OpenMP{.threads = 2}};
}
#endif
