/// Methods shared by threads, and the examples' executor: what a thread sanitizer should look at.
#include <attn/multi_head.hpp>
#include <attn/any_approximator.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"
#include "thread_executor.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using attn::AnyApproximator;
using test::Context;
using test::Index;
using test::Inputs;
using test::Matrix;

/// Body is called as body(i) on so many threads, i below their number.
template <class Body>
void on_threads(int count, const Body& body) {
  std::vector<std::jthread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
}

TEST(ThreadExecutor, RunsEveryItemOnceWithWorkersOfTheirOwn) {
  Context context{ThreadExecutor(3)};
  ASSERT_EQ(context.workers(), 3);
  for (const Index n : {0, 1, 2, 3, 17, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
    std::vector<std::atomic<int>> inside(3);
    std::atomic<bool> shared = false;
    context.for_each(n, [&](Index item, int worker) {
      ++runs[static_cast<std::size_t>(item)];
      if (inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0) shared = true;
      inside[static_cast<std::size_t>(worker)].fetch_sub(1);
    });
    for (const auto& r : runs) EXPECT_EQ(r, 1);
    EXPECT_FALSE(shared);
  }
}

TEST(ThreadExecutor, RunsCallsWithinCallsOnTheirThread) {
  const ThreadExecutor threads(3);
  Context context{threads};
  std::atomic<int> runs = 0;
  context.for_each(10, [&](Index, int) {
    Context inner{threads};
    inner.for_each(10, [&](Index, int worker) { runs += worker == 0 ? 1 : 0; });
  });
  EXPECT_EQ(runs, 100);
}

TEST(ThreadExecutor, BringsExceptionsToTheCaller) {
  Context context{ThreadExecutor(3)};
  for (int i = 0; i < 20; ++i) {
    EXPECT_THROW(context.for_each_call(50,
                                       [](Index item, Context&) {
                                         if (item == 30) throw std::runtime_error("30");
                                       }),
                 std::runtime_error);
  }
}

/// What a training step writes.
struct Results {
  Matrix<float> out, dq, dk, dv;

  bool operator==(const Results& other) const {
    return test::bitwise_equal(out, other.out) && test::bitwise_equal(dq, other.dq) &&
           test::bitwise_equal(dk, other.dk) && test::bitwise_equal(dv, other.dv);
  }
};

Results train(const AnyApproximator<float>& method, const Inputs<float>& in, Context& context) {
  Results r{Matrix<float>(in.q.rows(), in.v.cols()), Matrix<float>(in.q.rows(), in.q.cols()),
            Matrix<float>(in.k.rows(), in.k.cols()), Matrix<float>(in.v.rows(), in.v.cols())};
  const Matrix<float> dout = Matrix<float>::Ones(in.q.rows(), in.v.cols());
  AnyApproximator<float>::Saved saved;
  method.forward(in, r.out, context, saved);
  method.backward(in, r.out, dout, saved, {r.dq, r.dk, r.dv}, context);
  return r;
}

class Concurrency : public test::MethodTest {};
INSTANTIATE_TEST_SUITE_P(Every, Concurrency, ::testing::ValuesIn(test::method_names()), test::test_name);

TEST_P(Concurrency, ThreadExecutorsGiveTheBitsOfOneThread) {
  const ThreadExecutor threads(3);
  Context serial, context{threads};
  const auto method = make<float>(24);
  for (const Index n : {1, 60, 700}) {
    const auto x = test::make_tokens<float>(test::Family::init, {n, n, 12, 9}, 821);
    const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
    EXPECT_TRUE(train(method, in, context) == train(method, in, serial)) << n;
  }
}

/// One method, 8 threads, 150 calls each of different lengths, half of them on contexts that share one executor's
/// threads.
TEST_P(Concurrency, AThousandCallsShareAMethod) {
  constexpr int kThreads = 8, kCalls = 150, kInputs = 5;
  const auto method = make<float>(6);
  std::vector<test::Tokens<float>> tokens;
  std::vector<Results> expected;
  const auto inputs = [&](int i) -> Inputs<float> {
    const auto& x = tokens[static_cast<std::size_t>(i)];
    return {.q = x.q, .k = x.k, .v = x.v};
  };
  Context serial;
  for (int i = 0; i < kInputs; ++i) {
    const Index n = 1 + 13 * i;
    tokens.push_back(test::make_tokens<float>(test::Family::init, {n, n, 8, 5}, 822 + static_cast<std::uint64_t>(i)));
    expected.push_back(train(method, inputs(i), serial));
  }
  const ThreadExecutor shared(2);
  std::atomic<int> wrong = 0;
  on_threads(kThreads, [&](int thread) {
    Context context = thread % 2 == 0 ? Context{} : Context{shared};
    for (int call = 0; call < kCalls; ++call) {
      const int i = (call + thread) % kInputs;
      if (!(train(method, inputs(i), context) == expected[static_cast<std::size_t>(i)])) ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST(ConcurrencyOfHeads, SharesHeadsOverThreads) {
  constexpr Index kHeads = 6, kTokens = 200, kWidth = 16;
  const Matrix<float> data = test::Random(823).normal(3 * kTokens, kHeads * kWidth).cast<float>();
  const auto part = [&](Index i) {
    return attn::token_major(data.data() + i * kTokens * kHeads * kWidth, 1, kTokens, kHeads, kWidth);
  };
  const auto method = attn::make_approximator<float>("nystrom", {.num_landmarks = 12});
  const auto run = [&](Context& context) {
    Matrix<float> out(kTokens, kHeads * kWidth);
    attn::multi_head(method, part(0), part(1), part(2), attn::token_major(out.data(), 1, kTokens, kHeads, kWidth), {},
                     context);
    return out;
  };
  Context serial, context{ThreadExecutor(3)};
  EXPECT_TRUE(test::bitwise_equal(run(context), run(serial)));
}

}  // namespace
