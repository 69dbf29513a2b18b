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

/// Features up to which a token's distances to a packet of others are computed together.
inline constexpr Index kFeaturesTogether = 32;

/// Up to kTilePackets packets of queries, count of them real; the number-th strip of all. Lanes without a query, and
/// those of dropped ones, hold zeros, and no bias counts for them.
template <class T>
struct QueryStrip {
  T* panel;        ///< scale (q - center): d rows, queries along the lanes
  T* norm;         ///< bias |q - center|^2: what log2 kappa is less than the score
  T* tokens;       ///< q itself, likewise, where far; null where distances are not taken together
  T* bias_origin;  ///< what each query's key biases are counted from; null where all have the same
  Index number, first, count;
  int packets;
  bool far;     ///< whether the norm of any query, measured from the keys' center, is above kFarNorm
  bool finite;  ///< whether all norms are

  static QueryStrip make(const Product<T>& product, Scratch& scratch) {
    T* const panel = scratch.elements<T>(kTileWidth<T> * product.in.q.cols());
    T* const norm = scratch.elements<T>(kTileWidth<T>);
    const bool own_origins = product.kernel.bias_origins.of_queries != nullptr;
    const Index d = product.in.q.cols();
    T* const tokens =
        product.kernel.center != nullptr && d <= kFeaturesTogether ? scratch.elements<T>(kTileWidth<T> * d) : nullptr;
    return {.panel = panel,
            .norm = norm,
            .tokens = tokens,
            .bias_origin = own_origins ? scratch.elements<T>(kTileWidth<T>) : nullptr,
            .number = 0,
            .first = 0,
            .count = 0,
            .packets = 0,
            .far = false,
            .finite = true};
  }

  Index lanes() const { return packets * kLanes<T>; }
  Range rows() const { return {first, first + count}; }

  /// Whether lane i has a query that takes part.
  bool holds(const Product<T>& product, Index i) const { return i < count && keeps_query(product.in, first + i); }

  /// Turns to a strip of the product, whose queries are to be loaded.
  void open(const Product<T>& product, Index strip) {
    const Range some = product.partition.packets_of_strip(strip);
    number = strip;
    packets = static_cast<int>(some.last - some.first);
    first = some.first * kLanes<T>;
    count = std::min(some.last * kLanes<T>, product.in.q.rows()) - first;
  }

  /// Loads the queries of the strip that is open. buffer: room for kLanes queries; not used, and may be null, where
  /// they are in place.
  void load(const Product<T>& product, T* buffer) {
    const LogKernel<T>& kernel = product.kernel;
    for (Index p = 0; p < lanes(); p += kLanes<T>) {
      store(norm + p, broadcast(kernel.bias) * pack(product, p, buffer, kernel.center, kernel.scale, panel + p));
    }
    note_norms(product);
    if (!far || tokens == nullptr) return;
    for (Index p = 0; p < lanes(); p += kLanes<T>) pack(product, p, buffer, nullptr, T(1), tokens + p);
  }

  /// Sets what follows from the norms, and the origins of key biases.
  void note_norms(const Product<T>& product) {
    const LogKernel<T>& kernel = product.kernel;
    far = false;
    finite = true;
    for (Index i = 0; i < lanes(); ++i) {
      const bool held = holds(product, i);
      if (!held) norm[i] = 0;
      far = far || (kernel.center != nullptr && norm[i] > kFarNorm<T>);
      finite = finite && is_finite(norm[i]);
      if (bias_origin == nullptr) continue;
      bias_origin[i] = held ? kernel.bias_origins.of(first + i) : std::numeric_limits<T>::infinity();
    }
  }

 private:
  /// to <- scale (q - center) of the queries from the given lane on; returns |q - center|^2 of each.
  [[gnu::noinline]] Packet<T> pack(const Product<T>& product, Index lane, T* buffer, const T* center, T scale,
                                   T* to) const {
    const TokenRows<T>& q = product.in.q;
    const Index d = q.cols(), step = q.in_place() ? 0 : d;
    const T* rows[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) {
      rows[i] = holds(product, lane + i) ? q.row(first + lane + i, buffer + i * step) : nullptr;
    }
    return pack_rows(rows, d, center, scale, to, lanes());
  }
};

}  // namespace attn::detail
