/// The one product kernel: a small tile of a matrix product, held in registers.
#pragma once

#include <attn/detail/simd.hpp>
#include <attn/matrix.hpp>

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

/// How the left operand of a tile lies in memory: element (row, l) at row * stride + l, or at row + l * stride.
enum class Left { row_major, column_major };

/// tile[r][p] = sum_l a(r, l) b[l][p]: kRows scalars broadcast against kPackets packets at each of depth steps.
/// b is a panel: row l holds kPackets packets, aligned, one row after another.
template <Left kLeft, std::size_t kRowExtent, std::size_t kPacketExtent, class T>
[[gnu::always_inline]] inline void multiply_tile(const T* a, Index stride, const T* b, Index depth,
                                                 Packet<T> (&tile)[kRowExtent][kPacketExtent]) {
  constexpr int kRows = static_cast<int>(kRowExtent), kPackets = static_cast<int>(kPacketExtent);
  unroll<kRows, kPackets>([&](int r, int p) __attribute__((always_inline)) { tile[r][p] = broadcast(T(0)); });
  const T* row[kRowExtent];
  unroll<kRows>([&](int r)
                    __attribute__((always_inline)) { row[r] = kLeft == Left::row_major ? a + r * stride : a + r; });
  const Index step = kLeft == Left::row_major ? 1 : stride;
  for (Index l = 0, at = 0; l < depth; ++l, at += step) {
    Packet<T> column[kPacketExtent];
    unroll<kPackets>([&](int p) __attribute__((always_inline)) { column[p] = load(b + p * kLanes<T>); });
    b += kPackets * kLanes<T>;
    unroll<kRows>([&](int r) __attribute__((always_inline)) {
      const auto x = broadcast(row[r][at]);
      unroll<kPackets>([&](int p)
                           __attribute__((always_inline)) { tile[r][p] = multiply_add(x, column[p], tile[r][p]); });
    });
  }
}

/// body(std::integral_constant<int, packets>) for at most kMost packets.
template <int kMost, class Body>
inline void with_packets(int packets, const Body& body) {
  if constexpr (kMost > 1) {
    if (packets < kMost) return with_packets<kMost - 1>(packets, body);
  }
  body(std::integral_constant<int, kMost>{});
}

/// body(first, rows) over [0, n) in tiles of kTileRows rows, then of half as many, down to 1; rows is a std::integral_constant.
template <int kRows = kTileRows, class Body>
[[gnu::always_inline]] inline void for_each_tile(Index n, const Body& body, Index first = 0) {
  for (; first + kRows <= n; first += kRows) body(first, std::integral_constant<int, kRows>{});
  if constexpr (kRows > 1) {
    if (first < n) for_each_tile<kRows / 2>(n, body, first);
  }
}

}  // namespace attn::detail
