/// Every method that has a name, and one that a user wrote: what the tests that run over all of them share.
#pragma once

#include <attn/any_approximator.hpp>

#include "mean_pooling.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace test {

/// Names of all methods.
inline std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& method : attn::methods<double>()) names.emplace_back(method.name);
  names.emplace_back(MeanPooling<double>::kName);
  return names;
}

template <class T>
attn::AnyApproximator<T> make_method(const std::string& name, const attn::MethodOptions& options = {}) {
  if (name == MeanPooling<T>::kName) return attn::AnyApproximator<T>(MeanPooling<T>{});
  return attn::find_method<T>(name).make(options);
}

/// Options by which every approximation is of that size: so many landmarks, or clusters of which a quarter are near.
inline attn::MethodOptions of_size(Index m, attn::MethodOptions options = {}) {
  options.num_landmarks = options.num_clusters = m;
  options.num_groups = std::max<Index>(1, m / 3);
  options.num_near = m / 4;
  return options;
}

/// Body is called for float and for double.
template <class Body>
void in_both_precisions(const Body& body) {
  {
    SCOPED_TRACE("float");
    body(float{});
  }
  SCOPED_TRACE("double");
  body(double{});
}

/// Tests that are parametrised by a method's name.
class MethodTest : public ::testing::TestWithParam<std::string> {
 protected:
  template <class T>
  attn::AnyApproximator<T> make(Index size, const attn::MethodOptions& options = {}) const {
    return make_method<T>(GetParam(), of_size(size, options));
  }
};

/// A method's name as a part of a test's.
inline std::string test_name(const ::testing::TestParamInfo<std::string>& method) {
  std::string name = method.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

/// Supported inputs of 140 queries, of as many keys or of 93: without a mask, and with masks of keys, of queries, and
/// of both.
template <class T>
struct MaskedInputs {
  explicit MaskedInputs(Index n_keys) : n_k(n_keys), x(make_tokens<T>(Family::init, {140, n_k, 16, 18}, 104)) {
    if (n_k == 140) keep_key = keep_query;
  }

  std::vector<Inputs<T>> all() const { return all(x); }
  std::vector<Inputs<T>> all(const Tokens<T>& tokens) const {
    std::vector<Inputs<T>> result;
    for (const Mask& mask : {Mask{}, Mask{.keep_key = keep_key}, Mask{.keep_query = keep_query},
                             Mask{.keep_key = keep_key, .keep_query = keep_query}}) {
      result.push_back({.q = tokens.q, .k = tokens.k, .v = tokens.v, .mask = mask});
    }
    return result;
  }

  /// The tokens with every row that a mask of in drops set to poison.
  Tokens<T> poisoned(const Inputs<T>& in, T poison) const {
    Tokens<T> y = x;
    for (Index i = 0; i < y.q.rows(); ++i) {
      if (!reference::kept(in.mask.keep_query, i)) y.q.row(i).setConstant(poison);
    }
    for (Index j = 0; j < n_k; ++j) {
      if (reference::kept(in.mask.keep_key, j)) continue;
      y.k.row(j).setConstant(poison);
      y.v.row(j).setConstant(poison);
    }
    return y;
  }

  Index n_k;
  std::vector<std::uint8_t> keep_query = random_keep(140, 0.8, 105), keep_key = random_keep(n_k, 0.7, 106);
  Tokens<T> x;
};

}  // namespace test
