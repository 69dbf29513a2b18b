/// Where work runs (an executor) and where its scratch memory lives (a grow-only arena).
#pragma once

#include <attn/engine/requirements.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <exception>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <attn/matrix.hpp>

namespace attn {

/// A reference to something callable as task(item, worker); two pointers, never allocates, valid during the call it is
/// passed to.
class TaskRef {
 public:
  /// A reference to f, which must outlive it.
  template <std::invocable<Index, int> F>
    requires(!std::same_as<std::remove_cvref_t<F>, TaskRef>)
  TaskRef(F& f)  // NOLINT: implicit, as a function reference is
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, Index item, int worker) { (*static_cast<F*>(object))(item, worker); }) {}

  /// Calls what it refers to.
  void operator()(Index item, int worker) const { call_(object_, item, worker); }

 private:
  void* object_;
  void (*call_)(void*, Index, int);
};

/// Runs independent items: run(n, task) calls task(item, worker) once for each item in [0, n), in any order, from at
/// most workers() threads, each with a worker number of its own below workers(), and returns when all are done.
template <class E>
concept Executor = std::movable<E> && requires(E& e, Index n, const TaskRef& task) {
  { e.workers() } -> std::convertible_to<int>;
  e.run(n, task);
};

namespace detail {

/// Grow-only stack of memory, a list of blocks. The same sequence of requests finds the same blocks again, so it
/// allocates at most once.
class Arena {
  struct Block;

 public:
  struct Mark {
    Block* block = nullptr;  ///< null: before the first
    std::size_t used = 0, total = 0;
  };

  Arena() = default;
  Arena(Arena&& other) noexcept { *this = std::move(other); }
  Arena& operator=(Arena&& other) noexcept {
    std::swap(first_, other.first_);
    std::swap(top_, other.top_);
    std::swap(peak_, other.peak_);
    return *this;
  }
  ~Arena() { drop(first_); }

  Mark mark() const { return top_; }
  void release(Mark mark) { top_ = mark; }

  /// The most bytes that were ever taken at once.
  std::size_t peak() const { return peak_; }

  /// Makes room for any requests of so many bytes together. Nothing may be taken.
  void reserve(std::size_t bytes) {
    if (bytes == 0 || (first_ != nullptr && first_->size >= bytes)) return;
    replace(first_, bytes);
  }

  /// 64-byte aligned memory for n objects of size bytes each, valid until a mark taken before is released. Throws
  /// std::bad_alloc, and is then as it was. Not inlined: the many places that take memory would grow by a tenth.
  [[gnu::noinline]] std::byte* take(Index n, std::size_t size) {
    if (n < 0 || static_cast<std::size_t>(n) > static_cast<std::size_t>(PTRDIFF_MAX) / size) throw std::bad_alloc();
    const std::size_t bytes = (static_cast<std::size_t>(n) * size + kAlignment - 1) / kAlignment * kAlignment;
    if (top_.block == nullptr || top_.block->size - top_.used < bytes) next_block(bytes);
    std::byte* p = top_.block->data() + top_.used;
    top_.used += bytes;
    top_.total += bytes;
    peak_ = std::max(peak_, top_.total);
    return p;
  }

  /// What all blocks hold together.
  std::size_t bytes() const { return bytes_from(first_); }

 private:
  static constexpr std::size_t kAlignment = 64, kSmallestBlock = std::size_t{1} << 16;

  /// Heads memory of so many bytes.
  struct alignas(kAlignment) Block {
    Block* next;
    std::size_t size;

    std::byte* data() { return reinterpret_cast<std::byte*>(this + 1); }
  };

  static std::size_t bytes_from(const Block* block) {
    std::size_t total = 0;
    for (; block != nullptr; block = block->next) total += block->size;
    return total;
  }

  static void drop(Block* block) {
    while (block != nullptr) ::operator delete(std::exchange(block, block->next), std::align_val_t{kAlignment});
  }

  /// Puts one block in the place of all from the given one on.
  static void replace(Block*& block, std::size_t bytes) {
    const std::size_t size = std::max(bytes, kSmallestBlock);
    if (size > static_cast<std::size_t>(PTRDIFF_MAX) - sizeof(Block)) throw std::bad_alloc();
    void* memory = ::operator new(sizeof(Block) + size, std::align_val_t{kAlignment});
    drop(block);
    block = new (memory) Block{nullptr, size};
  }

  /// Moves on to the next block. A missing one is made; one that is too small, and all after it, become one, which is
  /// as large as they are together, so that whatever fitted the blocks before fits them now.
  void next_block(std::size_t bytes) {
    Block*& next = top_.block == nullptr ? first_ : top_.block->next;
    if (next == nullptr || next->size < bytes) replace(next, std::max(bytes, bytes_from(next)));
    top_ = {next, 0, top_.total};
  }

  Block* first_ = nullptr;
  Mark top_;
  std::size_t peak_ = 0;
};

/// Keeps the first exception of parallel tasks, which must not throw, for the calling thread.
class FirstException {
 public:
  /// Runs body, unless one has thrown already.
  template <class Body>
  void guard(const Body& body) {
    if (thrown_.load(std::memory_order_relaxed)) return;
    try {
      body();
    } catch (...) {
      if (!thrown_.exchange(true)) exception_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (exception_ != nullptr) std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> thrown_ = false;
  std::exception_ptr exception_;
};

}  // namespace detail

/// Scratch memory of one scope: what it hands out is uninitialised and lives until the Scratch does. From
/// Context::scratch().
class Scratch {
 public:
  /// The memory above what the arena has handed out so far.
  explicit Scratch(detail::Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { arena_.release(mark_); }

  /// A scope within this one, for memory that is needed less long. Nothing may be taken from this one until it ends.
  Scratch nested() { return Scratch(arena_); }

  /// n elements, 64-byte aligned, uninitialised.
  template <class T>
    requires std::is_trivially_copyable_v<T>
  std::span<T> array(Index n) {
    return {elements<T>(n), static_cast<std::size_t>(n)};
  }

  /// array(n), as a pointer to its first element.
  template <class T>
    requires std::is_trivially_copyable_v<T>
  T* elements(Index n) {
    return reinterpret_cast<T*>(arena_.take(n, sizeof(T)));
  }

  /// A pointer to n objects, each constructed from args. Never destroyed, so they must not need to be.
  template <class T, class... Args>
    requires std::is_trivially_destructible_v<T>
  T* make(Index n, Args&... args) {
    T* data = reinterpret_cast<T*>(arena_.take(n, sizeof(T)));
    for (Index i = 0; i < n; ++i) new (data + i) T(args...);
    return data;
  }

  /// A (rows, cols) matrix without padding, uninitialised.
  template <class T>
  [[gnu::noinline]] MatrixRef<T> matrix(Index rows, Index cols) {
    return {elements<T>(rows * cols), rows, cols, cols};
  }

 private:
  detail::Arena& arena_;
  detail::Arena::Mark mark_;
};

/// The executor of openmp.hpp, incomplete where OpenMP is off. Compilers print this line with what they say of it.
struct OpenMP;  // attn::OpenMP needs -fopenmp (CMake: link OpenMP::OpenMP_CXX)

/// What a call needs besides its data: an executor for its parallel parts and scratch memory, which grows to the
/// largest call's need and is kept, so that a second call with the same shapes allocates nothing. One for each calling
/// thread; move-only. Results are bitwise equal whatever the executor.
class Context {
 public:
  /// Serial: everything runs on the calling thread.
  Context() = default;

  /// Runs parallel parts on the executor, which the context keeps: Context{OpenMP{.threads = 2}}.
  template <class E>
    requires(!std::same_as<E, Context> && sizeof(E) > 0 && Executor<E>)  // of an incomplete type nothing more is asked
  explicit Context(E executor) : executor_(new Holder<E>(std::move(executor))) {}

  /// Takes the executor and the memory of another.
  Context(Context&& other) noexcept { *this = std::move(other); }
  /// Takes the executor and the memory of another.
  Context& operator=(Context&& other) noexcept {
    std::swap(executor_, other.executor_);
    std::swap(arena_, other.arena_);
    std::swap(of_workers_, other.of_workers_);
    return *this;
  }
  [[gnu::noinline]] ~Context() { delete executor_; }  // it contains others, whose destruction would be inlined

  /// Threads that may work at once, at least 1.
  int workers() { return executor_ == nullptr ? 1 : std::max(1, executor_->workers()); }

  /// task(item, worker) for every item in [0, n), on the executor. The task must not throw.
  template <std::invocable<Index, int> F>
  void for_each(Index n, F&& task) {
    run(n, TaskRef(task));
  }

  /// task(item, context) for every item in [0, n), on the executor, with a serial context of each worker: for tasks
  /// that are whole calls. A single one runs on the calling thread. A task may throw: the first exception arrives here,
  /// once those that have begun are done. The contexts are kept, all with as much memory as any of them has needed, so
  /// that at a second call it does not matter which worker takes which item.
  template <std::invocable<Index, Context&> F>
  void for_each_call(Index n, F&& task) {
    const auto count = static_cast<std::size_t>(workers());
    if (count == 1) {
      for (Index item = 0; item < n; ++item) task(item, *this);
      return;
    }
    if (of_workers_.size() < count) of_workers_.resize(count);
    if (n == 1) return void(task(0, of_workers_.front()));
    detail::FirstException exception;
    for_each(n, [&](Index item, int worker) {
      exception.guard([&] { task(item, of_workers_[static_cast<std::size_t>(worker)]); });
    });
    exception.rethrow();
    std::size_t most = 0;
    for (const Context& context : of_workers_) most = std::max(most, context.arena_.peak());
    for (Context& context : of_workers_) context.arena_.reserve(most);
  }

  /// Opens a scope of scratch memory.
  Scratch scratch() { return Scratch(arena_); }

  /// Bytes of scratch memory that the calls so far have made it grow to.
  std::size_t scratch_bytes() const {
    std::size_t bytes = arena_.bytes();
    for (const Context& context : of_workers_) bytes += context.scratch_bytes();
    return bytes;
  }

 private:
  struct AnyExecutor {
    AnyExecutor() = default;
    AnyExecutor(const AnyExecutor&) = delete;
    AnyExecutor& operator=(const AnyExecutor&) = delete;
    virtual ~AnyExecutor() = default;
    virtual int workers() = 0;
    virtual void run(Index n, const TaskRef& task) = 0;
  };

  template <class E>
  struct Holder final : AnyExecutor {
    explicit Holder(E e) : executor(std::move(e)) {}
    int workers() override { return static_cast<int>(executor.workers()); }
    void run(Index n, const TaskRef& task) override { executor.run(n, task); }
    E executor;
  };

  /// A single item is not worth waking anyone.
  [[gnu::noinline]] void run(Index n, const TaskRef& task) {
    if (executor_ != nullptr && n > 1) return executor_->run(n, task);
    for (Index item = 0; item < n; ++item) task(item, 0);
  }

  AnyExecutor* executor_ = nullptr;  ///< owned; null: serial
  detail::Arena arena_;
  std::vector<Context> of_workers_;
};

}  // namespace attn
