/// Every kernel that there is, and one of a user's.
#pragma once

#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include "common/reference.hpp"

#include <gtest/gtest.h>

namespace test {

/// A kernel of a user's, whose bias is not half its scale.
struct OwnKernel {
  double scale(attn::Index) const { return 0.3; }
  double bias(attn::Index) const { return 0.1; }
  attn::Rows rows() const { return attn::Rows::raw; }
};

/// body(kernel, the oracle's) for every kernel, for tokens of d features.
template <class Body>
void for_each_kernel(attn::Index d, const Body& body) {
  {
    SCOPED_TRACE("softmax");
    body(attn::SoftmaxKernel{}, reference::softmax_kernel(d));
  }
  for (const attn::Rows rows : {attn::Rows::raw, attn::Rows::normalized}) {
    SCOPED_TRACE(rows == attn::Rows::raw ? "Gaussian, raw" : "Gaussian, normalized");
    body(attn::GaussianKernel{.rows = rows}, reference::gaussian_kernel(d, {}, rows == attn::Rows::normalized));
  }
  SCOPED_TRACE("own kernel");
  body(OwnKernel{}, reference::Kernel{.scale = 0.3, .bias = 0.1, .normalized = false});
}

}  // namespace test
