#include "compare/methods.hpp"

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

constexpr std::string_view kMeans = "SegmentMeans", kSample = "UniformSample";

constexpr auto kFacts = std::to_array<MethodFacts>({
    {"softmax", Target::softmax, true, "SoftmaxAttention", ""},
    {"nystrom", Target::softmax, false, "Nystrom", kMeans},
    {"shifted-nystrom", Target::softmax, false, "ShiftedNystrom", kMeans},
    {"lifted-softmax", Target::softmax, false, "LiftedSoftmax", kSample},
    {"gaussian", Target::gaussian, true, "GaussianAttention", ""},
    {"skyformer", Target::gaussian, false, "Skyformer", kSample},
});

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

attn::AnyApproximator<float> make_method(const MethodFacts& method, attn::Index num_landmarks, std::uint64_t seed) {
  attn::MethodOptions options{.seed = seed};
  if (!method.exact) options.num_landmarks = num_landmarks;
  return attn::make_approximator<float>(method.name, options);
}

AnyOperator matrix_of(const MethodFacts& method, attn::Index num_landmarks, std::uint64_t seed,
                      const attn::Inputs<float>& in, attn::Context& context) {
  if (method.exact && method.target == Target::softmax)
    return AnyOperator(attn::ExactOperator<float, attn::SoftmaxKernel>({}, in.q, in.k, in.mask, context));
  if (method.exact)
    return AnyOperator(attn::ExactOperator<float, attn::GaussianKernel>({}, in.q, in.k, in.mask, context));
  if (method.name == attn::ShiftedNystrom<float>::kName)
    return AnyOperator(FrozenShift<float>({.num_landmarks = num_landmarks}, in, context));
  return AnyOperator(attn::ApproximatorOperator(make_method(method, num_landmarks, seed), in.q, in.k, in.mask));
}

std::string line_of_cpp(const MethodFacts& method, attn::Index num_landmarks, std::uint64_t seed, const MaskUse& mask) {
  std::string landmarks;
  if (!method.exact) {
    landmarks = "attn::" + std::string(method.landmarks) + "{.num_landmarks = " + std::to_string(num_landmarks);
    if (method.landmarks == kSample) landmarks += ", .seed = " + std::to_string(seed);
    landmarks += "}";
  }
  return "attn::" + std::string(method.type) + "<float>{" + landmarks + "}.forward({.q = q, .k = k, .v = v" +
         mask_field(mask) + "}, out, context);";
}
