/// Products of a few rows with many that are read once, as they lie in memory: features lie along the lanes.
///
///   scores:   score[i][j]  = q_i.k_j                  as many sums at a time as a packet has lanes, then one step that
///                                                     adds up the lanes of all of them
///   values:   sum[i]      += sum_j weight[i][j] v_j   some packets of columns at a time
///
/// What a row of sums gets does not depend on the other rows, nor on how many there are. Narrow types are widened in
/// registers.
#pragma once

#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace attn::detail {

/// The few: count rows, each a whole number of packets after the one before.
template <class T>
struct FewRows {
  T* data;
  Index count, stride;

  T* row(Index i) const { return data + i * stride; }
  FewRows from(Index i, Index column = 0) const { return {row(i) + column, count - i, stride}; }
  FewRows only(Index i) const { return {row(i), 1, stride}; }
};

/// The many: rows of cols elements by their numbers.
struct ListedRows {
  const char* data;
  Index stride_bytes, cols;
  const Index* numbers;
  Index count;
  Index to_next;  ///< bytes from an element to one that will be read soon, and is fetched meanwhile

  template <class E>
  const E* row(Index j) const {
    return reinterpret_cast<const E*>(data + numbers[j] * stride_bytes);
  }
};

/// Fetches what lies so many bytes behind p, in whatever array that is, amid other loads: many at once would wait for
/// each other.
[[gnu::always_inline]] inline void fetch(const void* p, Index bytes) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::size_t>(bytes)), 0, 2);
}

/// How cols elements are read some at a time: whole times, and where elements are left over, once more, so that it ends
/// with the last one.
constexpr Index times_to_read(Index cols, Index some) {
  return (cols + some - 1) / some;
}
constexpr Index start_to_read(Index time, Index cols, Index some) {
  return std::min(time * some, cols - some);
}

inline Packet<float> load_wide(const float* p) {
  return load_unaligned(p);
}
inline Packet<double> load_wide(const double* p) {
  return load_unaligned(p);
}
template <NarrowScalar E>
Packet<float> load_wide(const E* p) {
  return widen(p);
}

/// Zeros in the place of those elements that were read the time before, too.
template <class T>
class LastElements {
 public:
  explicit LastElements(Index cols) {
    const Index twice = times_to_read(cols, kLanes<T>) * kLanes<T> - cols;
    alignas(64) BitsOf<T> bits[kLanes<T>];
    for (Index i = 0; i < kLanes<T>; ++i) bits[i] = i < twice ? BitsOf<T>{0} : ~BitsOf<T>{0};
    keep_ = *reinterpret_cast<const Aligned*>(bits);
  }

  Packet<T> operator()(Packet<T> x) const { return std::bit_cast<Packet<T>>(std::bit_cast<Lanes>(x) & keep_); }

 private:
  using Lanes = typename VectorOf<T, BitsOf<T>>::Type;
  using Aligned [[gnu::may_alias]] = Lanes;
  Lanes keep_;
};

/// to <- a row of q as its packets.
template <class T>
[[gnu::noinline]] void pack_query(const T* row, Index d, T* to) {
  const LastElements<T> last(d);
  for (Index time = 0; time < times_to_read(d, kLanes<T>); ++time) {
    const Index start = start_to_read(time, d, kLanes<T>);
    const auto x = load_unaligned(row + start);
    store(to + time * kLanes<T>, start < time * kLanes<T> ? last(x) : x);
  }
}

/// sums[r][c] += what the times that features are read add to it, for row r of q and key c; with last, what is left
/// over of them too.
template <std::size_t kRows, std::size_t kKeys, class E, class T>
[[gnu::always_inline]] inline void add_features(const E* const* keys, Index d, const FewRows<T>& q, Range times,
                                                const LastElements<T>* last, Index to_next,
                                                Packet<T> (&sums)[kRows][kKeys]) {
  const auto add = [&](Index time, Index start, const auto& part) {
    Packet<T> query[kRows];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kRows; ++r)
      query[r] = opaque(load(q.row(static_cast<Index>(r)) + time * kLanes<T>));  // else it is read for every key
#pragma GCC unroll 16
    for (std::size_t c = 0; c < kKeys; ++c) {
      const auto key = part(load_wide(keys[c] + start));
      fetch(keys[c] + start, to_next);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kRows; ++r) sums[r][c] = multiply_add(query[r], key, sums[r][c]);
    }
  };
  for (Index time = times.first; time < times.last; ++time) {
    add(time, time * kLanes<T>, [](Packet<T> x) { return kRows > 1 ? opaque(x) : x; });
  }
  if (last != nullptr) add(times.last, d - kLanes<T>, *last);
}

/// Queries that are multiplied side by side; of four one may be missing, for which there must be room.
template <class T>
inline constexpr int kQueriesAtOnce = std::min(4, kLanes<T>);

template <class T>
constexpr bool at_once(Index queries) {
  return queries >= kQueriesAtOnce<T> - kQueriesAtOnce<T> / 4;
}

/// As many rows as there must be room for.
template <class T>
constexpr Index with_room(Index queries) {
  return (queries + kQueriesAtOnce<T> - 1) / kQueriesAtOnce<T> * kQueriesAtOnce<T>;
}

/// scores_i <- those of kLanes keys, for kRows rows of q. Sums run over at most kMostTerms terms at a time.
template <int kRows, class E, class T>
[[gnu::noinline]] void score_some_keys(const E* const* keys, Index d, const FewRows<T>& q, const LastElements<T>& last,
                                       Index to_next, const FewRows<T>& scores) {
  constexpr Index kMostTerms = 256;
  constexpr int kKeys = kLanes<T> / kRows, kKeysAtOnce = std::min(kKeys, 8);
  const Index whole = d / kLanes<T>;
  for (int block = 0; block < kLanes<T>; block += kKeys) {
    auto total = broadcast(T(0));
    Range times{0, 0};
    do {
      times = {times.last, std::min(whole, times.last + kMostTerms)};
      const LastElements<T>* const left = times.last == whole && d % kLanes<T> != 0 ? &last : nullptr;
      Packet<T> sums[array_size(kLanes<T>)];
#pragma GCC unroll 2
      for (int some = 0; some < kKeys; some += kKeysAtOnce) {
        Packet<T> sum[array_size(kRows)][array_size(kKeysAtOnce)];
#pragma GCC unroll 16
        for (int i = 0; i < kRows * kKeysAtOnce; ++i) sum[i / kKeysAtOnce][i % kKeysAtOnce] = broadcast(T(0));
        add_features(keys + block + some, d, q, times, left, to_next, sum);
#pragma GCC unroll 16
        for (int i = 0; i < kRows * kKeysAtOnce; ++i)
          sums[i / kKeysAtOnce * kKeys + some + i % kKeysAtOnce] = sum[i / kKeysAtOnce][i % kKeysAtOnce];
      }
      total = total + sums_of_lanes(sums);
    } while (times.last < whole);
    alignas(64) T lanes[kLanes<T>];
    store(lanes, total);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) std::copy_n(lanes + r * kKeys, kKeys, scores.row(r) + block);
  }
}

/// scores_i <- those of all keys, for the rows of q that pack_query made; up to kLanes - 1 more of each row become any
/// number. Rows of k have at least kLanes elements.
template <class E, class T>
void score_rows(const ListedRows& k, const FewRows<T>& q, const FewRows<T>& scores) {
  constexpr int kRows = kQueriesAtOnce<T>;
  const LastElements<T> last(k.cols);
  for (Index j = 0; j < k.count; j += kLanes<T>) {
    const E* keys[kLanes<T>];
    for (Index c = 0; c < kLanes<T>; ++c) keys[c] = k.row<E>(std::min(j + c, k.count - 1));
    Index i = 0;
    for (; at_once<T>(q.count - i); i += kRows) {
      score_some_keys<kRows>(keys, k.cols, q.from(i), last, k.to_next, scores.from(i, j));
    }
    for (; i < q.count; ++i) score_some_keys<1>(keys, k.cols, q.from(i), last, k.to_next, scores.from(i, j));
  }
}

/// sums_i += sum_j weights_ij v_j over a range of keys, for kRows rows. Rows of sums hold the packets of a row one
/// after another.
template <int kRows, class E, class T>
[[gnu::noinline]] void add_some_rows(const ListedRows& v, Range keys, const FewRows<T>& weights,
                                     const FewRows<T>& sums) {
  constexpr int kPackets = kRows > 1 && kVectorRegisters < 32 ? 2 : 4;
  const Index packets = times_to_read(v.cols, kLanes<T>);
  for (Index first = 0; first < packets; first += kPackets) {
    Index start[array_size(kPackets)], at[array_size(kPackets)];
    Packet<T> sum[array_size(kRows)][array_size(kPackets)];
#pragma GCC unroll 4
    for (int p = 0; p < kPackets; ++p) {  // where fewer are left, the last one stands for those that are missing
      const Index packet = std::min(first + p, packets - 1);
      at[p] = packet * kLanes<T>;
      start[p] = start_to_read(packet, v.cols, kLanes<T>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][p] = load(sums.row(r) + at[p]);
    }
    for (Index j = keys.first; j < keys.last; ++j) {
      const E* const row = v.row<E>(j);
      Packet<T> value[array_size(kPackets)];
#pragma GCC unroll 4
      for (int p = 0; p < kPackets; ++p) {
        value[p] = load_wide(row + start[p]);
        fetch(row + start[p], v.to_next);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto weight = broadcast(weights.row(r)[j]);
#pragma GCC unroll 4
        for (int p = 0; p < kPackets; ++p) sum[r][p] = multiply_add(weight, value[p], sum[r][p]);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPackets; ++p) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) store(sums.row(r) + at[p], sum[r][p]);
    }
  }
}

/// sums_i += sum_j weights_ij v_j over a range of keys, rows of at least kLanes elements; a few keys at a time, so that
/// they stay in the cache for all rows.
template <class E, class T>
void add_weighted_rows(const ListedRows& v, Range keys, const FewRows<T>& weights, const FewRows<T>& sums) {
  constexpr Index kKeysAtOnce = 32;
  constexpr int kRows = kQueriesAtOnce<T>;
  for (Range some{keys.first, 0}; some.first < keys.last; some.first = some.last) {
    some.last = std::min(keys.last, some.first + kKeysAtOnce);
    Index i = 0;
    for (; at_once<T>(sums.count - i); i += kRows) {
      add_some_rows<kRows, E>(v, some, weights.from(i), sums.from(i));
    }
    for (; i < sums.count; ++i) {
      add_some_rows<1, E>(v, some, weights.from(i), sums.from(i));
    }
  }
}

/// Both products, for rows in memory of some type.
template <class T>
struct RowProducts {
  void (*score)(const ListedRows& k, const FewRows<T>& q, const FewRows<T>& scores);
  void (*add)(const ListedRows& v, Range keys, const FewRows<T>& weights, const FewRows<T>& sums);
};

template <class T, class E>
inline constexpr RowProducts<T> kRowProducts{score_rows<E, T>, add_weighted_rows<E, T>};

}  // namespace attn::detail
