/// What takes longest to compile, once in a program rather than in each of its source files. With ATTN_EXTERN_TEMPLATES
/// defined for all of them, <attn/attn.hpp> includes this header, and one more file, with ATTN_INSTANTIATE_TEMPLATES
/// defined, includes nothing else: there streamed products and attention() by every method are instantiated for float
/// and double, and the registry of methods for all types. The CMake target attn::compiled brings the macro and that
/// file. All files must be compiled for the same processor.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/any_approximator.hpp>
#include <attn/approximator.hpp>
#include <attn/automatic.hpp>
#include <attn/core.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/engine/packed.hpp>
#include <attn/exact.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/lifted_softmax.hpp>
#include <attn/multipole.hpp>
#include <attn/nystrom.hpp>
#include <attn/skyformer.hpp>
#include <attn/spectral_shift.hpp>

#include <span>
#include <string_view>

#ifdef ATTN_INSTANTIATE_TEMPLATES
#define ATTN_TEMPLATE template
#else
#define ATTN_TEMPLATE extern template
#endif

namespace attn {

#define ATTN_PRODUCTS(T)                                                                                             \
  ATTN_TEMPLATE void detail::run(const detail::Product<T>&, const detail::ResultRows<T>&, const detail::LogSums<T>&, \
                                 Context&, Scratch&);                                                                \
  ATTN_TEMPLATE void detail::run_partial(const detail::Product<T>&, const RowStates<T>&, Context&, Scratch&);        \
  ATTN_TEMPLATE void detail::run_few(const detail::Product<T>&, const detail::ResultRows<T>&,                        \
                                     const detail::LogSums<T>&, Context&, Scratch&);                                 \
  ATTN_TEMPLATE void detail::run_few_partial(const detail::Product<T>&, const RowStates<T>&, Context&, Scratch&);    \
  ATTN_TEMPLATE const detail::StripKernel<T>& detail::make_strip_kernel(const detail::Product<T>&, Scratch&);        \
  ATTN_TEMPLATE const detail::StripKernel<T>& detail::make_causal_strip_kernel(const detail::Product<T>&, Scratch&); \
  ATTN_TEMPLATE const detail::FarPairs<T>* detail::make_far_pairs(const detail::Product<T>&, Scratch&);              \
  ATTN_TEMPLATE void detail::run_backward(const detail::Product<T>&, const detail::RowGradients<T>&,                 \
                                          const Gradients<T>&, std::span<T>, Context&, Scratch&);                    \
  ATTN_TEMPLATE void detail::iterate_pinv(const ConstMatrixRef<T>&, MatrixRef<T>, int, Context&);                    \
  ATTN_TEMPLATE void detail::apply_iterated_pinv(const ConstMatrixRef<T>&, const MatrixRef<T>&, const MatrixRef<T>&, \
                                                 int, Context&);                                                     \
  ATTN_TEMPLATE void detail::iterate_pinv_backward(const ConstMatrixRef<T>&, const detail::PinvIterates<T>&,         \
                                                   MatrixRef<T>, MatrixRef<T>, Context&);
#define ATTN_KERNEL(Kernel, T)                                                                                      \
  ATTN_TEMPLATE void kernel_matmul(const Kernel&, const Inputs<T>&, MatrixRef<T>, std::span<T>, Context&);          \
  ATTN_TEMPLATE void kernel_matmul(const Kernel&, const Inputs<T>&, MatrixRef<T>, Context&);                        \
  ATTN_TEMPLATE void kernel_matmul_backward(const Kernel&, const Inputs<T>&, ConstMatrixRef<T>, std::span<const T>, \
                                            ConstMatrixRef<T>, const Gradients<T>&, Context&, std::span<T>);        \
  ATTN_TEMPLATE void detail::multiply(const Kernel&, const detail::Sources<T>&, const detail::ResultRows<T>&,       \
                                      const detail::LogSums<T>&, Context&);                                         \
  ATTN_TEMPLATE void detail::multiply(const Kernel&, const detail::Sources<T>&, const detail::ResultRows<T>&, T*,   \
                                      Context&);                                                                    \
  ATTN_TEMPLATE void detail::multiply_backward(const Kernel&, const Inputs<T>&, const ConstMatrixRef<T>&,           \
                                               std::span<const detail::RowLog<T>>, const ConstMatrixRef<T>&,        \
                                               const Gradients<T>&, Context&, std::span<T>);                        \
  ATTN_TEMPLATE void detail::multiply_partial(const Kernel&, const detail::Sources<T>&, const RowStates<T>&,        \
                                              Context&);                                                            \
  ATTN_TEMPLATE void detail::kernel_matrix(const Kernel&, const ConstMatrixRef<T>&, const ConstMatrixRef<T>&,       \
                                           MatrixRef<T>, Context&);
#define ATTN_METHOD(Method, T)                                                                                 \
  ATTN_TEMPLATE Matrix<T> attention(const Method<T>&, ConstMatrixRef<T>, ConstMatrixRef<T>, ConstMatrixRef<T>, \
                                    const Mask&);                                                              \
  ATTN_TEMPLATE Matrix<T> attention(const Method<T>&, ConstMatrixRef<T>, ConstMatrixRef<T>, ConstMatrixRef<T>, \
                                    const Mask&, Context&);
#define ATTN_REGISTRY(T)                                   \
  ATTN_TEMPLATE std::span<const MethodEntry<T>> methods(); \
  ATTN_TEMPLATE AnyApproximator<T> make_approximator(std::string_view, const MethodOptions&);
#define ATTN_GEMM(T)                                                                                                  \
  ATTN_TEMPLATE void detail::gemm<T>(T, const detail::Operand<T>&, const detail::Operand<T>&, T, const MatrixRef<T>&, \
                                     Context&);
#define ATTN_ALL(T)                 \
  ATTN_PRODUCTS(T)                  \
  ATTN_KERNEL(SoftmaxKernel, T)     \
  ATTN_KERNEL(GaussianKernel, T)    \
  ATTN_METHOD(SoftmaxAttention, T)  \
  ATTN_METHOD(GaussianAttention, T) \
  ATTN_METHOD(Multipole, T)         \
  ATTN_METHOD(Automatic, T)         \
  ATTN_METHOD(Nystrom, T)           \
  ATTN_METHOD(ShiftedNystrom, T)    \
  ATTN_METHOD(Skyformer, T)         \
  ATTN_METHOD(LiftedSoftmax, T)     \
  ATTN_METHOD(AnyApproximator, T)   \
  ATTN_REGISTRY(T)                  \
  ATTN_GEMM(T)

ATTN_ALL(float)
ATTN_ALL(double)
ATTN_REGISTRY(Eigen::half)
ATTN_REGISTRY(Eigen::bfloat16)

#undef ATTN_ALL
#undef ATTN_GEMM
#undef ATTN_REGISTRY
#undef ATTN_METHOD
#undef ATTN_KERNEL
#undef ATTN_PRODUCTS
#undef ATTN_TEMPLATE

}  // namespace attn
