#include "compare/methods.hpp"

#include "common/frozen_near_field.hpp"
#include "common/frozen_shift.hpp"

#include <attn/attention_operator.hpp>

#include <algorithm>
#include <array>
#include <stdexcept>

namespace attn {

template std::span<const MethodEntry<float>> methods<float>();
template AnyApproximator<float> make_approximator<float>(std::string_view, const MethodOptions&);

}  // namespace attn

namespace {

constexpr std::string_view kClusters = "Clusters", kMeans = "SegmentMeans", kSample = "UniformSample";

constexpr auto kFacts = std::to_array<MethodFacts>({
    {"softmax", Target::softmax, true, "SoftmaxAttention", ""},
    {"multipole", Target::softmax, false, "Multipole", kClusters},
    {"automatic", Target::softmax, false, "Automatic", ""},
    {"nystrom", Target::softmax, false, "Nystrom", kMeans},
    {"shifted-nystrom", Target::softmax, false, "ShiftedNystrom", kMeans},
    {"lifted-softmax", Target::softmax, false, "LiftedSoftmax", kSample},
    {"gaussian", Target::gaussian, true, "GaussianAttention", ""},
    {"skyformer", Target::gaussian, false, "Skyformer", kSample},
});

/// "attn::Option{.num_... = size}", or nothing for what has no size.
std::string sized_option(const MethodFacts& method, attn::Index size, std::uint64_t seed) {
  if (size == 0) return "";
  const std::string field = has_clusters(method.name) ? "near" : "landmarks";
  std::string option = "attn::" + std::string(method.sized_by) + "{.num_" + field + " = " + std::to_string(size);
  if (method.sized_by == kSample) option += ", .seed = " + std::to_string(seed);
  return option + "}";
}

/// ", .mask = {...}", or nothing where there is none.
std::string mask_field(const MaskUse& mask) {
  std::string fields;
  const auto add = [&](bool used, std::string_view field) {
    if (used) fields += (fields.empty() ? "" : ", ") + std::string(field);
  };
  add(mask.causal == attn::Causal::upper_left, ".causal = attn::Causal::upper_left");
  add(mask.causal == attn::Causal::lower_right, ".causal = attn::Causal::lower_right");
  add(mask.keep_key, ".keep_key = keep");
  add(mask.keep_query, ".keep_query = keep");
  return fields.empty() ? "" : ", .mask = {" + fields + "}";
}

}  // namespace

std::string_view target_name(Target target) {
  return exact_method(target).name;
}

const MethodFacts& facts_of(std::string_view name) {
  const auto found = std::ranges::find(kFacts, name, &MethodFacts::name);
  if (found == kFacts.end()) throw std::logic_error("no facts about method " + std::string(name));
  return *found;
}

const MethodFacts& exact_method(Target target) {
  return *std::ranges::find_if(kFacts, [&](const MethodFacts& m) { return m.exact && m.target == target; });
}

bool has_clusters(std::string_view method) {
  return method == attn::Multipole<float>::kName;
}

std::string with_size(std::string_view method, attn::Index size) {
  if (size == 0) return "";
  return " with " + std::to_string(size) + (has_clusters(method) ? " near clusters" : " landmarks");
}

attn::AnyApproximator<float> make_method(const MethodFacts& method, attn::Index size, std::uint64_t seed) {
  attn::MethodOptions options{.seed = seed};
  if (size > 0) (has_clusters(method.name) ? options.num_near : options.num_landmarks) = size;
  return attn::find_method<float>(method.name).make(options);
}

AnyOperator matrix_of(const MethodFacts& method, attn::Index size, std::uint64_t seed, const attn::Inputs<float>& in,
                      attn::Context& context) {
  if (method.exact && method.target == Target::softmax)
    return AnyOperator(attn::ExactOperator<float, attn::SoftmaxKernel>({}, in.q, in.k, in.mask, context));
  if (method.exact)
    return AnyOperator(attn::ExactOperator<float, attn::GaussianKernel>({}, in.q, in.k, in.mask, context));
  if (method.name == attn::ShiftedNystrom<float>::kName)
    return AnyOperator(FrozenShift<float>({.num_landmarks = size}, in, context));
  if (has_clusters(method.name)) {
    attn::Clusters clusters;
    if (size > 0) clusters.num_near = size;
    return AnyOperator(FrozenNearField<float>(attn::Multipole<float>(clusters), in));
  }
  return AnyOperator(attn::ApproximatorOperator(make_method(method, size, seed), in.q, in.k, in.mask));
}

std::string line_of_cpp(const MethodFacts& method, attn::Index size, std::uint64_t seed, const MaskUse& mask) {
  return "attn::" + std::string(method.type) + "<float>{" + sized_option(method, size, seed) +
         "}.forward({.q = q, .k = k, .v = v" + mask_field(mask) + "}, out, context);";
}
