/// Results that share memory with what is read: refused by every method, and columns of one buffer side by side are not
/// that.
#include <attn/depthwise_conv.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/any_approximator.hpp>

#include "methods.hpp"
#include "support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using test::Context;
using test::error_of;
using test::Index;
using test::Inputs;
using test::Matrix;
using test::MatrixRef;

constexpr Index kLength = 90, kWidth = 8;

/// q, k, v and a result as columns of one buffer, as a projection may write them.
struct Packed {
  MatrixRef<float> part(Index i) { return buffer.middleCols(i * kWidth, kWidth); }
  Inputs<float> inputs() { return {.q = part(0), .k = part(1), .v = part(2)}; }

  Matrix<float> buffer = test::Random(701).normal(kLength, 7 * kWidth).cast<float>();
};

class Overlap : public test::MethodTest {};

std::vector<std::string> library_methods() {
  auto names = test::method_names();
  std::erase(names, "mean-pooling");  // checks its arguments as its author likes
  return names;
}
INSTANTIATE_TEST_SUITE_P(Every, Overlap, ::testing::ValuesIn(library_methods()), test::test_name);

TEST_P(Overlap, OfOutIsRefused) {
  for (const Index m : {6, 200}) {  // few landmarks, and so many that the method is exact
    const auto method = make<float>(m);
    Context context;
    Packed packed;
    const Matrix<float> before = packed.buffer;
    const char* const names[] = {"q", "k", "v"};
    for (Index i = 0; i < 3; ++i) {
      const std::string expected = GetParam() + ": out overlaps " + names[i];
      EXPECT_EQ(error_of([&] { method.forward(packed.inputs(), packed.part(i), context); }), expected);
      attn::AnyApproximator<float>::Saved saved;
      EXPECT_EQ(error_of([&] { method.forward(packed.inputs(), packed.part(i), context, saved); }), expected);
    }
    float* const last_of_k = packed.buffer.data() + (kLength - 1) * packed.buffer.cols() + kWidth - 1;
    const MatrixRef<float> one_element_in_k(last_of_k, 1, kWidth, kWidth);
    const Inputs<float> one{.q = packed.part(3).topRows(1), .k = packed.part(0), .v = packed.part(2)};
    if (method.supports(one)) {
      EXPECT_EQ(error_of([&] { method.forward(one, one_element_in_k, context); }), GetParam() + ": out overlaps k");
    }
    EXPECT_TRUE(test::bitwise_equal(packed.buffer, before));
  }
}

TEST_P(Overlap, OfColumnsSideBySideIsNone) {
  const auto method = make<float>(6);
  Context context;
  Packed packed;
  const Matrix<float> q = packed.part(0), k = packed.part(1), v = packed.part(2);
  Matrix<float> expected(kLength, kWidth);
  method.forward({.q = q, .k = k, .v = v}, expected, context);
  method.forward(packed.inputs(), packed.part(3), context);
  EXPECT_TRUE(test::bitwise_equal<float>(packed.part(3), expected));
}

TEST_P(Overlap, OfGradientsIsRefused) {
  const auto method = make<float>(6);
  Context context;
  Packed packed;
  Matrix<float> out(kLength, kWidth), dout = Matrix<float>::Ones(kLength, kWidth);
  attn::AnyApproximator<float>::Saved saved;
  method.forward(packed.inputs(), out, context, saved);
  const Matrix<float> before = packed.buffer;
  const auto error = [&](const attn::Gradients<float>& gradients) {
    return error_of([&] { method.backward(packed.inputs(), out, dout, saved, gradients, context); });
  };
  const auto dq = packed.part(3), dk = packed.part(4), dv = packed.part(5);
  EXPECT_EQ(error({.dq = packed.part(0), .dk = dk, .dv = dv}), GetParam() + ": dq overlaps q");
  EXPECT_EQ(error({.dq = dq, .dk = packed.part(2), .dv = dv}), GetParam() + ": dk overlaps v");
  EXPECT_EQ(error({.dq = dq, .dk = dk, .dv = out}), GetParam() + ": dv overlaps out");
  EXPECT_EQ(error({.dq = dout, .dk = dk, .dv = dv}), GetParam() + ": dq overlaps dout");
  EXPECT_EQ(error({.dq = dq, .dk = dq, .dv = dv}), GetParam() + ": dk overlaps dq");
  EXPECT_EQ(error({.dq = dq, .dk = dk, .dv = dq}), GetParam() + ": dv overlaps dq");
  EXPECT_EQ(error({.dq = dq, .dk = dk, .dv = dk}), GetParam() + ": dv overlaps dk");
  EXPECT_TRUE(test::bitwise_equal(packed.buffer, before));
  EXPECT_EQ(error({.dq = dq, .dk = dk, .dv = dv}), "no error");
}

TEST(OverlapOfViews, IsFoundElementByElement) {
  std::vector<float> data(100);
  const auto view = [&](Index first, Index rows, Index cols, Index stride) {
    return attn::ConstMatrixRef<float>(data.data() + first, rows, cols, stride);
  };
  const auto overlap = [](const auto& a, const auto& b) {
    EXPECT_EQ(attn::detail::overlap<float>(a, b), attn::detail::overlap<float>(b, a));
    return attn::detail::overlap<float>(a, b);
  };
  const auto places = [&](const attn::ConstMatrixRef<float>& m) {
    std::set<Index> all;
    for (Index r = 0; r < m.rows(); ++r) {
      for (Index c = 0; c < m.cols(); ++c) all.insert(m.data() - data.data() + r * m.outerStride() + c);
    }
    return all;
  };
  test::Random random(702);
  int found = 0;
  for (int i = 0; i < 2000; ++i) {
    const auto shape = [&] {
      const Index cols = 1 + random.below(5), stride = random.below(3) == 0 ? 0 : cols + random.below(12);
      return view(random.below(20), 1 + random.below(4), cols, stride);
    };
    const auto a = shape(), b = shape();
    const auto of_a = places(a), of_b = places(b);
    const bool shared = std::ranges::any_of(of_b, [&](Index at) { return of_a.contains(at); });
    ASSERT_EQ(overlap(a, b), shared) << i;
    found += shared ? 1 : 0;
  }
  EXPECT_GT(found, 200);
  EXPECT_LT(found, 1800);
}

TEST(OverlapOfViews, IsRefusedByTheConvolution) {
  Packed packed;
  const std::vector<float> filter(3, 1.0F);
  std::vector<float> dfilter(3);
  Context context;
  EXPECT_EQ(error_of([&] { attn::depthwise_conv<float>(packed.part(2), filter, packed.part(2), context); }),
            "depthwise_conv: out overlaps v");
  EXPECT_EQ(error_of([&] {
              attn::depthwise_conv_backward<float>(packed.part(2), filter, packed.part(3), packed.part(3), dfilter, context);
            }),
            "depthwise_conv_backward: dv overlaps dout");
}

}  // namespace
