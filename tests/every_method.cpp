#include "every_method.hpp"

namespace attn {

template std::span<const MethodEntry<float>> methods<float>();
template std::span<const MethodEntry<double>> methods<double>();
template AnyApproximator<float> make_approximator<float>(std::string_view, const MethodOptions&);
template AnyApproximator<double> make_approximator<double>(std::string_view, const MethodOptions&);
template AnyApproximator<Eigen::half> make_approximator<Eigen::half>(std::string_view, const MethodOptions&);
template AnyApproximator<Eigen::bfloat16> make_approximator<Eigen::bfloat16>(std::string_view, const MethodOptions&);

}  // namespace attn
