/// An executor of one's own: threads of the standard library that wait for work.
#pragma once

#include <attn/context.hpp>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

/// Runs items on the calling thread and on threads of its own, handing them out one by one. Copies share the threads,
/// so that several contexts can have the same; while the threads are at work for one call, another runs on its calling
/// thread alone.
class ThreadExecutor {
 public:
  /// workers: threads that work at once, the calling one included.
  explicit ThreadExecutor(int workers) : pool_(std::make_shared<Pool>(workers)) {}

  int workers() const { return pool_->workers(); }
  void run(attn::Index n, const attn::TaskRef& task) { pool_->run(n, task); }

 private:
  class Pool {
   public:
    explicit Pool(int workers) {
      for (int worker = 1; worker < workers; ++worker) {
        threads_.emplace_back([this, worker](const std::stop_token& stop) { serve(worker, stop); });
      }
    }

    int workers() const { return static_cast<int>(threads_.size()) + 1; }

    void run(attn::Index n, const attn::TaskRef& task) {
      if (taken_.test_and_set()) {  // by another thread's call, or by a call that this one is a part of
        for (attn::Index item = 0; item < n; ++item) task(item, 0);
        return;
      }
      {
        const std::scoped_lock lock(mutex_);
        task_ = &task;
        items_ = n;
        next_ = 0;
        working_ = threads_.size();
        ++round_;
      }
      wake_.notify_all();
      work(0);
      std::unique_lock lock(mutex_);
      done_.wait(lock, [&] { return working_ == 0; });
      taken_.clear();
    }

   private:
    /// What each thread does: one round after another, until it is told to stop.
    void serve(int worker, const std::stop_token& stop) {
      std::uint64_t seen = 0;
      std::unique_lock lock(mutex_);
      while (wake_.wait(lock, stop, [&] { return round_ != seen; })) {
        seen = round_;
        lock.unlock();
        work(worker);
        lock.lock();
        if (--working_ == 0) done_.notify_one();
      }
    }

    void work(int worker) {
      for (attn::Index item = next_++; item < items_; item = next_++) (*task_)(item, worker);
    }

    std::atomic_flag taken_;
    std::mutex mutex_;  // guards what follows, but for next_; a round's task and items do not change while it runs
    std::condition_variable_any wake_;
    std::condition_variable done_;
    const attn::TaskRef* task_ = nullptr;
    attn::Index items_ = 0;
    std::size_t working_ = 0;  // threads that have not ended this round
    std::uint64_t round_ = 0;
    std::atomic<attn::Index> next_ = 0;
    std::vector<std::jthread> threads_;  // last, so that it stops and joins them before the rest is gone
  };

  std::shared_ptr<Pool> pool_;
};

static_assert(attn::Executor<ThreadExecutor>);
