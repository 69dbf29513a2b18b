#include "methods.hpp"

#include "filter.hpp"

#include <algorithm>

bool is_exact(std::string_view name) {
  return name == attn::GaussianAttention<float>::kName || name == attn::SoftmaxAttention<float>::kName;
}

bool is_gaussian(std::string_view name) {
  return name == attn::GaussianAttention<float>::kName || name == attn::Skyformer<float>::kName;
}

std::vector<std::string_view> chosen_methods(const Options& options) {
  std::vector<std::string_view> names;
  for (const auto& method : attn::methods<float>()) {
    const bool is_sized = method.name != attn::Automatic<float>::kName;  // by a number of landmarks, which is compared
    const bool wanted =
        options.methods.empty() ? is_sized : std::ranges::find(options.methods, method.name) != options.methods.end();
    if (wanted && !(options.no_exact && is_exact(method.name))) names.push_back(method.name);
  }
  const auto rank = [](std::string_view name) { return 2 * (is_exact(name) ? 0 : 1) + (is_gaussian(name) ? 0 : 1); };
  std::ranges::stable_sort(names, {}, rank);
  return names;
}

attn::AnyApproximator<float> filter_method(std::string_view name, attn::Index num_landmarks, const Options& options) {
  return attn::find_method<float>(name).make({.num_landmarks = num_landmarks,
                                              .num_near = near_clusters(num_landmarks),
                                              .gamma = options.gamma,
                                              .scale = 1.0,
                                              .bandwidth = kFilterKernel.bandwidth,
                                              .seed = options.seed,
                                              .rows = kFilterKernel.rows});
}
