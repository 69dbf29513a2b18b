/// A classifier of sequences: a small transformer whose attention is any of attn's methods.
#pragma once

#include "torch/attention.hpp"

#include <torch/torch.h>

#include <cstddef>
#include <string>
#include <vector>

/// Tokens (batch, n), padded behind, and which of them are there, keep (batch, n).
struct Batch {
  torch::Tensor tokens, keep, values;
};

struct ModelShape {
  long vocabulary, classes, max_length;
  long dim = 64, heads = 2, hidden = 128, layers = 2;
};

/// x + attention of LayerNorm(x), then x + MLP of LayerNorm(x): Xiong et al. 2020, figure 1b.
class LayerImpl : public torch::nn::Module {
 public:
  LayerImpl(const ModelShape& shape, const attn_torch::Attention& attention)
      : heads_(shape.heads),
        attention_(attention),
        attention_norm_(register_module("attention_norm", norm(shape))),
        projection_(register_module("projection", torch::nn::Linear(shape.dim, 3 * shape.dim))),
        joined_(register_module("joined", torch::nn::Linear(shape.dim, shape.dim))),
        mlp_norm_(register_module("mlp_norm", norm(shape))),
        into_hidden_(register_module("into_hidden", torch::nn::Linear(shape.dim, shape.hidden))),
        out_of_hidden_(register_module("out_of_hidden", torch::nn::Linear(shape.hidden, shape.dim))) {}

  /// Attention's result with its heads joined, (batch, n, dim). x (batch, n, dim).
  torch::Tensor attend(const torch::Tensor& x, const torch::Tensor& keep) {
    const torch::Tensor projected =
        projection_(attention_norm_(x)).view({x.size(0), x.size(1), 3, heads_, x.size(2) / heads_});
    const auto part = [&](long i) { return projected.select(2, i).transpose(1, 2); };
    return attention_->forward(part(0), part(1), part(2), {keep, keep}).transpose(1, 2).flatten(2);
  }

  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& keep) {
    const torch::Tensor y = x + joined_(attend(x, keep));
    return y + out_of_hidden_(torch::gelu(into_hidden_(mlp_norm_(y))));
  }

 private:
  static torch::nn::LayerNorm norm(const ModelShape& shape) {
    return torch::nn::LayerNorm(torch::nn::LayerNormOptions({shape.dim}));
  }

  long heads_;
  attn_torch::Attention attention_;
  torch::nn::LayerNorm attention_norm_;
  torch::nn::Linear projection_, joined_;
  torch::nn::LayerNorm mlp_norm_;
  torch::nn::Linear into_hidden_, out_of_hidden_;
};
TORCH_MODULE(Layer);

/// Embedded tokens and positions, the layers, the mean over the tokens that are there, and a linear classifier.
class ClassifierImpl : public torch::nn::Module {
 public:
  ClassifierImpl(const ModelShape& shape, const attn_torch::Attention& attention)
      : tokens_(register_module("tokens", torch::nn::Embedding(shape.vocabulary, shape.dim))),
        positions_(register_module("positions", torch::nn::Embedding(shape.max_length, shape.dim))),
        norm_(register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({shape.dim})))),
        classes_(register_module("classes", torch::nn::Linear(shape.dim, shape.classes))) {
    for (long i = 0; i < shape.layers; ++i) {
      layers_.push_back(register_module("layer" + std::to_string(i), Layer(shape, attention)));
    }
    const torch::NoGradGuard unrecorded;
    tokens_->weight.mul_(kEmbeddingDeviation);
    positions_->weight.mul_(kEmbeddingDeviation);
  }

  /// Scores of the classes, (batch, classes).
  torch::Tensor forward(const Batch& batch) {
    torch::Tensor x = embed(batch);
    for (Layer& layer : layers_) x = layer(x, batch.keep);
    const torch::Tensor kept = batch.keep.unsqueeze(-1).to(x.scalar_type());
    return classes_((norm_(x) * kept).sum(1) / kept.sum(1));
  }

  /// The result of the last layer's attention, (batch, n, dim).
  torch::Tensor last_attention(const Batch& batch) {
    torch::Tensor x = embed(batch);
    for (std::size_t i = 0; i + 1 < layers_.size(); ++i) x = layers_[i](x, batch.keep);
    return layers_.back()->attend(x, batch.keep);
  }

 private:
  static constexpr double kEmbeddingDeviation = 0.02;

  torch::Tensor embed(const Batch& batch) {
    return tokens_(batch.tokens) + positions_(torch::arange(batch.tokens.size(1)));
  }

  torch::nn::Embedding tokens_, positions_;
  std::vector<Layer> layers_;
  torch::nn::LayerNorm norm_;
  torch::nn::Linear classes_;
};
TORCH_MODULE(Classifier);
