/// The methods that the filter can be computed by: all of the library's, automatic only where it is asked for.
#pragma once

#include "options.hpp"

#include <attn/any_approximator.hpp>

#include <string_view>
#include <vector>

/// Near clusters of multipole, for so many landmarks of the others.
constexpr attn::Index near_clusters(attn::Index num_landmarks) {
  return num_landmarks / 16;
}

/// An exact method needs no landmarks. All others take their number.
bool is_exact(std::string_view name);

/// Methods of the Gaussian kernel take the features as they are; those of softmax need softmax_features.
bool is_gaussian(std::string_view name);

/// Those of the library's methods that options asks for: exact ones first and, among either, those of the Gaussian
/// kernel.
std::vector<std::string_view> chosen_methods(const Options& options);

/// The method of that name, set up to compute the filter, with num_landmarks landmarks where it takes any; multipole
/// with near_clusters of them.
attn::AnyApproximator<float> filter_method(std::string_view name, attn::Index num_landmarks, const Options& options);
