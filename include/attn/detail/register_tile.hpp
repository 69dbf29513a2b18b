/// The one product kernel: a small tile of a matrix product, held in registers.
#pragma once

#include <attn/detail/simd.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

namespace attn::detail {

/// Rows of a register tile; with kTilePackets columns of packets its accumulators, operands and a broadcast fit the registers.
inline constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4;
inline constexpr int kTilePackets = 3;

/// The same for a packed right operand, where 64 columns are 4 packets: 6 rows by 4 packets are as many accumulators.
inline constexpr int kPanelPackets = kVectorRegisters == 32 ? 4 : kTilePackets;
template <int kPackets>
inline constexpr int kPanelRows = kPackets > kTilePackets ? 6 : kTileRows;

/// A count as the extent of an array, without a change of sign.
consteval std::size_t extent(Index n) {
  return static_cast<std::size_t>(n);
}

template <class Body, int... kI>
[[gnu::always_inline]] inline void unroll(const Body& body, std::integer_sequence<int, kI...>) {
  (body(kI), ...);
}

/// body(i) for i = 0 .. kCount-1, each a constant once it is inlined: an array indexed by them lives in registers. With loops that a
/// pragma unrolls GCC 12 spills operands of the innermost loop, and attention takes 1 to 5 % longer.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, kCount>{});
}

/// body(r, p) over a tile of kRows x kPackets, unrolled.
template <int kRows, int kPackets, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  unroll<kRows * kPackets>([&](int i) __attribute__((always_inline)) { body(i / kPackets, i % kPackets); });
}

/// tile[r][p] = sum_l a(r, l) b[l][p]: kRows scalars broadcast against kPackets packets at each of depth steps. Element (r, l) of a is at
/// a + r row_step + l step. b is a panel: row l holds kPackets packets, aligned, one row after another. Where a has fewer rows than the
/// tile, its last one stands for those that are missing: one kernel, unrolled once, serves the end of a matrix too.
template <int kRows, int kPackets, class T>
[[gnu::always_inline]] inline void multiply_tile(const T* a, Index rows, Index row_step, Index step, const T* b, Index depth,
                                                 Packet<T> (&tile)[kRows][kPackets]) {
  unroll<kRows, kPackets>([&](int r, int p) __attribute__((always_inline)) { tile[r][p] = broadcast(T(0)); });
  const T* row[kRows];
  unroll<kRows>([&](int r) __attribute__((always_inline)) { row[r] = a + std::min<Index>(r, rows - 1) * row_step; });
  for (Index l = 0, at = 0; l < depth; ++l, at += step) {
    Packet<T> column[kPackets];
    unroll<kPackets>([&](int p) __attribute__((always_inline)) { column[p] = load(b + p * kLanes<T>); });
    b += kPackets * kLanes<T>;
    unroll<kRows>([&](int r) __attribute__((always_inline)) {
      const auto x = broadcast(row[r][at]);
      unroll<kPackets>([&](int p)
                           __attribute__((always_inline)) { tile[r][p] = multiply_add(x, column[p], tile[r][p]); });
    });
  }
}

/// body(std::integral_constant<int, packets>) for 1 to kMost packets, at most 4.
template <int kMost, class Body>
inline void with_packets(int packets, const Body& body) {
  static_assert(kMost == 3 || kMost == 4);
  if (packets == 1) return body(std::integral_constant<int, 1>{});
  if (packets == 2) return body(std::integral_constant<int, 2>{});
  if constexpr (kMost == 4) {
    if (packets == 4) return body(std::integral_constant<int, 4>{});
  }
  body(std::integral_constant<int, 3>{});
}

/// n rounded up to whole tiles of rows: what is written a tile at a time has room for so many.
constexpr Index whole_tiles(Index n) {
  return (n + kTileRows - 1) / kTileRows * kTileRows;
}

}  // namespace attn::detail
