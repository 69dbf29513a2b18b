/// All methods by name, compiled once for all tests and benchmarks: their kernels are most of what one would compile.
#pragma once

#include <attn/any_approximator.hpp>

namespace attn {

extern template std::span<const MethodEntry<float>> methods<float>();
extern template std::span<const MethodEntry<double>> methods<double>();
extern template AnyApproximator<float> make_approximator<float>(std::string_view, const MethodOptions&);
extern template AnyApproximator<double> make_approximator<double>(std::string_view, const MethodOptions&);
extern template AnyApproximator<Eigen::half> make_approximator<Eigen::half>(std::string_view, const MethodOptions&);
extern template AnyApproximator<Eigen::bfloat16> make_approximator<Eigen::bfloat16>(std::string_view, const MethodOptions&);

}  // namespace attn
