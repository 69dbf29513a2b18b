/// Right operands that several products share, packed once.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/gemm.hpp>
#include <attn/detail/partition.hpp>
#include <attn/detail/upcoming.hpp>
#include <attn/matrix.hpp>

#include <algorithm>

namespace attn::detail {

/// A right operand (depth, columns), packed for register tiles; its last packet is filled up with zeros.
template <class T>
struct Panels {
  T* data;
  Index depth, packets;

  template <Right kRight>
  static Panels pack(const ConstMatrixRef<T>& b, Scratch& scratch) {
    const Index depth = kRight == Right::plain ? b.rows() : b.cols(), columns = kRight == Right::plain ? b.cols() : b.rows();
    const Index packets = (columns + kLanes<T> - 1) / kLanes<T>;
    const Panels panels{scratch.array<T>(depth * packets * kLanes<T>).data(), depth, packets};
    panels.for_each([&](Range strip, int count, T* panel) {
      pack_right<kRight, T>(b, {0, depth}, {strip.first * kLanes<T>, std::min(columns, strip.last * kLanes<T>)}, count, panel);
    });
    return panels;
  }

  /// c <- keep c + diag(factor) a b, as far as c has columns. What is upcoming is fetched meanwhile. Sums run over at most kDepth terms
  /// at a time.
  void multiply(const RowFactors<T>& factor, const ConstMatrixRef<T>& a, T keep, MatrixRef<T> c, Upcoming upcoming) const {
    for_each([&](Range strip, int count, const T* panel) {
      const Range columns{strip.first * kLanes<T>, std::min(c.cols(), strip.last * kLanes<T>)};
      Index first = 0;
      do {  // once even where there are no terms: their sum is 0
        const Range terms{first, std::min(depth, first + kDepth)};
        with_packets<kPanelPackets>(count, [&](auto width) {
          multiply_panel<Left::row_major, width, T>(factor, a, terms, panel + first * count * kLanes<T>, first == 0 ? keep : T(1),
                                                    c, {0, a.rows()}, columns, upcoming);
        });
        first = terms.last;
        upcoming = {};
      } while (first < depth);
    });
  }

 private:
  static constexpr Index kDepth = 256;

  /// body(packets, how many, panel)
  template <class Body>
  void for_each(const Body& body) const {
    const Index strips = (packets + kPanelPackets - 1) / kPanelPackets;
    for (Index s = 0; s < strips; ++s) {
      const Range strip = nth_part(packets, strips, s);
      body(strip, static_cast<int>(strip.last - strip.first), data + strip.first * kLanes<T> * depth);
    }
  }
};

}  // namespace attn::detail
