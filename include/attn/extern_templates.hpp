/// What takes longest to compile, once in a program rather than in each of its source files. Where several files call attn, include
/// this header in all of them, and in one more file that has nothing else, with ATTN_INSTANTIATE_TEMPLATES defined: there the
/// streamed kernels are instantiated for float and double, and the registry of methods for all types. All files must be compiled for
/// the same processor.
#pragma once

#include <attn/any_approximator.hpp>
#include <attn/detail/gemm.hpp>
#include <attn/kernel_matmul.hpp>

#include <span>
#include <string_view>

#ifdef ATTN_INSTANTIATE_TEMPLATES
#define ATTN_TEMPLATE template
#else
#define ATTN_TEMPLATE extern template
#endif

namespace attn {

#define ATTN_KERNELS(T)                                                                                                            \
  ATTN_TEMPLATE void detail::run_whole(const detail::Product<T>&, const detail::ResultRows<T>&, std::span<T>, Context&, Scratch&); \
  ATTN_TEMPLATE void detail::run_partial(const detail::Product<T>&, const RowStates<T>&, Context&, Scratch&);                      \
  ATTN_TEMPLATE void detail::run_backward(const detail::Product<T>&, const detail::Seeds<T>&, const Gradients<T>&, std::span<T>,   \
                                          Context&, Scratch&);
#define ATTN_REGISTRY(T)                                   \
  ATTN_TEMPLATE std::span<const MethodEntry<T>> methods(); \
  ATTN_TEMPLATE AnyApproximator<T> make_approximator(std::string_view, const MethodOptions&);
#define ATTN_GEMM(T, left, right)                                               \
  ATTN_TEMPLATE void detail::gemm<T, detail::Left::left, detail::Right::right>( \
      T, const ConstMatrixRef<T>&, const ConstMatrixRef<T>&, T, MatrixRef<T>, Context&);

ATTN_KERNELS(float)
ATTN_KERNELS(double)
ATTN_REGISTRY(float)
ATTN_REGISTRY(double)
ATTN_REGISTRY(Eigen::half)
ATTN_REGISTRY(Eigen::bfloat16)
ATTN_GEMM(float, row_major, plain)
ATTN_GEMM(float, row_major, transposed)
ATTN_GEMM(float, column_major, plain)
ATTN_GEMM(double, row_major, plain)
ATTN_GEMM(double, row_major, transposed)
ATTN_GEMM(double, column_major, plain)

#undef ATTN_GEMM
#undef ATTN_REGISTRY
#undef ATTN_KERNELS
#undef ATTN_TEMPLATE

}  // namespace attn
