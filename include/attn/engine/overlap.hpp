/// Whether arrays in memory share a byte, whatever their types and strides: decided exactly, in few steps where their
/// strides agree.
#pragma once

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace attn::detail {

using Eigen::Index;

/// x stride for the whole numbers x of [first, last].
struct StrideTerm {
  Index stride = 0, first = 0, last = 0;
};

/// Whether a sum of one value of each term can lie in [least, most]. Strides are positive and descend. What the others
/// reach leaves few x of the first one where they span no more than its stride, as in arrays whose rows, heads and
/// items do not interleave.
inline bool can_reach(std::span<const StrideTerm> terms, Index least, Index most) {
  if (terms.empty()) return least <= 0 && most >= 0;
  const auto [stride, first, last] = terms.front();
  const std::span<const StrideTerm> others = terms.subspan(1);
  const auto floor_of = [](Index a, Index b) { return a / b - (a % b < 0 ? 1 : 0); };
  Index lowest = 0, highest = 0;
  for (const StrideTerm& other : others) {
    lowest += other.first * other.stride;
    highest += other.last * other.stride;
  }
  const Index from = std::max(first, -floor_of(highest - least, stride)),
              to = std::min(last, floor_of(most - lowest, stride));
  for (Index x = from; x <= to; ++x) {
    if (can_reach(others, least - x * stride, most - x * stride)) return true;
  }
  return false;
}

/// So many places, one stride from each to the next.
struct MemoryStep {
  Index count = 1, stride = 0;
};

/// What an argument takes in memory: a run of bytes that lie side by side, and its repetitions along up to three
/// strides.
class Memory {
 public:
  /// A run of so many bytes at data, and its repetitions, strides in bytes. Empty where a count is 0.
  Memory(const char* argument, const void* data, Index run, const std::array<MemoryStep, 3>& steps)
      : name(argument),
        run_(run),
        steps_(steps),
        first_(static_cast<Index>(reinterpret_cast<std::intptr_t>(data))),
        last_(first_ + run) {
    for (const auto& [count, stride] : steps_) {
      if (count <= 0) run_ = 0;
      (stride < 0 ? first_ : last_) += (count - 1) * stride;
    }
  }

  /// A matrix or a view of one.
  template <class M>
    requires requires(const M& m) { m.outerStride(); }
  static Memory of(const char* argument, const M& m) {
    constexpr Index kBytes = sizeof(typename M::Scalar);
    return Memory(argument, m.data(), m.cols() * kBytes, {{{m.rows(), m.outerStride() * kBytes}}});
  }

  template <class T>
  static Memory of(const char* argument, std::span<T> x) {
    return Memory(argument, x.data(), static_cast<Index>(x.size_bytes()), {});
  }

  /// Whether they share a byte: seldom more than a look at where they begin and end.
  bool overlaps(const Memory& other) const {
    if (run_ <= 0 || other.run_ <= 0 || last_ <= other.first_ || other.last_ <= first_) return false;
    return meets(other);
  }

  /// Whether two of its runs share a byte.
  bool overlaps_itself() const {
    const auto& [count, stride] = steps_[0];
    const bool rows_alone = steps_[1].count == 1 && steps_[2].count == 1;
    return run_ > 0 && (rows_alone ? count > 1 && std::abs(stride) < run_ : meets_itself());
  }

  /// Bytes of a run, and from each to the next.
  Index run() const { return run_; }
  Index row_stride() const { return steps_[0].stride; }

  const char* name;  ///< of the argument

 private:
  /// Its steps as terms of the bytes' addresses, longest strides first, so many times x of 0 to count - 1. What follows
  /// without a gap prolongs the run, or the step before.
  struct Places {
    explicit Places(const Memory& memory) : run(memory.run_) {
      std::array<MemoryStep, 3> steps = memory.steps_;
      for (MemoryStep& step : steps) step.stride = step.count == 1 ? 0 : std::abs(step.stride);
      for (const std::size_t i : {0U, 1U, 0U}) {  // in ascending order
        if (steps[i].stride > steps[i + 1].stride) std::swap(steps[i], steps[i + 1]);
      }
      for (const auto& [count, stride] : steps) append(count, stride);
      std::reverse(terms.begin(), terms.begin() + static_cast<std::ptrdiff_t>(used));
    }

    void append(Index count, Index stride) {
      if (count == 1 || stride == 0) return;
      StrideTerm* const before = used > 0 ? &terms[used - 1] : nullptr;
      if (before == nullptr && stride == run) {
        run *= count;
      } else if (before != nullptr && stride == before->stride * (before->last + 1)) {
        before->last = stride / before->stride * count - 1;
      } else {
        terms[used++] = {stride, 0, count - 1};
      }
    }

    Index run;
    std::array<StrideTerm, 3> terms{};
    std::size_t used = 0;
  };

  /// Terms of the same stride are one of their difference.
  [[gnu::noinline]] bool meets(const Memory& other) const {
    const Places a(*this), b(other);
    std::array<StrideTerm, 6> terms;
    std::size_t count = 0, i = 0, j = 0;
    while (i < a.used || j < b.used) {
      const StrideTerm none{}, &mine = i < a.used ? a.terms[i] : none, &others = j < b.used ? b.terms[j] : none;
      const bool takes_mine = mine.stride >= others.stride, takes_others = others.stride >= mine.stride;
      terms[count++] = {std::max(mine.stride, others.stride), takes_others ? -others.last : 0,
                        takes_mine ? mine.last : 0};
      i += takes_mine ? 1 : 0;
      j += takes_others ? 1 : 0;
    }
    const Index distance = first_ - other.first_;
    return can_reach(std::span(terms).first(count), 1 - a.run - distance, b.run - 1 - distance);
  }

  /// Whether two runs do that differ by a positive number of one stride, and by any numbers of shorter ones.
  [[gnu::noinline]] bool meets_itself() const {
    for (const auto& [count, stride] : steps_) {
      if (count > 1 && stride == 0) return true;
    }
    Places places(*this);
    for (StrideTerm& term : places.terms) term.first = -term.last;
    for (std::size_t l = 0; l < places.used; ++l) {
      places.terms[l].first = 1;
      if (can_reach(std::span(places.terms).first(places.used).subspan(l), 1 - places.run, places.run - 1)) return true;
    }
    return false;
  }

  Index run_;
  std::array<MemoryStep, 3> steps_;
  Index first_, last_;
};

}  // namespace attn::detail
