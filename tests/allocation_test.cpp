/// A second call, or training step, with the same shapes allocates nothing: neither by operator new nor by malloc. And
/// where there is no memory, std::bad_alloc comes out and everything stays usable. This program replaces both.
#include <attn/attn.hpp>
#include <attn/multipole.hpp>

#include "common/inputs.hpp"
#include "common/methods.hpp"
#include "thread_executor.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ATTN_TEST_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define ATTN_TEST_SANITIZED
#endif
#endif

#if defined(__GLIBC__) && !defined(ATTN_TEST_SANITIZED)
#define ATTN_TEST_COUNTS_MALLOC
#endif

namespace {

std::atomic<bool> counting = false;
std::atomic<long> allocations = 0;
std::atomic<long> until_failure = -1;  // allocations that still succeed before one fails; negative: none fails
std::atomic<long> living = 0;          // what operator new gave and has not come back

void count() noexcept {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}

/// Whether this allocation, by any thread, is the one to fail.
bool fails() noexcept {
  return until_failure.load(std::memory_order_relaxed) >= 0 &&
         until_failure.fetch_sub(1, std::memory_order_relaxed) == 0;
}

/// Allocations, by any thread, while body runs.
template <class Body>
long allocations_of(const Body& body) {
  allocations = 0;
  counting = true;
  body();
  counting = false;
  return allocations;
}

}  // namespace

#ifdef ATTN_TEST_COUNTS_MALLOC
// glibc's own entry points stand behind the replaced ones.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t size) noexcept {
  count();
  return fails() ? nullptr : __libc_malloc(size);
}
void* calloc(std::size_t n, std::size_t size) noexcept {
  count();
  return fails() ? nullptr : __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t size) noexcept {
  count();
  return fails() ? nullptr : __libc_realloc(p, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  count();
  return fails() ? nullptr : __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  count();
  return fails() ? nullptr : __libc_memalign(alignment, size);
}
int posix_memalign(void** p, std::size_t alignment, std::size_t size) noexcept {
  count();
  *p = fails() ? nullptr : __libc_memalign(alignment, size);
  return *p == nullptr ? ENOMEM : 0;
}
}
#endif

namespace {

void* given(void* p) {
  if (p == nullptr) throw std::bad_alloc();
  living.fetch_add(1, std::memory_order_relaxed);
  return p;
}

void give_back(void* p) noexcept {
  if (p != nullptr) living.fetch_sub(1, std::memory_order_relaxed);
  std::free(p);
}

void* allocate(std::size_t size) {
  count();
  return given(fails() ? nullptr : std::malloc(size == 0 ? 1 : size));
}

void* allocate(std::size_t size, std::align_val_t alignment) {
  count();
  const auto a = static_cast<std::size_t>(alignment);
  return given(fails() ? nullptr : std::aligned_alloc(a, (size + a) / a * a));
}

}  // namespace

void* operator new(std::size_t size) {
  return allocate(size);
}
void* operator new[](std::size_t size) {
  return allocate(size);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, alignment);
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, alignment);
}
void operator delete(void* p) noexcept {
  give_back(p);
}
void operator delete[](void* p) noexcept {
  give_back(p);
}
void operator delete(void* p, std::size_t) noexcept {
  give_back(p);
}
void operator delete[](void* p, std::size_t) noexcept {
  give_back(p);
}
void operator delete(void* p, std::align_val_t) noexcept {
  give_back(p);
}
void operator delete[](void* p, std::align_val_t) noexcept {
  give_back(p);
}
void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  give_back(p);
}
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept {
  give_back(p);
}

namespace {

using attn::Causal;
using attn::Context;
using attn::GaussianKernel;
using attn::Index;
using attn::Inputs;
using attn::Matrix;
using attn::Rows;
using attn::SoftmaxKernel;

/// Keeps a pointer from being optimised away.
void* volatile sink;

TEST(AllocationCounter, CountsEveryKindOfNew) {
  EXPECT_EQ(allocations_of([] {}), 0);
  EXPECT_GE(allocations_of([] {
              sink = new int;
              delete static_cast<int*>(sink);
            }),
            1);
  EXPECT_GE(allocations_of([] {
              sink = new double[100];
              delete[] static_cast<double*>(sink);
            }),
            1);
  EXPECT_GE(allocations_of([] {
              sink = ::operator new[](640, std::align_val_t{64});
              ::operator delete[](sink, std::align_val_t{64});
            }),
            1);
}

#ifdef ATTN_TEST_COUNTS_MALLOC
TEST(AllocationCounter, CountsMallocAndWhatEigenAllocates) {
  EXPECT_GE(allocations_of([] {
              sink = std::malloc(100);
              sink = std::realloc(sink, 10'000);
              std::free(sink);
            }),
            2);
  EXPECT_GE(allocations_of([] {
              sink = std::aligned_alloc(64, 640);
              std::free(sink);
            }),
            1);
  EXPECT_GE(allocations_of([] {
              Eigen::MatrixXf m(100, 100);
              sink = m.data();
            }),
            1);
}
#endif

/// Gives all items of a run to one of three workers, of the next run to the next.
struct Turns {
  int next = 0;

  int workers() const { return 3; }
  template <class Task>
  void run(Index n, const Task& task) {
    for (Index item = 0; item < n; ++item) task(item, next);
    next = (next + 1) % 3;
  }
};

/// Calls of every kind, each with shapes of its own; run(context) must not allocate beyond what context keeps.
template <class T>
class Calls {
 public:
  static constexpr Index kLongest = 3000, kWidth = 32;

  void run(Context& context) {
    for (const auto& [n_q, n_k] : {std::pair<Index, Index>{1, 1}, {3, kLongest}, {700, 900}, {900, 64}, {800, 800}}) {
      for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
        run_exact({tokens_.q.topRows(n_q), tokens_.k.topRows(n_k), tokens_.v.topRows(n_k), masks(n_q, n_k, causal),
                   bias(n_k)},
                  context);
      }
      run_skyformer({tokens_.q.topRows(n_q), tokens_.k.topRows(n_k), tokens_.v.topRows(n_k),
                     masks(n_q, n_k, Causal::none), bias(n_k)},
                    context);
      run_methods(
          {tokens_.q.topRows(n_q), tokens_.k.topRows(n_k), tokens_.v.topRows(n_k), masks(n_q, n_k, Causal::none)},
          context);
    }
    run_multi_head(2, 3, 4, context);
    run_multi_head(2, 3, 90, context);
    run_multi_head(1, 3, 700, context);
    run_shared_keys(context);
    next_saved_ = 0;
    for (const auto& [n_q, n_k] : {std::pair<Index, Index>{3, kLongest}, {800, 800}}) {
      const auto q = tokens_.q.topRows(n_q), k = tokens_.k.topRows(n_k), v = tokens_.v.topRows(n_k);
      run_training({q, k, v, masks(n_q, n_k, Causal::none)}, context);
      run_training({q, k, v, masks(n_q, n_k, Causal::lower_right), bias(n_k)}, context);
    }
  }

  /// Heads that differ in what they need.
  void run_multi_head(Index batch, Index heads, Index n, Context& context) {
    const auto view = [&](auto* data) { return attn::token_major(data, batch, n, heads, kWidth); };
    const auto q = view(tokens_.q.data()), k = view(tokens_.k.data()), v = view(tokens_.v.data());
    const auto out = view(out_.data());
    std::vector<attn::Mask>& masks = masks_of_items_;
    masks.assign(static_cast<std::size_t>(batch), {});
    masks.back() = this->masks(n, n, Causal::none);
    attn::multi_head(attn::SoftmaxAttention<T>{}, q, k, v, out, masks, context);
    attn::multi_head(attn::Skyformer<T>(attn::UniformSample{.num_landmarks = 24}), q, k, v, out, masks, context);
  }

  /// Heads that share keys.
  void run_shared_keys(Context& context) {
    const auto view = [](auto* data, Index heads, Index n) { return attn::head_major(data, 1, heads, n, kWidth); };
    attn::multi_head(attn::SoftmaxAttention<T>{}, view(tokens_.q.data(), 6, 2), view(tokens_.k.data(), 2, 900),
                     view(tokens_.v.data(), 2, 900), view(out_.data(), 6, 2), {}, context);
    attn::multi_head(attn::Multipole<T>({.num_clusters = 24, .num_groups = 3, .num_near = 4}),
                     view(tokens_.q.data(), 6, 90), view(tokens_.k.data(), 2, 300), view(tokens_.v.data(), 2, 300),
                     view(out_.data(), 6, 90), {}, context);
  }

 private:
  static std::vector<attn::AnyApproximator<T>> every_method() {
    std::vector<attn::AnyApproximator<T>> made;
    for (const auto& method : attn::methods<T>()) {
      for (const Index m : {1, 24, 300}) made.push_back(method.make(test::of_size(m)));
    }
    for (const auto mode : {attn::ShiftMode::paper, attn::ShiftMode::scalar}) {
      made.push_back(attn::make_approximator<T>("shifted-nystrom", {.num_landmarks = 24, .mode = mode}));
    }
    for (const auto name : {"gaussian", "skyformer"}) {
      made.push_back(attn::find_method<T>(name).make({.num_landmarks = 24, .rows = Rows::normalized}));
    }
    const attn::Clusters clusters{.num_clusters = 24, .num_groups = 9, .num_near = 5};
    made.push_back(attn::AnyApproximator<T>(attn::Multipole<T>(clusters)));
    made.push_back(attn::AnyApproximator<T>(attn::Multipole<T, GaussianKernel>(clusters)));
    using Preconditioned = attn::Skyformer<T, attn::StridedSample, attn::PreconditionedPinv>;
    made.push_back(attn::AnyApproximator<T>(Preconditioned({.num_landmarks = 200})));
    return made;
  }

  attn::Mask masks(Index n_q, Index n_k, Causal causal) const {
    const std::span<const std::uint8_t> keep(keep_);
    return {.causal = causal,
            .keep_key = keep.first(static_cast<std::size_t>(n_k)),
            .keep_query = keep.first(static_cast<std::size_t>(n_q))};
  }
  std::span<const T> bias(Index n_k) const { return std::span<const T>(bias_).first(static_cast<std::size_t>(n_k)); }

  void run_exact(const Inputs<T>& in, Context& context) {
    auto out = out_.topRows(in.q.rows());
    attn::SoftmaxAttention<T>{}.forward(in, out, context);
    attn::GaussianAttention<T>{}.forward(in, out, context);
    attn::GaussianAttention<T>(GaussianKernel{.rows = Rows::normalized}).forward(in, out, context);
    attn::kernel_matmul(SoftmaxKernel{}, in, out, std::span<T>(lse_).first(static_cast<std::size_t>(in.q.rows())),
                        context);
    const auto n = static_cast<std::size_t>(in.q.rows());
    const attn::RowStates<T> states{std::span<T>(maximum_).first(n), std::span<T>(sum_).first(n), out};
    attn::kernel_matmul_partial(SoftmaxKernel{}, in, states, context);
    finish(SoftmaxKernel{}, states, in.q.cols(), out);
  }

  void run_skyformer(const Inputs<T>& in, Context& context) {
    auto out = out_.topRows(in.q.rows());
    for (const Index m : {1, 24, 300}) {
      attn::Skyformer<T>(attn::UniformSample{.num_landmarks = m}).forward(in, out, context);
      attn::Skyformer<T>(attn::UniformSample{.num_landmarks = m}, {}, GaussianKernel{.rows = Rows::normalized})
          .forward(in, out, context);
    }
    const GaussianKernel narrow{.bandwidth = 0.2, .rows = Rows::normalized};  // landmarks far from one another
    attn::Skyformer<T>(attn::UniformSample{.num_landmarks = 24}, {}, narrow).forward(in, out, context);
    const attn::StridedSample strided{.num_landmarks = 200};
    attn::Skyformer<T, attn::StridedSample, attn::PreconditionedPinv>(strided).forward(in, out, context);
  }

  void run_methods(const Inputs<T>& in, Context& context) {
    auto out = out_.topRows(in.q.rows());
    for (const auto& method : methods_) {
      if (method.supports(in)) method.forward(in, out, context);
    }
    attn::depthwise_conv<T>(in.v, filter_, values_.topRows(in.v.rows()), context, {.keep_key = in.mask.keep_key});
  }

  /// Training steps of every method, each with a Saved of its own that lives as long as this.
  void run_training(const Inputs<T>& in, Context& context) {
    const Index n_q = in.q.rows(), n_k = in.k.rows();
    auto out = out_.topRows(n_q);
    for (const auto& method : methods_) {
      constexpr Index kMostCausal = 544;  // keys, beyond which causal multipole attention has no backward pass
      const bool trains = method.name() != "multipole" || in.mask.causal == attn::Causal::none || n_k <= kMostCausal;
      if (!method.supports(in) || !trains) continue;
      if (next_saved_ == saved_.size()) saved_.emplace_back();
      auto& saved = saved_[next_saved_++];
      method.forward(in, out, context, saved);
      method.backward(in, out, dout_.topRows(n_q), saved, {dq_.topRows(n_q), dk_.topRows(n_k), dv_.topRows(n_k)},
                      context);
    }
  }

  std::vector<attn::AnyApproximator<T>> methods_ = every_method();
  std::vector<typename attn::AnyApproximator<T>::Saved> saved_{};
  std::size_t next_saved_ = 0;
  std::vector<T> filter_ = std::vector<T>(33, T(1));
  Matrix<T> values_ = Matrix<T>::Zero(kLongest, kWidth);
  test::Tokens<T> tokens_ = test::make_tokens<T>(test::Family::init, {kLongest, kLongest, kWidth, kWidth});
  std::vector<std::uint8_t> keep_ = test::random_keep(kLongest, 0.9, 81);
  std::vector<T> bias_ = test::random_key_bias<T>(kLongest, 0.1, 82);
  std::vector<T> lse_ = std::vector<T>(kLongest), maximum_ = lse_, sum_ = lse_;
  Matrix<T> out_ = Matrix<T>(kLongest, kWidth), dout_ = Matrix<T>::Ones(kLongest, kWidth);
  Matrix<T> dq_ = out_, dk_ = out_, dv_ = out_;
  std::vector<attn::Mask> masks_of_items_ = std::vector<attn::Mask>(2);
};

template <class T>
class Allocations : public ::testing::Test {};
using Scalars = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Allocations, Scalars);

TYPED_TEST(Allocations, NoneOnASecondCall) {
  Calls<TypeParam> calls;
  Context context;
  EXPECT_GT(allocations_of([&] { calls.run(context); }), 0) << "the first call fills the arena";
  EXPECT_EQ(allocations_of([&] { calls.run(context); }), 0);
}

TEST(AllocationsWithinAnError, NoneOnASecondCall) {
  const auto x = test::make_tokens<float>(test::Family::smooth, {3500, 3500, 32, 32}, 4);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  Matrix<float> out(3500, 32);
  Context context;
  attn::Choice choice;
  const auto run = [&] {
    for (const double max_error : {0.01, 0.1}) {
      attn::Automatic<float> method{.max_error = max_error};
      method.forward(in, out, context, choice);
      method.hint = choice.plan;
      method.forward(in, out, context);
    }
    for (const Causal causal : {Causal::none, Causal::lower_right}) {
      attn::estimate_error(SoftmaxKernel{}, Inputs<float>{x.q, x.k, x.v, {causal}}, out, {}, context);
    }
  };
  EXPECT_GT(allocations_of(run), 0) << "the first call fills the arena";
  EXPECT_FALSE(choice.plan.exact);
  EXPECT_EQ(allocations_of(run), 0);
}

TYPED_TEST(Allocations, NoneWhicheverWorkerTakesAHead) {
  Calls<TypeParam> calls;
  Context context{Turns{}};
  calls.run_multi_head(2, 3, 90, context);
  for (int call = 0; call < 3; ++call) {
    EXPECT_EQ(allocations_of([&] { calls.run_multi_head(2, 3, 90, context); }), 0);
  }
}

#if defined(_OPENMP) && !defined(__clang__)  // Clang's OpenMP runtime allocates by itself; GCC's does not
TYPED_TEST(Allocations, NoneOnASecondCallUnderOpenMP) {
  Calls<TypeParam> calls;
  for (const int threads : {1, 2}) {
    Context context{attn::OpenMP{.threads = threads}};
    calls.run(context);
    EXPECT_EQ(allocations_of([&] { calls.run(context); }), 0) << "threads = " << threads;
  }
}
#endif

/// Calls body(context, saved) with its first allocation failing, its second, and so on until it needs no more, each
/// time followed by a call with enough memory.
template <class Body>
void with_every_allocation_failing(const auto& executor, const Body& body) {
  for (long k = 0;; ++k) {
    const long before = living;
    bool thrown = false, reached = false;
    {
      Context context{executor};
      attn::AnyApproximator<float>::Saved saved;
      until_failure = k;
      try {
        body(context, saved);
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      reached = until_failure.exchange(-1) < 0;
      ASSERT_EQ(thrown, reached) << "allocation " << k;
      body(context, saved);
    }
    ASSERT_EQ(living, before) << "allocation " << k;
    if (!reached) {
      EXPECT_GE(k, 1) << "no allocation was there to fail";
      return;
    }
  }
}

/// Where a block has to be made anew, larger.
TEST(OutOfMemoryForScratch, LeavesItAsItWas) {
  constexpr Index kBlock = Index{1} << 16;
  Context context;
  const auto take_after_a_block = [&](Index n) {
    auto scratch = context.scratch();
    scratch.array<char>(kBlock);
    scratch.array<char>(n);
  };
  take_after_a_block(kBlock);
  const std::size_t bytes = context.scratch_bytes();
  until_failure = 0;
  EXPECT_THROW(take_after_a_block(2 * kBlock), std::bad_alloc);
  until_failure = -1;
  EXPECT_EQ(context.scratch_bytes(), bytes);
  take_after_a_block(2 * kBlock);
  EXPECT_EQ(context.scratch_bytes(), bytes + kBlock);
}

class OutOfMemory : public test::MethodTest {
 protected:
  /// A forward and a backward pass, then heads that workers take whole.
  void train(Context& context, attn::AnyApproximator<float>::Saved& saved) {
    const Inputs<float> in{.q = x_.q, .k = x_.k, .v = x_.v};
    method_.forward(in, out_, context, saved);
    method_.backward(in, out_, dout_, saved, {dq_, dk_, dv_}, context);
    const auto heads = [](auto* data) { return attn::token_major(data, 4, kLength / 4, 2, kWidth / 2); };
    attn::multi_head(method_, heads(x_.q.data()), heads(x_.k.data()), heads(x_.v.data()), heads(heads_out_.data()), {},
                     context);
  }

  void expect_usable_after_failures(const auto& executor) {
    Context fresh;
    attn::AnyApproximator<float>::Saved saved;
    train(fresh, saved);
    const Matrix<float> out = out_, dq = dq_, dk = dk_, dv = dv_, heads_out = heads_out_;
    const std::size_t scratch_bytes = fresh.scratch_bytes();
    with_every_allocation_failing(executor, [&](Context& context, auto& of_training) {
      train(context, of_training);
      const bool same = out == out_ && dq == dq_ && dk == dk_ && dv == dv_ && heads_out == heads_out_;
      if (!same) throw std::runtime_error("other results than before");
      if (context.workers() == 1 && context.scratch_bytes() != scratch_bytes)
        throw std::runtime_error("other scratch memory");
    });
  }

  static constexpr Index kLength = 320, kWidth = 16;
  const attn::AnyApproximator<float> method_ = make<float>(8);
  const test::Tokens<float> x_ = test::make_tokens<float>(test::Family::init, {kLength, kLength, kWidth, kWidth});
  const Matrix<float> dout_ = Matrix<float>::Ones(kLength, kWidth);
  Matrix<float> out_ = dout_, dq_ = dout_, dk_ = dout_, dv_ = dout_, heads_out_ = dout_;
};

INSTANTIATE_TEST_SUITE_P(Every, OutOfMemory, ::testing::ValuesIn(test::method_names()), test::test_name);

TEST_P(OutOfMemory, LeavesEverythingUsableOnOneWorker) {
  expect_usable_after_failures(test::Backwards{});
}

TEST_P(OutOfMemory, LeavesEverythingUsable) {
  expect_usable_after_failures(Turns{});
}

TEST_P(OutOfMemory, LeavesEverythingUsableOnThreads) {
  expect_usable_after_failures(ThreadExecutor(3));
}

}  // namespace
