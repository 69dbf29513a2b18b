/// Keys and values, a tile at a time, as the streamed kernels read them.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <numbers>
#include <span>

namespace attn::detail {

/// Keys in a tile: its weights for one strip of queries take half of a small L1 cache, and no sum in a register is
/// longer than 256.
template <class T>
inline constexpr Index kTileKeys = std::min<Index>(256, 24576 / (kTileWidth<T> * Index{sizeof(T)}));
static_assert(round_up_to_tiles(kTileKeys<float>) == kTileKeys<float> &&
              round_up_to_tiles(kTileKeys<double>) == kTileKeys<double>);

/// The keys of a tile that some queries see: the first count, of which all of them see the first by_all, but for those
/// that a window leaves behind for some of them, past.
struct SeenKeys {
  Index count, by_all;
  Range past{0, 0};

  bool leaves_any() const { return past.first < past.last; }
  bool partly() const { return by_all < count || leaves_any(); }
  Index first_hidden() const { return leaves_any() ? std::min(by_all, past.first) : by_all; }
};

/// How many of a tile's first keys each packet of a strip is multiplied with: no fewer than the packet before.
struct PacketCounts {
  std::array<Index, array_size(kTilePackets)> counts;

  static PacketCounts whole(Index count) {
    PacketCounts equal{};
    equal.counts.fill(count);
    return equal;
  }

  Index of(Index packet) const { return counts[static_cast<std::size_t>(packet)]; }
  Index before(Index packet) const { return packet == 0 ? 0 : of(packet - 1); }
  Index all() const { return counts.back(); }
  bool are_equal() const { return counts.front() == counts.back(); }
};

/// The tiles of some keys that have any up to limit, whole ones: a tile must not depend on which queries are computed
/// together.
template <class T>
Range tiles_up_to(Range keys, Index limit) {
  if (limit >= keys.last) return keys;
  const Index seen = std::max<Index>(0, limit + 1 - keys.first), tiles = (seen + kTileKeys<T> - 1) / kTileKeys<T>;
  return {keys.first, std::min(keys.last, keys.first + tiles * kTileKeys<T>)};
}

/// A run of kept keys. rows holds their row numbers, ascending, or is null: first, first + 1, ...
/// bias holds what is added to a key's scores, in units of log2, or is null: norm_bias, what the kernel has of |k|^2,
/// and key_part, what the key biases are as counted from bias_origin, and distances from origin_row. key_bias: these as
/// they are. Each is null where there are none.
template <class T>
struct KeyTile {
  const T *k, *v, *bias;
  Index k_stride, v_stride;
  const Index* rows;
  Index first, count;
  const T *norm_bias = nullptr, *key_part = nullptr, *key_bias = nullptr;
  T bias_origin = 0;
  Index origin_row = 0;
  bool finite = false;   ///< whether all keys and values are known to be
  bool whole = true;     ///< whether it has all keys that bias_origin is of
  Index keys_a_row = 1;  ///< keys whose values share a row of v

  T key_part_of(Index j) const { return key_part == nullptr ? T(0) : key_part[j]; }

  KeyTile without_key_bias() const {
    KeyTile tile = *this;
    tile.bias = norm_bias;
    tile.key_part = nullptr;
    return tile;
  }

  Index row(Index j) const { return rows != nullptr ? rows[j] : first + j; }

  /// The values, to be multiplied as keys are.
  KeyTile values() const {
    return {.k = v,
            .v = nullptr,
            .bias = nullptr,
            .k_stride = v_stride,
            .v_stride = 0,
            .rows = rows,
            .first = first,
            .count = count};
  }

  /// The keys that so many queries see, of which the first sees row numbers up to limit, the next one more, and so on;
  /// all where limit is CausalLimits::kNone.
  SeenKeys seen_by(Index queries, Index limit) const {
    if (limit == CausalLimits::kNone) return {count, count};
    return {visible(limit + queries - 1), visible(limit)};
  }

  /// The same under limits that have a window, for a tile without_past.
  [[gnu::noinline]] SeenKeys seen_by(const CausalLimits& limits, Index queries, Index limit) const {
    SeenKeys seen = seen_by(queries, limit);
    const Index sinks = visible(limits.sinks - 1);
    if (visible(limit - limits.window) >= seen.count) seen.count = std::min(sinks, seen.count);
    seen.by_all = std::min(seen.by_all, seen.count);
    seen.past = {sinks, std::min(seen.count, visible(limit + queries - 1 - limits.window))};
    return seen;
  }

  /// How many of the keys that some queries see each of so many packets of them has to do with: those in sight of its
  /// last query, and as many more as make their number even.
  PacketCounts seen_by_packets(const SeenKeys& seen, int packets, Index limit) const {
    PacketCounts by_packet = PacketCounts::whole(seen.count);
    for (int p = 0; p + 1 < packets && limit != CausalLimits::kNone; ++p) {
      const Index in_sight = visible(limit + (p + 1) * kLanes<T> - 1);
      by_packet.counts[static_cast<std::size_t>(p)] = std::min(seen.count, in_sight + in_sight % 2);
    }
    return by_packet;
  }

  /// The tile without the keys at its beginning that the windows of all queries leave behind, as far as these fill rows
  /// of v; the first query sees row numbers up to limit.
  [[gnu::noinline]] KeyTile without_past(const CausalLimits& limits, Index limit) const {
    const Index behind = row(0) < limits.sinks ? 0 : std::min(visible(limit - limits.window), count),
                past = behind - behind % keys_a_row;
    KeyTile tile = *this;
    tile.k += past * k_stride;
    tile.v += past / keys_a_row * v_stride;
    for (const T** const values : {&tile.bias, &tile.norm_bias, &tile.key_part, &tile.key_bias}) {
      if (*values != nullptr) *values += past;
    }
    if (rows != nullptr) tile.rows += past;
    tile.first += past;
    tile.count -= past;
    tile.whole = whole && past == 0;
    return tile;
  }

  /// Whether all queries see all keys: only then may what a query gets depend on all of them, as bias_origin does.
  bool seen_wholly(const SeenKeys& seen) const { return whole && seen.by_all == count && !seen.leaves_any(); }

  /// Whether rows of d elements of k are finite, from key i on.
  bool finite_keys(Index i, Index end, Index d) const {
    FiniteLanes<T> elements;
    const Index together = k_stride == d ? std::max<Index>(1, end - i) : 1, length = together * d;
    for (; i < end; i += together) {
      for (Index c = 0; c < length; c += kLanes<T>) elements.add(load_row(k + i * k_stride, c, length));
    }
    return elements.all();
  }

  /// Whether keys of d features and values of d_v are finite.
  bool holds_finite(Index d, Index d_v) const {
    return finite_keys(0, count, d) && values().finite_keys(0, count, d_v);
  }

 private:
  /// How many of its keys have a row number of at most limit.
  Index visible(Index limit) const {
    if (rows != nullptr) return std::upper_bound(rows, rows + count, limit) - rows;
    return std::clamp<Index>(limit - first + 1, 0, count);
  }
};

/// Reads tiles: in place where it can; a copy, of T, without the dropped keys, relative to the center, where it must.
template <class T>
class KeyReader {
 public:
  [[gnu::noinline]] KeyReader(const Sources<T>& in, const LogKernel<T>& kernel, Scratch& scratch)
      : in_(in),
        kernel_(kernel),
        drops_keys_(!in.mask.keep_key.empty() || !in.key_bias.empty()),
        k_(drops_keys_ || kernel.center != nullptr || !in.k.in_place() ? scratch.elements<T>(kTileKeys<T> * in.k.cols())
                                                                       : nullptr),
        v_(drops_keys_ || !in.v.in_place() ? scratch.elements<T>(kTileKeys<T> * in.v.cols()) : nullptr),
        norm_bias_(kernel.bias != 0 ? scratch.elements<T>(kTileKeys<T>) : nullptr),
        key_bias_(in.key_bias.empty() && kernel.slope == 0 ? nullptr : scratch.elements<T>(3 * kTileKeys<T>)),
        rows_(drops_keys_ ? scratch.elements<Index>(kTileKeys<T>) : nullptr) {}

  /// The kept keys among rows [first, last), at most kTileKeys of them.
  virtual KeyTile<T> read(Index first, Index last) const {
    KeyTile<T> tile{.k = in_.k.row_or_null(first),
                    .v = in_.v.row_or_null(first),
                    .bias = nullptr,
                    .k_stride = in_.k.outerStride(),
                    .v_stride = in_.v.outerStride(),
                    .rows = rows_,
                    .first = first,
                    .count = last - first};
    if (drops_keys_) list_kept(tile, last);
    if (v_ != nullptr) {
      copy(in_.v, tile, nullptr, v_);
      tile.v = v_;
      tile.v_stride = in_.v.cols();
    }
    if (k_ != nullptr) {
      copy(in_.k, tile, kernel_.center, k_);
      tile.k = k_;
      tile.k_stride = in_.k.cols();
    }
    if (norm_bias_ != nullptr) set_norm_bias(tile);
    if (key_bias_ != nullptr) set_key_bias(tile);
    return tile;
  }

 protected:
  void list_kept(KeyTile<T>& tile, Index last) const {
    tile.count = 0;
    for (Index j = tile.first; j < last; ++j) {
      if (keeps_key(in_, j)) rows_[tile.count++] = j;
    }
  }

  /// Biases are counted from the common origin, or where each query has its own, from the largest one of the tile.
  void set_key_bias(KeyTile<T>& tile) const {
    T *const part = key_bias_ + kTileKeys<T>, *const bias = part + kTileKeys<T>;
    const bool has_bias = !in_.key_bias.empty();
    for (Index j = 0; j < tile.count; ++j) key_bias_[j] = has_bias ? in_.key_bias.data()[tile.row(j)] : T(0);
    tile.bias_origin = kernel_.bias_origins.of_queries == nullptr ? kernel_.bias_origins.common
                                                                  : largest_origin(key_bias_, tile.count);
    tile.origin_row = tile.count > 0 ? tile.row(tile.count - 1) : tile.first;
    for (Index j = 0; j < tile.count; ++j) {
      part[j] = std::numbers::log2e_v<T> * (key_bias_[j] - tile.bias_origin);
      if (kernel_.slope != 0) part[j] += kernel_.slope * static_cast<T>(tile.row(j) - tile.origin_row);
      bias[j] = norm_bias_ == nullptr ? part[j] : part[j] + norm_bias_[j];
    }
    tile.key_bias = key_bias_;
    tile.key_part = part;
    tile.bias = bias;
  }

  const Sources<T>& in_;
  LogKernel<T> kernel_;
  bool drops_keys_;
  T *k_, *v_, *norm_bias_, *key_bias_;
  Index* rows_;

 private:
  /// to <- the rows of from that a tile has, relative to center unless that is null.
  [[gnu::noinline]] static void copy(const TokenRows<T>& from, const KeyTile<T>& tile, const T* center, T* to) {
    for (Index j = 0; j < tile.count; ++j, to += from.cols()) {
      from.copy_row(tile.row(j), to);
      if (center != nullptr) add_row(T(-1), center, to, from.cols());
    }
  }

  void set_norm_bias(KeyTile<T>& tile) const {
    for (Index j = 0; j < tile.count; ++j) {
      norm_bias_[j] = -kernel_.bias * squared_norm(tile.k + j * tile.k_stride, in_.k.cols());
    }
    tile.bias = tile.norm_bias = norm_bias_;
  }
};

}  // namespace attn::detail
