/// The one product kernel: a small tile of a matrix product, held in registers.
#pragma once

#include <attn/engine/simd.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstddef>
#include <type_traits>

namespace attn::detail {

/// Rows of a register tile; with kTilePackets columns of packets its accumulators, operands and a broadcast fit the
/// registers.
inline constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4;
inline constexpr int kTilePackets = 3;

/// Elements of those packets: the columns of a whole tile, and the queries of a whole strip.
template <class T>
inline constexpr Index kTileWidth = kTilePackets * kLanes<T>;

/// Packets and rows of a tile with a packed right operand, where 64 columns are 4 packets: 6 rows by 4 packets are as
/// many accumulators.
inline constexpr int kPanelPackets = kVectorRegisters == 32 ? 4 : kTilePackets;
template <int kPackets>
inline constexpr int kPanelRows = kPackets > kTilePackets ? 6 : kTileRows;

/// A count as the extent of an array, without a change of sign.
consteval std::size_t array_size(Index n) {
  return static_cast<std::size_t>(n);
}

/// tile[r][p] += sum_l a(r, l) b[l][p]: kRows scalars broadcast against kPackets packets at each of depth steps.
/// Element (r, l) of a is at a + r row_step + l step. b is a panel: row l holds kPackets packets, aligned, one row
/// after another. Where a has fewer rows than the tile, its last one stands for those that are missing: one kernel
/// serves the end of a matrix too. All loops over the tile are unrolled, here and where it is used, so that it lives in
/// registers. T may be a pair of numbers, whose products are of type Sum. Packets below kFirst are left out.
template <int kFirst = 0, std::size_t kRowExtent, std::size_t kPacketExtent, class T, class Sum>
[[gnu::always_inline]] inline void add_product(const T* a, Index rows, Index row_step, Index step, const T* b,
                                               Index depth, Packet<Sum> (&tile)[kRowExtent][kPacketExtent]) {
  constexpr int kRows = static_cast<int>(kRowExtent), kPackets = static_cast<int>(kPacketExtent);
  const T* row[kRowExtent];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = a + std::min<Index>(r, rows - 1) * row_step;
  for (Index l = 0, at = 0; l < depth; ++l, at += step) {
    Packet<T> column[kPacketExtent];
#pragma GCC unroll 4
    for (int p = kFirst; p < kPackets; ++p) column[p] = load(b + p * kLanes<T>);
    b += kPackets * kLanes<T>;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto x = broadcast(row[r][at]);
#pragma GCC unroll 4
      for (int p = kFirst; p < kPackets; ++p) tile[r][p] = multiply_add(x, column[p], tile[r][p]);
    }
  }
}

/// tile = the product of add_product, 0 in packets below kFirst.
template <int kFirst = 0, std::size_t kRowExtent, std::size_t kPacketExtent, class T, class Sum>
[[gnu::always_inline]] inline void multiply_tile(const T* a, Index rows, Index row_step, Index step, const T* b,
                                                 Index depth, Packet<Sum> (&tile)[kRowExtent][kPacketExtent]) {
#pragma GCC unroll 32
  for (std::size_t i = 0; i < kRowExtent * kPacketExtent; ++i)
    tile[i / kPacketExtent][i % kPacketExtent] = broadcast(Sum(0));
  add_product<kFirst>(a, rows, row_step, step, b, depth, tile);
}

/// How many packets so many columns are cut into: at least 2. A tile of one packet waits for its own sums, and would
/// save a sixth at most.
template <class T>
constexpr Index packet_count(Index columns) {
  return std::max<Index>(2, (columns + kLanes<T> - 1) / kLanes<T>);
}

/// How many strips so many packets are cut into, each of at most most: of packet_count(...) none has fewer than 2.
constexpr Index strip_count(Index packets, Index most) {
  return (packets + most - 1) / most;
}

/// body(std::integral_constant<int, packets>) for 2 to kMost packets, at most 4.
template <int kMost, class Body>
inline void with_packets(int packets, const Body& body) {
  static_assert(kMost == 3 || kMost == 4);
  if (packets == 2) return body(std::integral_constant<int, 2>{});
  if constexpr (kMost == 4) {
    if (packets == 4) return body(std::integral_constant<int, 4>{});
  }
  body(std::integral_constant<int, 3>{});
}

/// n rounded up to whole tiles of rows: what is written a tile at a time has room for so many.
constexpr Index round_up_to_tiles(Index n) {
  return (n + kTileRows - 1) / kTileRows * kTileRows;
}

}  // namespace attn::detail
