/// A strip of queries, along the lanes of packets, as the streamed kernels read it forward and backward.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>

namespace attn::detail {

/// The norm from which on a token is far from the center: below, sums of two of them are precise enough.
template <class T>
inline constexpr T kFarNorm = sizeof(T) == 4 ? 16 : 256;

/// Up to kTilePackets packets of queries, count of them real; the number-th strip of all. Lanes without a query, and
/// those of dropped ones, hold zeros, and no bias counts for them.
template <class T>
struct QueryStrip {
  T* panel;        ///< scale (q - center): d rows, queries along the lanes
  T* norm;         ///< bias |q - center|^2: what log2 kappa is less than the score
  T* bias_origin;  ///< what each query's key biases are counted from; null where all have the same
  Index number, first, count;
  int packets;
  bool far;  ///< whether the norm of any query, measured from the keys' center, is above kFarNorm

  static QueryStrip make(const Product<T>& product, Scratch& scratch) {
    T* const panel = scratch.elements<T>(kTileWidth<T> * product.in.q.cols());
    T* const norm = scratch.elements<T>(kTileWidth<T>);
    const bool own_origins = product.kernel.bias_origins.of_queries != nullptr;
    return {panel, norm, own_origins ? scratch.elements<T>(kTileWidth<T>) : nullptr, 0, 0, 0, 0, false};
  }

  Index lanes() const { return packets * kLanes<T>; }
  Range rows() const { return {first, first + count}; }

  /// Whether lane i has a query that takes part.
  bool holds(const Product<T>& product, Index i) const { return i < count && keeps_query(product.in, first + i); }

  /// Turns to a strip of the product. buffer: room for kLanes queries; not used, and may be null, where they are in
  /// place.
  void load(const Product<T>& product, Index strip, T* buffer) {
    const Range some = product.partition.packets_of_strip(strip);
    number = strip;
    packets = static_cast<int>(some.last - some.first);
    first = some.first * kLanes<T>;
    count = std::min(some.last * kLanes<T>, product.in.q.rows()) - first;
    for (Index p = 0; p < lanes(); p += kLanes<T>) pack(product, p, buffer);
    far = false;
    for (Index i = 0; i < lanes(); ++i) {
      const bool held = holds(product, i);
      if (!held) norm[i] = 0;
      far = far || (product.kernel.center != nullptr && norm[i] > kFarNorm<T>);
      if (bias_origin == nullptr) continue;
      bias_origin[i] = held ? product.kernel.bias_origins.of(first + i) : std::numeric_limits<T>::infinity();
    }
  }

 private:
  [[gnu::noinline]] void pack(const Product<T>& product, Index lane, T* buffer) const {
    const TokenRows<T>& q = product.in.q;
    const Index d = q.cols(), step = q.in_place() ? 0 : d;
    const T* rows[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) {
      rows[i] = holds(product, lane + i) ? q.row(first + lane + i, buffer + i * step) : nullptr;
    }
    const auto squares = pack_rows(rows, d, product.kernel.center, product.kernel.scale, panel + lane, lanes());
    store(norm + lane, broadcast(product.kernel.bias) * squares);
  }
};

}  // namespace attn::detail
