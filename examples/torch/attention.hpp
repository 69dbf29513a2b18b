/// Attention of libtorch tensors by any of attn's methods, with gradients.
#pragma once

#include <attn/any_approximator.hpp>

#include <ATen/core/ivalue.h>  // ahead of the others: Clang 14 takes them for C++20 only so
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <string_view>

namespace attn_torch {

/// Which keys and queries count: (batch, n_k) and (batch, n_q), boolean; an undefined tensor keeps all. For a padded
/// sequence pass the same tensor twice.
struct Keep {
  torch::Tensor key{}, query{};
};

/// Attention of every head of every batch item, which autograd differentiates by q, k and v (once: not the gradients
/// again).
///   q (batch, H_q, n_q, d)   k (batch, H_k, n_k, d)   v (batch, H_k, n_k, d_v)   result (batch, H_q, n_q, d_v)   H_k
///   divides H_q
/// attn reads and writes the tensors' own memory: any strides will do as long as the features of a token lie side by
/// side, so that the heads of a projection, x.view({batch, n, heads, d}).transpose(1, 2), need no copy. In memory the
/// result is (batch, n_q, H_q, d_v), so that .transpose(1, 2).flatten(2) joins its heads without one. Runs on torch's
/// threads. Throws std::invalid_argument when shapes, types or devices disagree, features are strided, or the method
/// does not support the mask.
torch::Tensor attend(const attn::AnyApproximator<float>& method, const torch::Tensor& q, const torch::Tensor& k,
                     const torch::Tensor& v, const Keep& keep = {});
torch::Tensor attend(const attn::AnyApproximator<double>& method, const torch::Tensor& q, const torch::Tensor& k,
                     const torch::Tensor& v, const Keep& keep = {});

/// The same as a module without parameters: Attention("skyformer", attn::MethodOptions{.num_landmarks = 64}). Takes
/// float and double. Throws std::invalid_argument with the names that there are.
class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(std::string_view method, const attn::MethodOptions& options = {});

  torch::Tensor forward(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const Keep& keep = {}) const;

 private:
  attn::AnyApproximator<float> in_float_;
  attn::AnyApproximator<double> in_double_;
};
TORCH_MODULE(Attention);

}  // namespace attn_torch
