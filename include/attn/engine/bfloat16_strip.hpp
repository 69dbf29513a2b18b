/// Exact attention of bfloat16 tokens on units for products of pairs (bfloat16_tile.hpp), at nearly twice the speed:
///
///   score  = scale (q_0 k_0 + q_1 k_1) + ...       pairs of features; products are exact, sums are float
///   weight = 2^(score - maximum)                   rounded to bfloat16; sums are of the rounded ones
///   out   += w_0 v_0 + w_1 v_1                     pairs of keys
///
/// What lies in memory is multiplied as it is: the scale is that of scores, and a Gaussian has no center, so that its
/// keys must not be far from zero. Between the products scores lie in the panel as those of float do, and masks are
/// theirs.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/bfloat16_tile.hpp>
#include <attn/engine/causal_strip.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#if defined(EIGEN_VECTORIZE_AVX512) && defined(EIGEN_VECTORIZE_AVX512DQ) && defined(__AVX512BF16__)

namespace attn::detail {

/// Whether there are such units.
inline constexpr bool kHasBfloat16Units = true;

/// Pairs as KeyTile carries them, among floats.
inline const BfloatPair* pairs_at(const float* p) {
  return reinterpret_cast<const BfloatPair*>(p);
}
inline BfloatPair* pairs_at(float* p) {
  return reinterpret_cast<BfloatPair*>(p);
}

/// Reads tiles of bfloat16: k as rows of pairs of features, v as rows of the pairs that two keys make.
class BfloatKeyReader final : public KeyReader<float> {
 public:
  using KeyReader<float>::KeyReader;

  KeyTile<float> read(Index first, Index last) const override {
    KeyTile<float> tile{.k = k_,
                        .v = v_,
                        .bias = nullptr,
                        .k_stride = pair_count(in_.k.cols()),
                        .v_stride = in_.v.cols(),
                        .rows = rows_,
                        .first = first,
                        .count = last - first};
    tile.keys_a_row = 2;
    if (drops_keys_) list_kept(tile, last);
    copy_keys(tile);
    copy_values(tile);
    if (norm_bias_ != nullptr) set_norms(tile);
    if (key_bias_ != nullptr) set_key_bias(tile);
    return tile;
  }

  /// The values of the tile that was read last.
  BfloatPair* values() const { return pairs_at(v_); }

 private:
  [[gnu::noinline]] void copy_keys(const KeyTile<float>& tile) const {
    const Index d = in_.k.cols();
    BfloatPair* to = pairs_at(k_);
    for (Index j = 0; j < tile.count; ++j, to += tile.k_stride) {
      const char* const row = in_.k.memory().row(tile.row(j));
      for (Index c = 0; c < tile.k_stride; c += kLanes<float>) {
        store_pairs(to + c, tile.k_stride - c, load_pairs(row, 2 * c, d));
      }
    }
  }

  [[gnu::noinline]] void copy_values(const KeyTile<float>& tile) const {
    const MemoryRows& v = in_.v.memory();
    for (Index j = 0; j < tile.count; j += 2) {
      interleave_rows(v.row(tile.row(j)), j + 1 < tile.count ? v.row(tile.row(j + 1)) : nullptr, in_.v.cols(),
                      values() + j / 2 * tile.v_stride);
    }
  }

  [[gnu::noinline]] void set_norms(KeyTile<float>& tile) const {
    for (Index j = 0; j < tile.count; j += kLanes<float>) {
      const char* rows[kLanes<float>];
      for (Index i = 0; i < kLanes<float>; ++i) {
        rows[i] = in_.k.memory().row(tile.row(std::min(j + i, tile.count - 1)));
      }
      store(norm_bias_ + j, broadcast(-kernel_.bias) * squared_norms(rows, in_.k.cols()));
    }
    tile.bias = tile.norm_bias = norm_bias_;
  }
};

/// The StripKernel of bfloat16 tokens, whatever the mask.
class BfloatStripKernel final : public CausalStripKernel<float> {
 public:
  BfloatStripKernel(const Product<float>& product, const BfloatKeyReader& reader, Scratch& scratch)
      : CausalStripKernel<float>(product, nullptr, scratch),
        reader_(reader),
        scale_(std::abs(product.kernel.scale)),
        last_values_(scratch.elements<BfloatPair>(product.in.v.cols())) {}

  /// Queries along the lanes, features in pairs; a negative scale changes their signs.
  void load_queries(QueryStrip<float>& strip, const Product<float>& product, float*) const override {
    const BfloatPair flip = product.kernel.scale < 0 ? 0x80008000U : 0U;
    for (Index p = 0; p < strip.lanes(); p += kLanes<float>) {
      const char* rows[kLanes<float>];
      for (Index i = 0; i < kLanes<float>; ++i) {
        rows[i] = strip.holds(product, p + i) ? product.in.q.memory().row(strip.first + p + i) : nullptr;
      }
      const auto squares = pack_pairs(rows, d_, flip, pairs_at(strip.panel) + p, strip.lanes());
      store(strip.norm + p, broadcast(product.kernel.bias) * squares);
    }
    strip.note_norms(product);
    strip.far = false;
  }

  const KeyReader<float>& reader(const Product<float>&, Scratch&) const override { return reader_; }

 private:
  void score(const QueryStrip<float>& strip, const KeyTile<float>& tile, const PacketCounts& counts,
             const Prefetch& prefetch) const override {
    std::fill_n(tile_maximum_, strip.lanes(), kNoMaximum<float>);
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      for_each_part<packets>(counts, [&](auto first, Range keys) {
        score_pairs<packets, first>(strip, tile, keys, counts.all(), prefetch);
      });
    });
  }

  template <int kPackets, int kFirst>
  [[gnu::noinline]] void score_pairs(const QueryStrip<float>& strip, const KeyTile<float>& tile, Range keys,
                                     Index count, const Prefetch& prefetch) const {
    const float* const bias = tile.bias;
    float* panel = panel_ + keys.first * kPackets * kLanes<float>;
    for (Index j = keys.first; j < keys.last; j += kTileRows, panel += kTileRows * kPackets * kLanes<float>) {
      prefetch.fetch(j, kTileRows, count);
      Packet<float> score[array_size(kTileRows)][array_size(kPackets)];
      multiply_features<kPackets, kFirst>(pairs_at(tile.k) + j * tile.k_stride, count - j, tile.k_stride,
                                          pairs_at(strip.panel), pair_count(d_), panel, score);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const auto x = broadcast(bias == nullptr ? 0.0F : bias[std::min<Index>(j + r, count - 1)]);
#pragma GCC unroll 4
        for (int p = kFirst; p < kPackets; ++p) score[r][p] = multiply_add(score[r][p], broadcast(scale_), x);
      }
      keep_scores<kPackets, kFirst>(score, panel, tile_maximum_);
    }
  }

  void weigh_keys(const QueryStrip<float>& strip, const LaneState<float>& state, const PacketCounts& counts,
                  const float* top) const override {
    const float limit = highest_exponent<float>(maximum_);
    for (Index p = 0; p < strip.lanes(); p += kLanes<float>) {
      const Index count = counts.of(p / kLanes<float>);
      const auto sum = weigh_pairs(panel_ + p, count, strip.lanes(), load(top + p), limit);
      store(state.sum + p, load(state.sum + p) + sum);
    }
  }

  /// The key after an odd count of them, which stands beside the last one, may hold anything.
  void add_weighted(const QueryStrip<float>& strip, const LaneState<float>& state, const KeyTile<float>& tile,
                    const PacketCounts& counts, const Prefetch& prefetch) const override {
    const Index count = counts.all();
    if (count % 2 == 0 || count == tile.count) return add_pairs(strip, state, tile.v, counts, prefetch);
    BfloatPair* const last = reader_.values() + (pairs_at(tile.v) - reader_.values()) + count / 2 * d_v_;
    std::copy_n(last, d_v_, last_values_);
    std::transform(last, last + d_v_, last, [](BfloatPair x) { return x & 0xffffU; });
    add_pairs(strip, state, tile.v, counts, prefetch);
    std::copy_n(last_values_, d_v_, last);
  }

  void add_pairs(const QueryStrip<float>& strip, const LaneState<float>& state, const float* v,
                 const PacketCounts& counts, const Prefetch& prefetch) const {
    PacketCounts pairs = counts;
    for (Index& x : pairs.counts) x = pair_count(x);
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      if (counts.are_equal()) {
        add_values<packets>(pairs_at(v), d_v_, d_v_, pairs_at(panel_), pairs.all(), correction_, state.weighted,
                            prefetch);
      } else {
        add_some_values<packets>(pairs_at(v), d_v_, d_v_, pairs_at(panel_), pairs, correction_, state.weighted,
                                 prefetch);
      }
    });
  }

  static bool is_finite_pair(BfloatPair x) { return is_finite(first_of(x)) && is_finite(second_of(x)); }

  bool finite_values(const KeyTile<float>& tile, Index first, Index last) const override {
    const BfloatPair* const v = pairs_at(tile.v);
    return std::all_of(v + first / 2 * d_v_, v + pair_count(last) * d_v_, is_finite_pair);
  }

  [[gnu::noinline]] void add_seen_values(const QueryStrip<float>& strip, const LaneState<float>& state,
                                         const KeyTile<float>& tile, const PacketCounts& counts,
                                         Index limit) const override {
    const Index count = counts.all();
    const BfloatPair *const v = pairs_at(tile.v), *const weights = pairs_at(panel_);
    const auto value = [&](Index j, Index c) {
      const BfloatPair x = v[j / 2 * d_v_ + c];
      return j % 2 == 0 ? first_of(x) : second_of(x);
    };
    const auto finite_bits = [&](Index j, Index c) {
      return j < count && is_finite(value(j, c)) ? std::bit_cast<BfloatPair>(value(j, c)) : BfloatPair{0};
    };
    for (Index j = 0; j < count; j += 2) {
      for (Index c = 0; c < d_v_; ++c) {
        pairs_at(finite_values_)[j / 2 * d_v_ + c] = finite_bits(j, c) >> 16 | finite_bits(j + 1, c);
      }
    }
    add_pairs(strip, state, finite_values_, counts, {});
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v_; ++c) {
        if (is_finite(value(j, c))) continue;
        const Range seeing = limits_.queries_seeing(tile.row(j), limit, strip.lanes());
        for (Index i = seeing.first; i < seeing.last; ++i) {
          const BfloatPair w = weights[j / 2 * strip.lanes() + i];
          state.weighted[c * strip.lanes() + i] += (j % 2 == 0 ? first_of(w) : second_of(w)) * value(j, c);
        }
      }
    }
  }

  const BfloatKeyReader& reader_;
  float scale_;
  BfloatPair* last_values_;
};

inline const StripKernel<float>& make_bfloat_strip_kernel(const Product<float>& product, Scratch& scratch) {
  const BfloatKeyReader& reader = *scratch.make<BfloatKeyReader>(1, product.in, product.kernel, scratch);
  return *scratch.make<BfloatStripKernel>(1, product, reader, scratch);
}

/// Whether scores without a center are precise enough: norms of the kept keys, in units of log2, are the sizes of what
/// cancels in them, and those of queries matter less. What is to come must not decide it under a causal mask.
inline bool is_near_zero(const ScoreParameters& kernel, const Sources<float>& in, Scratch& scratch) {
  constexpr float kMostNorm = 256;
  if (in.mask.causal != Causal::none) return false;
  const float bias = LogKernel<float>::of(kernel).bias;
  float* const row = scratch.elements<float>(in.k.cols());
  for (Index j = 0; j < in.k.rows(); ++j) {
    if (keeps_key(in, j) && !(bias * squared_norm(in.k.row(j, row), in.k.cols()) <= kMostNorm)) return false;
  }
  return true;
}

/// Makes the units multiply, unless a Gaussian's scores need a center, or its log-sums are saved, which count from it.
inline void use_bfloat16_units(const ScoreParameters& kernel, bool saves_sums, Sources<float>& in, Scratch& scratch) {
  const bool has_center = kernel.bias != 0;
  if (has_center && (saves_sums || !is_near_zero(kernel, in, scratch))) return;
  in.mask.make_kernel = &make_bfloat_strip_kernel;
  in.mask.own_products = true;
}

}  // namespace attn::detail

#else

namespace attn::detail {

inline constexpr bool kHasBfloat16Units = false;

inline void use_bfloat16_units(const ScoreParameters&, bool, Sources<float>&, Scratch&) {}

}  // namespace attn::detail

#endif
