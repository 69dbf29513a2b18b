#include "world.hpp"

#include <attn/exact.hpp>

#include <new>
#include <tuple>

namespace {

using namespace world;
using attn::GaussianAttention;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxAttention;
using test::Family;

/// Tokens, masks and biases.
template <class T>
struct Problem {
  test::Tokens<T> x;
  std::vector<std::uint8_t> keep_key, keep_query;
  std::vector<T> bias;

  explicit Problem(test::Shape shape)
      : x(test::make_tokens<T>(Family::unit, shape, 3)),
        keep_key(test::random_keep(shape.n_k, 0.7, 4)),
        keep_query(test::random_keep(shape.n_q, 0.8, 5)),
        bias(test::random_key_bias<T>(shape.n_k, 0.1, 6)) {}

  Inputs<T> inputs(Causal causal, bool masked, bool biased) const {
    Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
    if (masked) in.mask = {causal, keep_key, keep_query};
    if (biased) in.key_bias = bias;
    return in;
  }
};

using Case = std::tuple<Causal, bool, Cut, Cut>;

class DistributedExact : public ::testing::TestWithParam<Case> {
 protected:
  template <class Method>
  static void check(const Method& method, test::Shape shape) {
    using T = typename Method::Scalar;
    const auto [causal, masked, queries, keys] = GetParam();
    const Problem<T> problem(shape);
    expect_same(method, problem.inputs(causal, masked, masked), queries, keys, kTolerance<T>);
  }
};

TEST_P(DistributedExact, EqualsOneProcess) {
  check(SoftmaxAttention<float>{}, {90, 160, 16, 9});
  check(SoftmaxAttention<double>{}, {160, 90, 8, 5});
  check(GaussianAttention<float>{}, {120, 120, 16, 9});
  check(GaussianAttention<float>{GaussianKernel{.rows = Rows::normalized}}, {120, 130, 16, 9});
  check(SoftmaxAttention<Eigen::half>{}, {60, 50, 8, 8});
}

TEST_P(DistributedExact, Gradients) {
  const auto [causal, masked, queries, keys] = GetParam();
  const Problem<double> problem({70, 90, 8, 5});
  const Inputs<double> in = problem.inputs(causal, masked, masked);
  expect_same_gradients(SoftmaxAttention<double>{}, in, queries, keys, 1e-11);
  expect_same_gradients(GaussianAttention<double>{}, in, queries, keys, 1e-11);
  expect_same_gradients(GaussianAttention<double>{GaussianKernel{.rows = Rows::normalized}}, in, queries, keys, 1e-11);
}

INSTANTIATE_TEST_SUITE_P(, DistributedExact,
                         ::testing::Combine(::testing::Values(Causal::none, Causal::upper_left, Causal::lower_right),
                                            ::testing::Bool(), ::testing::Values(Cut::even, Cut::uneven),
                                            ::testing::Values(Cut::even, Cut::uneven, Cut::last)));

TEST(DistributedSoftmax, MoreQueriesThanAtATime) {
  const Problem<float> problem({2500, 2500, 8, 4});
  for (const Causal causal : {Causal::none, Causal::upper_left}) {
    expect_same(SoftmaxAttention<float>{}, problem.inputs(causal, false, false), Cut::causal, Cut::causal, 5e-6);
  }
  expect_same_gradients(SoftmaxAttention<float>{}, problem.inputs(Causal::upper_left, true, true), Cut::causal,
                        Cut::even, 2e-5);
}

TEST(DistributedSoftmax, NarrowGradients) {
  const Problem<Eigen::bfloat16> problem({90, 70, 8, 8});
  expect_same_gradients(SoftmaxAttention<Eigen::bfloat16>{}, problem.inputs(Causal::none, true, false), Cut::even,
                        Cut::even, 1e-2);
}

/// Tokens far from the origin, where the log-sums of rows are large.
TEST(DistributedSoftmax, FarTokens) {
  const test::Shape shape{80, 90, 8, 5};
  Problem<float> problem(shape);
  problem.x = test::scaled(test::make_tokens<float>(Family::clusters, shape, 9), 6);
  const Inputs<float> in = problem.inputs(Causal::none, false, true);
  expect_same_gradients(GaussianAttention<float>{GaussianKernel{.rows = Rows::normalized}}, in, Cut::even, Cut::even,
                        1e-4);
  expect_same_gradients(SoftmaxAttention<float>{}, in, Cut::even, Cut::even, 1e-4);
}

/// What is masked, or in a query's future, may be NaN.
TEST(DistributedSoftmax, WhatNoQuerySeesIsNotRead) {
  Problem<float> problem({60, 60, 8, 4});
  Matrix<float> clean(60, 4), out(60, 4);
  attn::Context context;
  const Inputs<float> in = problem.inputs(Causal::upper_left, true, false);
  SoftmaxAttention<float>{}.forward(in, clean, context);
  const Share share = cut(60, Cut::even, rank());
  for (Index j = 0; j < 60; ++j) {
    if (problem.keep_key[static_cast<std::size_t>(j)] != 0 && j < 50) continue;
    problem.x.k.row(j).setConstant(test::kNaN<float>);
    problem.x.v.row(j).setConstant(test::kNaN<float>);
  }
  Matrix<float> own(share.count, 4);
  attn::distributed_forward(SoftmaxAttention<float>{}, share_of(in, share, share), own, kAll, context);
  for (Index i = 0; i < share.count && share.first + i < 50; ++i) {
    EXPECT_LE((own.row(i) - clean.row(share.first + i)).cwiseAbs().maxCoeff(), 5e-6f) << "row " << share.first + i;
  }
}

/// A mask or a bias that one rank alone has.
TEST(DistributedSoftmax, MasksOfSomeRanks) {
  Problem<float> problem({64, 64, 8, 4});
  const Share share = cut(64, Cut::even, rank()), first = cut(64, Cut::even, 0);
  for (auto j = static_cast<std::size_t>(first.count); j < 64; ++j) {
    problem.keep_key[j] = problem.keep_query[j] = 1;
    problem.bias[j] = 0;
  }
  const Inputs<float> in = problem.inputs(Causal::lower_right, true, true);
  const Inputs<float> full = share_of(in, share, share), bare{full.q, full.k, full.v, {.causal = Causal::lower_right}};
  const Inputs<float>& own = rank() == 0 ? full : bare;
  Matrix<float> whole(64, 4), out(share.count, 4);
  attn::Context context;
  SoftmaxAttention<float>{}.forward(in, whole, context);
  attn::distributed_forward(SoftmaxAttention<float>{}, own, out, kAll, context);
  expect_share(out, whole, share, 5e-6, "out");
}

/// Errors of one rank, the last, which all ranks throw.
class DistributedErrors : public ::testing::Test {
 protected:
  bool is_last() const { return rank() + 1 == count(); }
  std::string last() const { return "rank " + std::to_string(count() - 1) + ": "; }

  Problem<float> problem_{{40, 40, 8, 4}};
  Share share_ = cut(40, Cut::even, rank());
  Inputs<float> own_ = share_of(problem_.inputs(Causal::none, false, false), share_, share_);
  Matrix<float> out_ = Matrix<float>(share_.count, 4);
  attn::Context context_;
  SoftmaxAttention<float> softmax_;
};

TEST_F(DistributedErrors, Shapes) {
  Matrix<float> wrong(share_.count + 1, 4);
  const std::string rows = std::to_string(share_.count);
  const std::string error =
      error_of([&] { attn::distributed_forward(softmax_, own_, is_last() ? wrong : out_, kAll, context_); });
  const Share of_last = cut(40, Cut::even, count() - 1);
  EXPECT_EQ(error, last() + "softmax: out is " + std::to_string(of_last.count + 1) + " x 4, should be " +
                       std::to_string(of_last.count) + " x 4");
}

TEST_F(DistributedErrors, SharesThatDoNotFitTogether) {
  if (count() == 1) GTEST_SKIP() << "needs two ranks";
  const auto forward = [&](const auto& method, const Inputs<float>& in, Matrix<float>& out) {
    return error_of([&] { attn::distributed_forward(method, in, out, kAll, context_); });
  };
  const Inputs<float> fewer{own_.q.leftCols(7), own_.k.leftCols(7), own_.v};
  EXPECT_EQ(forward(softmax_, rank() == 1 ? fewer : own_, out_), "softmax: k has 7 columns on rank 1, 8 on rank 0");
  const SoftmaxAttention<float> scaled{attn::SoftmaxKernel{.scale = rank() == 1 ? 0.5 : 0.4}};
  EXPECT_EQ(forward(scaled, own_, out_), "softmax: rank 1 has another method, or other options of it, than rank 0");
  Inputs<float> causal = own_;
  if (rank() == 1) causal.mask.causal = Causal::upper_left;
  EXPECT_EQ(forward(softmax_, causal, out_), "softmax: rank 1 has another causal mask than rank 0");
  const Inputs<float> narrow{own_.q, own_.k, own_.v.leftCols(3)};
  Matrix<float> narrow_out(share_.count, 3);
  EXPECT_EQ(rank() == 1 ? forward(softmax_, narrow, narrow_out) : forward(softmax_, own_, out_),
            "softmax: v has 3 columns on rank 1, 4 on rank 0");
}

TEST_F(DistributedErrors, NothingAtAll) {
  const Inputs<float> empty = share_of(problem_.inputs(Causal::none, false, false), {0, 0}, {0, 0});
  Matrix<float> out(0, 4);
  EXPECT_EQ(error_of([&] { attn::distributed_forward(softmax_, empty, out, kAll, context_); }),
            "softmax: q is empty on every rank");
}

TEST_F(DistributedErrors, NoMemory) {
  std::string error;
  if (is_last()) {
    const FailingMemory failing;
    error = error_of([&] { attn::distributed_forward(softmax_, own_, out_, kAll, context_); });
  } else {
    error = error_of([&] { attn::distributed_forward(softmax_, own_, out_, kAll, context_); });
  }
  EXPECT_EQ(error, "bad_alloc");
  attn::distributed_forward(softmax_, own_, out_, kAll, context_);
}

/// Throws once it has run so many parallel parts.
struct FailingExecutor {
  int left = 0;

  int workers() const { return 2; }
  void run(Index n, const attn::TaskRef& task) {
    if (left-- == 0) throw std::bad_alloc();
    for (Index i = 0; i < n; ++i) task(i, 0);
  }
};

TEST_F(DistributedErrors, AfterTheFirstShares) {
  const Problem<float> problem({3000, 3000, 8, 4});
  const Share share = cut(3000, Cut::even, rank());
  const Inputs<float> own = share_of(problem.inputs(Causal::none, false, false), share, share);
  Matrix<float> out(share.count, 4), dq(share.count, 8), dk(share.count, 8), dv(share.count, 4);
  attn::DistributedSaved<SoftmaxAttention<float>> saved;
  attn::distributed_forward(softmax_, own, out, kAll, context_, saved);
  for (const int parts : {0, 1, 2}) {
    attn::Context context{FailingExecutor{is_last() ? parts : 1 << 30}};
    EXPECT_EQ(error_of([&] { attn::distributed_forward(softmax_, own, out, kAll, context); }), "bad_alloc");
    attn::Context another{FailingExecutor{is_last() ? parts : 1 << 30}};
    EXPECT_EQ(error_of([&] {
                attn::distributed_backward(softmax_, own, out, out, saved, {dq, dk, dv}, kAll, another);
              }),
              "bad_alloc");
  }
}

TEST_F(DistributedErrors, SavedOfOtherInputs) {
  attn::DistributedSaved<SoftmaxAttention<float>> none;
  Matrix<float> dq(share_.count, 8), dk(share_.count, 8), dv(share_.count, 4);
  EXPECT_EQ(error_of([&] {
              attn::distributed_backward(softmax_, own_, out_, out_, none, {dq, dk, dv}, kAll, context_);
            }),
            "rank 0: softmax: saved holds 0 rows of q, should hold " + std::to_string(cut(40, Cut::even, 0).count) +
                ": it is not of a forward pass of these inputs");
}

/// Bytes of messages are counted in whole lines of 64.
std::size_t lines(Index elements, std::size_t size) {
  return (static_cast<std::size_t>(elements) * size + 63) / 64 * 64;
}

/// What is not shares: two agreements, and the facts of all shares.
constexpr std::size_t kFew = 256;

TEST(DistributedBytes, ExactSendsEveryShareButTheNextRanksOwn) {
  const Problem<float> problem({512, 512, 16, 8});
  Matrix<float> out(cut(512, Cut::even, rank()).count, 8);
  attn::Context context;
  const auto sent = [&](Causal causal) {
    const Share share = cut(512, Cut::even, rank());
    reset_bytes();
    attn::distributed_forward(SoftmaxAttention<float>{}, share_of(problem.inputs(causal, false, false), share, share),
                              out, kAll, context);
    return bytes_sent();
  };
  std::size_t all = 0, earlier = 0;
  for (int owner = 0; owner < count(); ++owner) {
    const Index n = cut(512, Cut::even, owner).count;
    const std::size_t bytes = lines(n * 16, 4) + lines(n * 8, 4);
    if (owner != (rank() + 1) % count()) all += bytes;
    if (owner <= rank() && rank() + 1 < count()) earlier += bytes;
  }
  EXPECT_NEAR(static_cast<double>(sent(Causal::none)), static_cast<double>(all), kFew);
  EXPECT_NEAR(static_cast<double>(sent(Causal::upper_left)), static_cast<double>(earlier), kFew);
}

TEST(Shares, CoverAllRows) {
  for (const int ranks : {1, 2, 3, 7}) {
    for (const Index n : {0, 1, 5, 1000}) {
      Index even = 0, causal = 0;
      for (int r = 0; r < ranks; ++r) {
        EXPECT_EQ(attn::even_share(n, ranks, r).first, even);
        EXPECT_EQ(attn::causal_share(n, ranks, r).first, causal);
        even += attn::even_share(n, ranks, r).count;
        causal += attn::causal_share(n, ranks, r).count;
      }
      EXPECT_EQ(even, n);
      EXPECT_EQ(causal, n);
    }
  }
}

TEST(Shares, CausalOnesHaveAsManyPairs) {
  constexpr Index n = 10000;
  for (int r = 0; r < 8; ++r) {
    const Share share = attn::causal_share(n, 8, r);
    const double end = static_cast<double>(share.first + share.count), begin = static_cast<double>(share.first);
    EXPECT_NEAR((end * end - begin * begin) / (static_cast<double>(n) * n), 1.0 / 8, 1e-3);
  }
}

}  // namespace
