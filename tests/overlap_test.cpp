/// Results that share memory with what is read: refused by every method, and columns of one buffer side by side are not
/// that.
#include <attn/depthwise_conv.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/any_approximator.hpp>
#include <attn/attention_operator.hpp>
#include <attn/multi_head.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
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

TEST_P(Overlap, OfOutWithWhatIsReadBesideIsRefused) {
  for (const Index m : {6, 200}) {
    const auto method = make<float>(m);
    Context context;
    Packed packed;
    const auto error = [&](const Inputs<float>& in, MatrixRef<float> out) {
      return error_of([&] { method.forward(in, out, context); });
    };
    const auto expected = [](const std::string& text) { return GetParam() + ": out overlaps " + text; };
    const auto with = [&](const attn::Mask& mask, std::span<const float> bias = {}) {
      Inputs<float> in = packed.inputs();
      in.mask = mask;
      in.key_bias = bias;
      return in;
    };
    std::vector<float> side(kLength * kWidth, 1.0F);  // also a mask that keeps all: none of a row's bytes is read as 0
    std::memset(side.data(), 1, side.size() * sizeof(float));
    const MatrixRef<float> out(side.data(), kLength, kWidth, kWidth);
    const std::span<const std::uint8_t> keep(reinterpret_cast<const std::uint8_t*>(side.data() + 40), kLength);
    EXPECT_EQ(error(with({.keep_key = keep}), out), expected("keep_key"));
    EXPECT_EQ(error(with({.keep_query = keep}), out), expected("keep_query"));
    EXPECT_EQ(error(with({}, {side.data() + 7, static_cast<std::size_t>(kLength)}), out), expected("key_bias"));
    const std::string itself = GetParam() + ": out overlaps itself: its rows of 32 bytes are ";
    EXPECT_EQ(error(packed.inputs(), {side.data(), kLength, kWidth, kWidth - 1}), itself + "28 bytes apart");
    EXPECT_EQ(error(packed.inputs(), {side.data(), kLength, kWidth, 0}), itself + "0 bytes apart");
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
  EXPECT_EQ(error({.dq = {dq.data(), kLength, kWidth, kWidth / 2}, .dk = dk, .dv = dv}),
            GetParam() + ": dq overlaps itself: its rows of 32 bytes are 16 bytes apart");
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

/// Addresses of all bytes of a view.
template <class T>
std::vector<const char*> bytes_of(const attn::HeadsView<T>& x) {
  std::vector<const char*> all;
  for (Index b = 0; b < x.batch; ++b) {
    for (Index h = 0; h < x.heads; ++h) {
      for (Index i = 0; i < x.length; ++i) {
        const auto* run =
            reinterpret_cast<const char*>(x.data + b * x.batch_stride + h * x.head_stride + i * x.row_stride);
        for (Index at = 0; at < x.dim * static_cast<Index>(sizeof(T)); ++at) all.push_back(run + at);
      }
    }
  }
  return all;
}

/// Batches of heads within data: contiguous ones in either order, or any strides, 0 and negative ones among them.
template <class T>
attn::HeadsView<T> any_heads(test::Random& random, T* data, Index size) {
  const Index batch = 1 + random.below(3), heads = 1 + random.below(3), length = 1 + random.below(4),
              dim = 1 + random.below(3);
  attn::HeadsView<T> x = attn::head_major(data, batch, heads, length, dim);
  const Index kind = random.below(3);
  if (kind == 1) x = attn::token_major(data, batch, length, heads, dim);
  if (kind == 2)
    x = {data, batch, heads, length, dim, random.below(30) - 5, random.below(20) - 5, random.below(12) - 3};
  const Index before = -std::min<Index>(0, (batch - 1) * x.batch_stride) -
                       std::min<Index>(0, (heads - 1) * x.head_stride) -
                       std::min<Index>(0, (length - 1) * x.row_stride);
  x.data += before + random.below(size / 3);
  return x;
}

TEST(OverlapOfHeads, IsFoundByteByByte) {
  constexpr Index kSize = 400;
  std::vector<float> data(kSize);
  test::Random random(703);
  int shared = 0, by_itself = 0;
  for (int i = 0; i < 5000; ++i) {
    const auto a = any_heads(random, data.data(), kSize);
    const auto b = any_heads(random, reinterpret_cast<std::uint8_t*>(data.data()), kSize);  // a mask may lie anywhere
    const std::vector<const char*> of_a = bytes_of(a), of_b = bytes_of(b);
    const std::set<const char*> all_of_a(of_a.begin(), of_a.end());
    const bool meet = std::any_of(of_b.begin(), of_b.end(), [&](const char* at) { return all_of_a.count(at) > 0; });
    const attn::detail::Memory memory_a = attn::detail::memory_of("a", a), memory_b = attn::detail::memory_of("b", b);
    ASSERT_EQ(memory_a.overlaps(memory_b), meet) << i;
    ASSERT_EQ(memory_b.overlaps(memory_a), meet) << i;
    ASSERT_EQ(memory_a.overlaps_itself(), all_of_a.size() < of_a.size()) << i;
    shared += meet ? 1 : 0;
    by_itself += memory_a.overlaps_itself() ? 1 : 0;
  }
  EXPECT_GT(shared, 500);
  EXPECT_LT(shared, 4500);
  EXPECT_GT(by_itself, 300);
  EXPECT_LT(by_itself, 4500);
}

TEST(OverlapOfHeads, OfLargeInterleavedArraysIsDecidedAtOnce) {
  float* const data = nullptr;
  constexpr Index kBatch = 1 << 10, kTokens = 1 << 20, kHeads = 64, kDim = 64, kRow = 8 * kHeads * kDim;
  const auto part = [&](Index i, Index heads) {
    const attn::HeadsView<float> x{data + i * kDim, kBatch, heads, kTokens, kDim, kTokens * kRow, kDim, kRow};
    return attn::detail::memory_of("part", x);
  };
  EXPECT_FALSE(part(0, kHeads).overlaps(part(kHeads, kHeads)));
  EXPECT_FALSE(part(0, kHeads).overlaps(part(7 * kHeads, 8)));
  EXPECT_TRUE(part(0, kHeads).overlaps(part(kHeads - 1, 8)));
  EXPECT_FALSE(part(0, 8 * kHeads).overlaps_itself());
  EXPECT_TRUE(part(0, 8 * kHeads + 1).overlaps_itself());
}

/// Arrays [batch, length, heads, dim] of q, k, v and a result in one buffer: their rows side by side.
struct PackedHeads {
  static constexpr Index kBatch = 2, kTokens = 6, kHeads = 3, kDim = 4, kParts = 8;
  using View = attn::HeadsView<float>;

  /// Heads from the given one of a part on.
  View part(Index i, Index first_head = 0, Index heads = kHeads) {
    constexpr Index kRow = kParts * kHeads * kDim;
    return {data.data() + (i * kHeads + first_head) * kDim, kBatch, heads, kTokens, kDim, kTokens * kRow, kDim, kRow};
  }

  std::string forward(const View& out, std::span<const attn::Mask> masks = {}) {
    return error_of([&] { attn::multi_head(softmax, part(0), part(1), part(2), out, masks, context, saved); });
  }

  std::string backward(const attn::HeadGradients<float>& gradients, std::span<const attn::Mask> masks = {}) {
    return error_of([&] {
      attn::multi_head_backward(softmax, part(0), part(1), part(2), part(3), part(4), masks, saved, gradients, context);
    });
  }

  std::vector<float> data = std::vector<float>(kBatch * kTokens * kParts * kHeads * kDim, 0.25F);
  attn::SoftmaxAttention<float> softmax{};
  std::vector<attn::SoftmaxAttention<float>::Saved> saved{};
  Context context{};
};

TEST(OverlapOfHeads, IsRefusedWhicheverHeadsMeet) {
  PackedHeads x;
  const std::vector<float> before = x.data;
  EXPECT_EQ(x.forward(x.part(0, 1)), "multi_head: out overlaps q");   // head h of out is head h + 1 of q
  EXPECT_EQ(x.forward(x.part(1, -1)), "multi_head: out overlaps q");  // and head 0 of out the last one of q
  EXPECT_EQ(x.forward(x.part(1, 2)), "multi_head: out overlaps k");
  EXPECT_EQ(x.forward(x.part(2, 2)), "multi_head: out overlaps v");
  auto next_item = x.part(1);
  next_item.batch_stride = -next_item.batch_stride;
  next_item.data -= next_item.batch_stride;  // item b of out is item 1 - b of k
  EXPECT_EQ(x.forward(next_item), "multi_head: out overlaps k");
  EXPECT_EQ(x.data, before);
  EXPECT_EQ(x.forward(x.part(3)), "no error");
}

TEST(OverlapOfHeads, OfMasksIsRefused) {
  PackedHeads x;
  const auto bytes = [&](const PackedHeads::View& view) {
    return std::span<const std::uint8_t>(reinterpret_cast<const std::uint8_t*>(view(1, 2).data()),
                                         PackedHeads::kTokens);
  };
  const std::vector<attn::Mask> in_out{{}, {.keep_key = bytes(x.part(3))}}, in_dk{{}, {.keep_query = bytes(x.part(6))}};
  EXPECT_EQ(x.forward(x.part(3), in_out), "multi_head: out overlaps keep_key");
  EXPECT_EQ(x.forward(x.part(3), in_dk), "no error");
  EXPECT_EQ(x.backward({x.part(5), x.part(6), x.part(7)}, in_dk), "multi_head: dk overlaps keep_query");
}

TEST(OverlapOfHeads, OfGradientsIsRefusedWhicheverHeadsMeet) {
  PackedHeads x;
  ASSERT_EQ(x.forward(x.part(3)), "no error");
  const std::vector<float> before = x.data;
  EXPECT_EQ(x.backward({x.part(5), x.part(5, 1), x.part(7)}),
            "multi_head: dk overlaps dq");  // dk of head h is dq of head h + 1
  EXPECT_EQ(x.backward({x.part(5), x.part(6), x.part(6, -2)}), "multi_head: dv overlaps dq");
  EXPECT_EQ(x.backward({x.part(5), x.part(6), x.part(6, 2)}), "multi_head: dv overlaps dk");
  EXPECT_EQ(x.backward({x.part(1, 2), x.part(6), x.part(7)}), "multi_head: dq overlaps k");
  EXPECT_EQ(x.backward({x.part(5), x.part(2, 2), x.part(7)}), "multi_head: dk overlaps v");
  EXPECT_EQ(x.backward({x.part(5), x.part(6), x.part(3, 2)}), "multi_head: dv overlaps out");
  EXPECT_EQ(x.backward({x.part(4, 1), x.part(6), x.part(7)}), "multi_head: dq overlaps dout");
  EXPECT_EQ(x.data, before);
  EXPECT_EQ(x.backward({x.part(5), x.part(6), x.part(7)}), "no error");
}

/// Arguments of the streamed primitive in one buffer.
struct Streamed {
  static constexpr Index kRows = 5, kCols = 4;

  MatrixRef<float> matrix(Index i) { return {data.data() + i * 20, kRows, kCols, kCols}; }
  std::span<float> array(Index first) { return std::span(data).subspan(static_cast<std::size_t>(first), kRows); }
  Inputs<float> inputs() { return {.q = matrix(0), .k = matrix(1), .v = matrix(2), .key_bias = array(60)}; }
  attn::RowStates<float> states(Index first) {
    return {array(first), array(first + 5), {data.data() + first + 10, kRows, kCols, kCols}};
  }

  std::string forward(MatrixRef<float> out, std::span<float> lse) {
    return error_of([&] { attn::kernel_matmul(attn::SoftmaxKernel{}, inputs(), out, lse, context); });
  }
  std::string partial(const attn::RowStates<float>& states) {
    return error_of([&] { attn::kernel_matmul_partial(attn::SoftmaxKernel{}, inputs(), states, context); });
  }
  std::string finish(const attn::RowStates<float>& states, MatrixRef<float> out, std::span<float> lse) {
    return error_of([&] { attn::finish(attn::SoftmaxKernel{}, states, kCols, out, lse); });
  }
  std::string backward(const attn::Gradients<float>& gradients, std::span<float> dbias) {
    return error_of([&] {
      attn::kernel_matmul_backward(attn::SoftmaxKernel{}, inputs(), matrix(4), array(320), matrix(5), gradients,
                                   context, dbias);
    });
  }

  std::vector<float> data = std::vector<float>(400, 0.5F);
  Context context{};
};

TEST(OverlapOfArrays, IsRefusedByTheStreamedPrimitive) {
  Streamed x;
  EXPECT_EQ(x.forward(x.matrix(4), x.array(84)), "kernel_matmul: lse overlaps out");
  EXPECT_EQ(x.forward(x.matrix(4), x.array(3)), "kernel_matmul: lse overlaps q");
  EXPECT_EQ(x.forward(x.matrix(4), x.array(61)), "kernel_matmul: lse overlaps key_bias");
  EXPECT_EQ(x.forward({x.data.data() + 61, 5, 4, 4}, x.array(100)), "kernel_matmul: out overlaps key_bias");
  EXPECT_EQ(x.forward({x.data.data() + 80, 5, 4, 3}, x.array(100)),
            "kernel_matmul: out overlaps itself: its rows of 16 bytes are 12 bytes apart");
  EXPECT_EQ(x.forward(x.matrix(4), x.array(100)), "no error");

  const auto states = x.states(100);
  EXPECT_EQ(x.partial({states.maximum, states.maximum, states.weighted}), "kernel_matmul: sum overlaps maximum");
  EXPECT_EQ(x.partial({states.maximum, x.array(111), states.weighted}), "kernel_matmul: sum overlaps weighted");
  EXPECT_EQ(x.partial({x.array(62), states.sum, states.weighted}), "kernel_matmul: maximum overlaps key_bias");
  EXPECT_EQ(x.partial({states.maximum, states.sum, x.matrix(1)}), "kernel_matmul: weighted overlaps k");
  EXPECT_EQ(x.partial(states), "no error");
}

TEST(OverlapOfArrays, OfRowStatesIsRefused) {
  Streamed x;
  const auto states = x.states(100), other = x.states(150);
  const auto merge = [](const attn::RowStates<float>& into, const attn::RowStates<float>& from) {
    return error_of([&] { attn::merge(into, from); });
  };
  EXPECT_EQ(merge(states, states), "merge: weighted overlaps weighted");
  EXPECT_EQ(merge(states, {other.maximum, states.maximum, other.weighted}), "merge: maximum overlaps sum");
  EXPECT_EQ(merge({states.maximum, states.maximum, states.weighted}, other), "merge: sum overlaps maximum");
  EXPECT_EQ(merge(states, other), "no error");

  EXPECT_EQ(x.finish(states, x.matrix(4), states.sum), "finish: lse overlaps sum");
  EXPECT_EQ(x.finish(states, x.matrix(4), x.array(82)), "finish: lse overlaps out");
  EXPECT_EQ(x.finish(states, {states.weighted.data() + 1, 5, 4, 4}, {}), "finish: out overlaps weighted");
  EXPECT_EQ(x.finish(states, {states.maximum.data() - 14, 5, 4, 4}, {}), "finish: out overlaps maximum");
  EXPECT_EQ(x.finish(states, states.weighted, x.array(112)), "finish: lse overlaps out");
  EXPECT_EQ(x.finish(states, states.weighted, x.array(200)), "no error");
}

TEST(OverlapOfArrays, OfGradientsIsRefused) {
  Streamed x;
  const attn::Gradients<float> apart{x.matrix(6), x.matrix(7), x.matrix(8)};
  const std::string who = "kernel_matmul_backward: ";
  EXPECT_EQ(x.backward(apart, x.array(61)), who + "dbias overlaps key_bias");
  EXPECT_EQ(x.backward(apart, x.array(321)), who + "dbias overlaps lse");
  EXPECT_EQ(x.backward(apart, x.array(141)), who + "dbias overlaps dk");
  EXPECT_EQ(x.backward({x.matrix(6), {x.data.data() + 62, 5, 4, 4}, x.matrix(8)}, {}), who + "dk overlaps key_bias");
  EXPECT_EQ(x.backward({{x.data.data() + 316, 5, 4, 4}, x.matrix(7), x.matrix(8)}, {}), who + "dq overlaps lse");
  EXPECT_EQ(x.backward(apart, x.array(200)), "no error");
}

TEST(OverlapOfArrays, OfNarrowTypesWithFloatIsRefused) {
  const Matrix<Eigen::bfloat16> q = Matrix<Eigen::bfloat16>::Ones(8, 8);
  Matrix<Eigen::bfloat16> k = q, v = q, out = q;
  Context context;
  const auto error = [&](void* at) {
    const std::span<float> lse(static_cast<float*>(at), 8);
    return error_of([&] {
      attn::kernel_matmul(attn::SoftmaxKernel{}, Inputs<Eigen::bfloat16>{q, k, v}, out, lse, context);
    });
  };
  EXPECT_EQ(error(k.data() + 48), "kernel_matmul: lse overlaps k");
  EXPECT_EQ(error(out.data() + 16), "kernel_matmul: lse overlaps out");
  EXPECT_EQ(error_of([&] {
              attn::SoftmaxAttention<Eigen::bfloat16>{}.forward({q, k, v}, k, context);
            }),
            "softmax: out overlaps k");
}

TEST(OverlapOfViews, IsRefusedByOperators) {
  Packed packed;
  Context context;
  const attn::ExactOperator<float, attn::SoftmaxKernel> exact({}, packed.part(0), packed.part(1), {}, context);
  const attn::ApproximatorOperator<attn::Nystrom<float>> approximate(attn::Nystrom<float>(attn::SegmentMeans{6}),
                                                                     packed.part(0), packed.part(1));
  const attn::Difference difference(exact, approximate);
  const auto error = [&](const auto& op, MatrixRef<float> x, MatrixRef<float> y) {
    const std::string forward = error_of([&] { op.apply(x, y, context); }),
                      transposed = error_of([&] { op.apply_transpose(x, y, context); });
    return std::pair(forward, transposed);
  };
  const MatrixRef<float> x = packed.part(2), shifted(x.data() + 3, kLength, kWidth, x.outerStride());
  EXPECT_EQ(error(exact, x, shifted),
            std::pair(std::string("exact operator: y overlaps x"), std::string("exact operator: y overlaps x")));
  EXPECT_EQ(error(approximate, x, shifted),
            std::pair(std::string("nystrom: out overlaps v"), std::string("nystrom: dv overlaps dout")));
  EXPECT_EQ(error(difference, x, x), error(exact, x, x));
  EXPECT_EQ(error(difference, x, packed.part(1)).first, "exact operator: y overlaps k");
  EXPECT_EQ(error(difference, x, packed.part(3)), std::pair(std::string("no error"), std::string("no error")));

  std::vector<float> side(kLength * kWidth);
  std::memset(side.data(), 1, side.size() * sizeof(float));
  const std::span<const std::uint8_t> keep(reinterpret_cast<const std::uint8_t*>(side.data() + 40), kLength);
  const attn::ExactOperator<float, attn::SoftmaxKernel> masked({}, packed.part(0), packed.part(1), {.keep_query = keep},
                                                               context);
  EXPECT_EQ(error(masked, x, {side.data(), kLength, kWidth, kWidth}),
            std::pair(std::string("exact operator: y overlaps keep_query"),
                      std::string("exact operator: y overlaps keep_query")));
}

TEST(OverlapOfViews, OfInputsIsAllowedAndSoIsAnyStrideOfTheirs) {
  Packed packed;
  Context context;
  const attn::SoftmaxAttention<float> method;
  const MatrixRef<float> q = packed.part(0);
  const test::ConstMatrixRef<float> backwards(q.data() + (kLength - 1) * q.outerStride(), kLength, kWidth,
                                              -q.outerStride());
  const test::ConstMatrixRef<float> windows(q.data(), kLength, kWidth, 3), one_row(q.data(), kLength, kWidth, 0);
  for (const auto& x : {backwards, windows, one_row}) {
    const Matrix<float> copy = x;
    Matrix<float> out(kLength, kWidth), expected(kLength, kWidth);
    method.forward({x, x, x}, out, context);
    method.forward({copy, copy, copy}, expected, context);
    EXPECT_TRUE(test::bitwise_equal(out, expected));
  }
}

TEST(OverlapOfViews, IsRefusedByTheConvolution) {
  Packed packed;
  const std::vector<float> filter(3, 1.0F);
  std::vector<float> dfilter(3);
  Context context;
  EXPECT_EQ(error_of([&] { attn::depthwise_conv<float>(packed.part(2), filter, packed.part(2), context); }),
            "depthwise_conv: out overlaps v");
  EXPECT_EQ(error_of([&] {
              attn::depthwise_conv_backward<float>(packed.part(2), filter, packed.part(3), packed.part(3), dfilter,
                                                   context);
            }),
            "depthwise_conv_backward: dv overlaps dout");
  const auto error = [&](std::span<const float> taps, std::span<float> dtaps, const attn::Mask& mask) {
    return error_of([&] {
      attn::depthwise_conv_backward<float>(packed.part(2), taps, packed.part(3), packed.part(4), dtaps, context, mask);
    });
  };
  const auto part = [&](Index i) { return std::span<float>(packed.part(i).data(), 3); };
  const auto keep = [&](Index i) {
    return std::span<const std::uint8_t>(reinterpret_cast<const std::uint8_t*>(part(i).data()), kLength);
  };
  EXPECT_EQ(error(part(4), dfilter, {}), "depthwise_conv_backward: dv overlaps filter");
  EXPECT_EQ(error(filter, part(2), {}), "depthwise_conv_backward: dfilter overlaps v");
  EXPECT_EQ(error(filter, part(3), {}), "depthwise_conv_backward: dfilter overlaps dout");
  EXPECT_EQ(error(filter, part(4), {}), "depthwise_conv_backward: dfilter overlaps dv");
  EXPECT_EQ(error(dfilter, dfilter, {}), "depthwise_conv_backward: dfilter overlaps filter");
  EXPECT_EQ(error(filter, dfilter, {.keep_query = keep(4)}), "depthwise_conv_backward: dv overlaps keep_query");
  EXPECT_EQ(error(filter, dfilter, {}), "no error");
  EXPECT_EQ(error_of([&] { attn::depthwise_conv<float>(packed.part(2), part(3), packed.part(3), context); }),
            "depthwise_conv: out overlaps filter");
  EXPECT_EQ(error_of([&] {
              attn::depthwise_conv<float>(packed.part(2), filter, {packed.buffer.data(), kLength, kWidth, 3}, context);
            }),
            "depthwise_conv: out overlaps itself: its rows of 32 bytes are 12 bytes apart");
}

}  // namespace
