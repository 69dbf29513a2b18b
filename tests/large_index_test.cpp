/// Rows, heads and numbers of keys beyond 2^31, in memory that is reserved but hardly touched.
#include <attn/multi_head.hpp>
#include <attn/any_approximator.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <sys/mman.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {

using test::Context;
using test::Index;
using test::Inputs;
using test::Matrix;
using test::MatrixRef;

/// So many floats of zeros, of which only those that are written to take memory; null where the system gives none.
class SparseMemory {
 public:
  explicit SparseMemory(Index count)
      : bytes_(static_cast<std::size_t>(count) * sizeof(float)),
        data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  ~SparseMemory() {
    if (data_ != MAP_FAILED) munmap(data_, bytes_);
  }

  float* data() const { return data_ == MAP_FAILED ? nullptr : static_cast<float*>(data_); }

 private:
  std::size_t bytes_;
  void* data_;
};

constexpr Index kTooLargeForInt = Index{1} << 31;
constexpr Index kRows = 12, kWidth = 8, kStride = kTooLargeForInt / 4 + 8;  // the last rows begin beyond 2^32

class LargeIndex : public test::MethodTest {};
INSTANTIATE_TEST_SUITE_P(Every, LargeIndex, ::testing::ValuesIn(test::method_names()), test::test_name);

TEST_P(LargeIndex, RowsFarApart) {
  const SparseMemory memory(kRows * kStride);
  if (memory.data() == nullptr) GTEST_SKIP() << "no address space";
  const auto view = [&](Index i) { return MatrixRef<float>(memory.data() + i * kWidth, kRows, kWidth, kStride); };
  const auto x = test::make_tokens<float>(test::Family::init, {kRows, kRows, kWidth, kWidth}, 811);
  view(0) = x.q;
  view(1) = x.k;
  view(2) = x.v;
  const Matrix<float> dout = test::Random(812).normal(kRows, kWidth).cast<float>();
  Matrix<float> out = dout, dq = dout, dk = dout, dv = dout;
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v}, far{.q = view(0), .k = view(1), .v = view(2)};
  const auto method = make<float>(4);
  attn::AnyApproximator<float>::Saved saved;
  Context context;
  method.forward(in, out, context, saved);
  method.backward(in, out, dout, saved, {dq, dk, dv}, context);
  method.forward(far, view(3), context, saved);
  view(4) = dout;
  method.backward(far, view(3), view(4), saved, {view(5), view(6), view(7)}, context);
  EXPECT_TRUE(test::bitwise_equal<float>(view(3), out));
  EXPECT_TRUE(test::bitwise_equal<float>(view(5), dq));
  EXPECT_TRUE(test::bitwise_equal<float>(view(6), dk));
  EXPECT_TRUE(test::bitwise_equal<float>(view(7), dv));
}

TEST(LargeIndexOfHeads, HeadsFarApart) {
  const SparseMemory memory(2 * kTooLargeForInt);
  if (memory.data() == nullptr) GTEST_SKIP() << "no address space";
  const auto heads = [&](Index i) {
    return attn::HeadsView<float>{memory.data() + i * kRows * kWidth, 1, 2, kRows, kWidth, 0, kTooLargeForInt, kWidth};
  };
  for (const Index h : {0, 1}) {
    const auto x = test::make_tokens<float>(test::Family::init, {kRows, kRows, kWidth, kWidth},
                                            813 + static_cast<std::uint64_t>(h));
    heads(0)(0, h) = x.q;
    heads(1)(0, h) = x.k;
    heads(2)(0, h) = x.v;
  }
  const auto method = attn::make_approximator<float>("softmax");
  Context context;
  attn::multi_head(method, heads(0), heads(1), heads(2), heads(3), {}, context);
  for (const Index h : {0, 1}) {
    Matrix<float> expected(kRows, kWidth);
    method.forward({.q = heads(0)(0, h), .k = heads(1)(0, h), .v = heads(2)(0, h)}, expected, context);
    EXPECT_TRUE(test::bitwise_equal<float>(heads(3)(0, h), expected)) << h;
  }
}

/// One row in memory that stands for every key, of which the causal mask leaves the first few.
TEST(LargeIndexOfKeys, MoreThanAnIntCounts) {
  const Matrix<float> q = Matrix<float>::Constant(3, 1, 0.5F), k = Matrix<float>::Ones(1, 1),
                      v = Matrix<float>::Constant(1, 1, 7.0F);
  const attn::ConstMatrixRef<float> keys(k.data(), kTooLargeForInt + 7, 1, 0),
      values(v.data(), kTooLargeForInt + 7, 1, 0);
  const Inputs<float> in{.q = q, .k = keys, .v = values, .mask = {.causal = attn::Causal::upper_left}};
  Matrix<float> out(3, 1);
  Context context;
  attn::make_approximator<float>("softmax").forward(in, out, context);
  EXPECT_TRUE(test::bitwise_equal<float>(out, Matrix<float>::Constant(3, 1, 7.0F)));
  attn::make_approximator<float>("gaussian").forward(in, out, context);
  const float weight = std::exp(-0.125F);
  for (const Index i : {0, 1, 2}) EXPECT_NEAR(out(i, 0), 7 * weight * static_cast<float>(i + 1), 1e-5F);
}

}  // namespace
