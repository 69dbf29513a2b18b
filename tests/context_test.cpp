#include <attn/context.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using attn::Context;
using attn::Index;

static_assert(std::is_nothrow_move_constructible_v<Context> && std::is_move_assignable_v<Context>);
static_assert(!std::is_copy_constructible_v<Context> && !std::is_copy_assignable_v<Context>);
static_assert(attn::Executor<test::Threads>);
static_assert(!attn::Executor<int>);

TEST(Context, RunsEveryItemOnceOnEveryExecutor) {
  for (auto& [name, context] : test::contexts()) {
    SCOPED_TRACE(name);
    for (const Index n : {0, 1, 2, 3, 17, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
      std::atomic<bool> worker_out_of_range = false;
      const int workers = context.workers();
      context.for_each(n, [&](Index item, int worker) {
        ++runs[static_cast<std::size_t>(item)];
        if (worker < 0 || worker >= workers) worker_out_of_range = true;
      });
      for (const auto& r : runs) EXPECT_EQ(r, 1);
      EXPECT_FALSE(worker_out_of_range);
    }
  }
}

TEST(Context, WorkersHaveNumbersOfTheirOwn) {
  for (auto& [name, context] : test::contexts()) {
    SCOPED_TRACE(name);
    std::vector<std::atomic<int>> inside(static_cast<std::size_t>(context.workers()));
    std::atomic<bool> shared = false;
    context.for_each(2000, [&](Index, int worker) {
      auto& mine = inside[static_cast<std::size_t>(worker)];
      if (mine.fetch_add(1) != 0) shared = true;
      mine.fetch_sub(1);
    });
    EXPECT_FALSE(shared);
  }
}

TEST(Context, HasAtLeastOneWorker) {
  struct Nobody {
    int workers() const { return 0; }
    void run(Index, const attn::TaskRef&) const {}
  };
  EXPECT_EQ(Context{}.workers(), 1);
  EXPECT_EQ(Context{Nobody{}}.workers(), 1);
  EXPECT_EQ(Context{test::Threads{.count = 3}}.workers(), 3);
}

TEST(Context, KeepsAMoveOnlyExecutor) {
  struct Counting {
    std::unique_ptr<int> runs;
    std::shared_ptr<int> total;
    int workers() const { return 1; }
    void run(Index n, const attn::TaskRef& task) {
      *total = ++*runs;
      for (Index item = 0; item < n; ++item) task(item, 0);
    }
  };
  const auto total = std::make_shared<int>(0);
  Context context{Counting{std::make_unique<int>(0), total}};
  for (int call = 0; call < 2; ++call) context.for_each(3, [](Index, int) {});
  EXPECT_EQ(*total, 2);
}

TEST(Context, MovesItsExecutorAndItsMemory) {
  Context first{test::Threads{.count = 2}};
  const float* before = first.scratch().array<float>(100).data();
  Context second = std::move(first);
  EXPECT_EQ(second.workers(), 2);
  EXPECT_EQ(second.scratch().array<float>(100).data(), before);
  Context third;
  third = std::move(second);
  EXPECT_EQ(third.workers(), 2);
  EXPECT_EQ(third.scratch().array<float>(100).data(), before);
}

TEST(Context, RunsCallsEachWithAContextOfItsWorker) {
  for (auto& [name, context] : test::contexts()) {
    SCOPED_TRACE(name);
    for (const Index n : {0, 1, 2, 3, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
      std::atomic<bool> disturbed = false;
      context.for_each_call(n, [&](Index item, Context& of_worker) {
        ++runs[static_cast<std::size_t>(item)];
        auto scratch = of_worker.scratch();
        const auto mine = scratch.array<Index>(100);
        std::fill(mine.begin(), mine.end(), item);
        if (of_worker.workers() != 1) disturbed = true;
        if (std::any_of(mine.begin(), mine.end(), [&](Index x) { return x != item; })) disturbed = true;
      });
      for (const auto& r : runs) EXPECT_EQ(r, 1);
      EXPECT_FALSE(disturbed);
    }
  }
}

TEST(Context, CallsMayThrow) {
  for (auto& [name, context] : test::contexts()) {
    SCOPED_TRACE(name);
    for (const Index n : {1, 2, 100}) {
      const auto fails = [&](Index item, Context&) {
        if (item == n / 2) throw std::runtime_error(std::to_string(item));
      };
      std::string message;
      try {
        context.for_each_call(n, fails);
      } catch (const std::runtime_error& e) {
        message = e.what();
      }
      EXPECT_EQ(message, std::to_string(n / 2));
      EXPECT_NO_THROW(context.for_each_call(n, [](Index, Context&) {}));
    }
  }
}

/// Says that it has two workers, and runs the items one after another on the calling thread.
struct InOrder {
  static int workers() { return 2; }
  static void run(Index n, const attn::TaskRef& task) {
    for (Index item = 0; item < n; ++item) task(item, static_cast<int>(item % 2));
  }
};

TEST(Context, AfterAnExceptionNoCallBegins) {
  Context context{InOrder{}};
  std::vector<Index> begun;
  std::string message;
  try {
    context.for_each_call(10, [&](Index item, Context&) {
      begun.push_back(item);
      if (item >= 3) throw std::runtime_error(std::to_string(item));
    });
  } catch (const std::runtime_error& e) {
    message = e.what();
  }
  EXPECT_EQ(message, "3");
  EXPECT_EQ(begun, (std::vector<Index>{0, 1, 2, 3}));
}

/// So that whatever worker takes an item at the next call, it has the memory.
TEST(Context, ContextsOfWorkersHoldAsMuchAsAnyOfThemHasNeeded) {
  Context context{InOrder{}};
  const auto take = [&](Index first, Index second) {
    context.for_each_call(2, [&](Index item, Context& of_worker) {
      auto scratch = of_worker.scratch();
      {
        auto inner = scratch.nested();
        for (int part = 0; part < 3; ++part) inner.array<char>(item == 0 ? first : second);
      }
      scratch.array<char>(100);
    });
    return context.scratch_bytes();
  };
  const std::size_t bytes = take(100, 1'000'000);
  EXPECT_EQ(take(1'000'000, 100), bytes);
  EXPECT_EQ(take(1'000'000, 1'000'000), bytes);
}

TEST(Context, SaysWhatItsScratchMemoryGrewTo) {
  Context context;
  EXPECT_EQ(context.scratch_bytes(), 0U);
  context.scratch().array<float>(10);
  EXPECT_EQ(context.scratch_bytes(), std::size_t{1} << 16);
  context.scratch().array<double>(100'000);
  const std::size_t grown = context.scratch_bytes();
  EXPECT_GE(grown, 800'000U);
  context.scratch().array<double>(100'000);
  EXPECT_EQ(context.scratch_bytes(), grown);
}

/// Whatever other calls have made of the blocks meanwhile.
TEST(Scratch, HasRoomForWhatFittedBefore) {
  Context context;
  const auto take = [&](std::initializer_list<Index> thousands) {
    auto scratch = context.scratch();
    for (const Index n : thousands) scratch.array<char>(1000 * n);
  };
  take({60, 60, 60, 100});
  take({60, 130});
  const std::size_t bytes = context.scratch_bytes();
  for (int call = 0; call < 3; ++call) {
    take({60, 60, 60, 100});
    EXPECT_EQ(context.scratch_bytes(), bytes);
    take({60, 130});
    EXPECT_EQ(context.scratch_bytes(), bytes);
  }
}

TEST(Scratch, IsAlignedAndDisjoint) {
  Context context;
  auto scratch = context.scratch();
  std::vector<std::span<double>> arrays;
  for (Index n = 1; n < 200'000; n = n * 3 + 1) arrays.push_back(scratch.array<double>(n));
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arrays[i].data()) % 64, 0U);
    std::fill(arrays[i].begin(), arrays[i].end(), static_cast<double>(i));
  }
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    EXPECT_TRUE(std::all_of(arrays[i].begin(), arrays[i].end(), [&](double x) { return x == static_cast<double>(i); }))
        << i;
  }
}

TEST(Scratch, FindsTheSameMemoryAgain) {
  Context context;
  const auto take = [&] {
    auto scratch = context.scratch();
    std::vector<void*> places;
    for (const Index n : {10, 100'000, 3, 1'000'000, 50}) places.push_back(scratch.array<float>(n).data());
    return places;
  };
  const auto first = take();
  EXPECT_EQ(take(), first);
  EXPECT_EQ(take(), first);
}

TEST(Scratch, InnerScopesLeaveOuterMemoryAlone) {
  Context context;
  auto outer = context.scratch();
  auto kept = outer.array<int>(1000);
  std::iota(kept.begin(), kept.end(), 0);
  const int* inner_place = nullptr;
  for (const Index n : {10, 100'000, 1'000'000}) {
    auto inner = context.scratch();
    auto x = inner.array<int>(n);
    std::fill(x.begin(), x.end(), -1);
    if (n == 10) inner_place = x.data();
  }
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(kept[static_cast<std::size_t>(i)], i);
  EXPECT_EQ(context.scratch().array<int>(10).data(), inner_place);
}

TEST(Scratch, MatricesAreDense) {
  Context context;
  auto scratch = context.scratch();
  auto m = scratch.matrix<double>(3, 5);
  EXPECT_EQ(m.rows(), 3);
  EXPECT_EQ(m.cols(), 5);
  EXPECT_EQ(m.outerStride(), 5);
}

TEST(Scratch, RefusesImpossibleSizesAndStaysUsable) {
  Context context;
  auto scratch = context.scratch();
  auto kept = scratch.array<double>(4);
  std::fill(kept.begin(), kept.end(), 3.0);
  EXPECT_THROW(scratch.array<double>(-1), std::bad_alloc);
  EXPECT_THROW(scratch.array<double>(PTRDIFF_MAX / 4), std::bad_alloc);
  auto next = scratch.array<double>(100'000);
  std::fill(next.begin(), next.end(), 4.0);
  for (const double x : kept) EXPECT_EQ(x, 3.0);
}

TEST(Scratch, GivesEmptyArrays) {
  Context context;
  auto scratch = context.scratch();
  EXPECT_TRUE(scratch.array<float>(0).empty());
  EXPECT_EQ(scratch.matrix<float>(0, 7).size(), 0);
}

#ifdef _OPENMP
TEST(OpenMP, UsesTheThreadsItIsGiven) {
  EXPECT_EQ(attn::OpenMP{.threads = 3}.workers(), 3);
  EXPECT_EQ(attn::OpenMP{}.workers(), omp_get_max_threads());
}

TEST(OpenMP, WorksInsideAParallelRegionOfTheCaller) {
  std::atomic<Index> total = 0;
#pragma omp parallel num_threads(2)
  {
    Context context{attn::OpenMP{.threads = 2}};
    context.for_each(100, [&](Index item, int) { total += item; });
  }
  EXPECT_EQ(total % 4950, 0);
  EXPECT_GE(total, 4950);
}
#endif

}  // namespace
