/// How a streamed product is cut into tasks.
#pragma once

#include <attn/engine/register_tile.hpp>
#include <attn/engine/simd.hpp>
#include <attn/matrix.hpp>

#include <algorithm>

namespace attn::detail {

/// Half-open range of indices.
struct Range {
  Index first, last;
};

/// Part i of [0, n) cut into count parts, as evenly as they go.
inline Range nth_part(Index n, Index count, Index i) {
  return {n * i / count, n * (i + 1) / count};
}

/// Queries are cut into packets, strips of up to kTilePackets packets, and blocks of strips; where few queries make few
/// blocks, keys are split too. Results do not depend on the number of workers: strips and splits depend on the shapes
/// alone, and each strip is computed by itself, whatever block it is in.
struct Partition {
  Index packets, strips, blocks, splits;

  template <class T>
  static Partition of(Index n_q, Index n_k, Index d, Index d_v, Index workers) {
    const Index packets = packets_of<T>(n_q), strips = strips_of(packets, kTilePackets);
    const Index strip_bytes = (d + 2 * d_v) * kTileWidth<T> * Index{sizeof(T)};
    const Index strips_a_block = std::clamp<Index>(kBlockBytes / strip_bytes, kFewestStrips, kMostStrips);
    Index blocks = (strips + strips_a_block - 1) / strips_a_block;
    const Index splits = strips < kFewStrips ? std::clamp<Index>(n_k / kFewestSplitKeys, 1, kSplitTasks / blocks) : 1;
    if (splits == 1 && workers > 1) blocks = std::max(blocks, std::min(strips, workers * kBlocksAWorker));
    return {packets, strips, blocks, splits};
  }

  Range strips_of_block(Index block) const { return nth_part(strips, blocks, block); }
  Range packets_of_strip(Index strip) const { return nth_part(packets, strips, strip); }
  Index most_strips_a_block() const { return (strips + blocks - 1) / blocks; }

 private:
  static constexpr Index kBlockBytes = 128 * 1024, kFewestStrips = 4, kMostStrips = 16;
  /// Smaller blocks leave less to wait for at the end of a parallel run, but read the keys more often.
  static constexpr Index kBlocksAWorker = 8;
  static constexpr Index kFewStrips = 8, kSplitTasks = 16, kFewestSplitKeys = 512;
};

}  // namespace attn::detail
