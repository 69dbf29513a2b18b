/// Gaussian scores of tokens that are far from the center and near each other.
///
///   N_x         = bias |x - center|^2                      in units of log2, as all scores
///   score       = scale (q - center).(k - center) - N_k    log2 kappa = score - N_q
///   near        : N_q and N_k large, log2 kappa > -(N_q + N_k) / 4
///   log2 kappa  = -bias |q - k|^2                          for near pairs: above, all digits would cancel
///
/// Since N_q plus that would have lost its digits too, a query with a near key gets scores that are log2 kappa itself:
/// they are relative to a base, 0 at first and then N_q, which its maximum follows. What is near depends on the pair
/// alone.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>

namespace attn::detail {

/// How many times smaller -log2 kappa is than the sum of two N where these cancel for the most part.
template <class T>
inline constexpr T kNearRatio = 4;

/// How far below what a row's weights are relative to a score does not matter: its weight is nothing beside others, or
/// with absolute weights, where no maximum is known, not a number of T.
template <class T>
constexpr T matters_above(Maximum maximum) {
  if (maximum == Maximum::running) return std::numeric_limits<T>::digits + 16;
  return -(std::numeric_limits<T>::min_exponent - std::numeric_limits<T>::digits);
}

/// More than what scores lose by rounding, for norms that add up to this.
template <class T>
T score_rounding(T norms) {
  return 256 * std::numeric_limits<T>::epsilon() * norms;
}

/// What scores of a query of norm N_q matter above, relative to top: near keys have about its norm.
template <class T>
T floor_of(T top, T n_q, Maximum maximum) {
  return top - matters_above<T>(maximum) - score_rounding(n_q);
}

/// What a score is above for near pairs, but for the part of N_k: the score is log2 kappa + beyond.
template <class T>
T needed_score(T n_q, T beyond) {
  return n_q > kFarNorm<T> ? beyond - n_q / kNearRatio<T> : std::numeric_limits<T>::infinity();
}

/// What a key may lack to needed_score in near pairs; key_part: what scores have of its bias.
template <class T>
T allowance(T n_k, T key_part) {
  return n_k > kFarNorm<T> ? n_k / kNearRatio<T> - key_part : -std::numeric_limits<T>::infinity();
}

/// Above 0 where log2 kappa of a pair has to be computed from the difference of its tokens: where its score is above
/// floor, and near.
template <class T>
Packet<T> near_margin(Packet<T> score, Packet<T> needed, Packet<T> allowed, Packet<T> floor) {
  return min(score - needed + allowed, score - floor);
}

/// |a - b_i|^2 in lane i for pairs whose margin is above 0, b along the lanes, or null, where distance(i) gives them.
template <class T, class Distance>
[[gnu::always_inline]] inline Packet<T> near_distances(const T* a, const T* b, Index stride, Index d, Packet<T> margin,
                                                       const Distance& distance) {
  if (b == nullptr) {
    alignas(64) T squares[kLanes<T>], margins[kLanes<T>];
    store(margins, margin);
    for (Index i = 0; i < kLanes<T>; ++i) squares[i] = margins[i] > 0 ? distance(i) : T(0);
    return load(squares);
  }
  auto squares = broadcast(T(0));
  for (Index c = 0; c < d; ++c) {
    const auto x = broadcast(a[c]) - load(b + c * stride);
    squares = multiply_add(x, x, squares);
  }
  return squares;
}

/// Keys along the lanes, which rows of scores are of: what is mended in these, as FarPairs does in panels.
template <class T>
class FarKeys {
 public:
  /// Whether a query has a near key.
  virtual bool any_near(const T* scores, T needed, T floor) const = 0;

  /// The scores of a query's near pairs <- those by their difference. buffer: room for a key.
  virtual void mend(T* scores, T needed, T floor, const T* query, T* buffer) const = 0;
};

/// Mends panels of scores. One for each worker. An interface, as FarKeys is, so that programs compile what is behind it
/// only for kernels that may have a bias.
template <class T>
class FarPairs {
 public:
  /// Queries that have a near key among count ones get their N as the base; maximum follows. panel: scores relative to
  /// no base, with what the tile says of key biases; none is above panel_maximum.
  virtual void find_near(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* panel,
                         const T* panel_maximum, T* base, T* maximum) const = 0;

  /// panel: scores relative to no base, of which none is above panel_maximum -> relative to base, those of near pairs
  /// by their difference, unless they are too far below top, what the weights of each query are relative to.
  /// panel_maximum follows.
  virtual void refine(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* base, const T* top,
                      T* panel, T* panel_maximum) const = 0;

  /// Whether all weights of a tile's scores, none above panel_maximum, are 0, and all that they hide is finite.
  virtual bool adds_nothing(const QueryStrip<T>& queries, const KeyTile<T>& tile, const T* panel_maximum,
                            const RowStatistics<T>& state) const = 0;

  /// maximum <- at least panel_maximum, that of a tile whose keys are to be added, but for rounding.
  virtual void expect(const QueryStrip<T>& queries, const KeyTile<T>& tile, const T* panel_maximum,
                      T* maximum) const = 0;

  /// The keys of a tile along so many lanes; null where none is far from the center.
  virtual const FarKeys<T>* keys(const KeyTile<T>& tile, Index lanes, Scratch& scratch) const = 0;
};

/// FarKeys of a Gaussian.
template <class T>
class GaussianFarKeys final : public FarKeys<T> {
 public:
  /// For count of the rows of keys, numbered by row(j), with norms n_k(j) and key_part(j), and for scores of up to
  /// width lanes.
  template <class Row, class Norm, class Part>
  GaussianFarKeys(const TokenRows<T>& keys, Index count, Index width, const Row& row, const Norm& n_k,
                  const Part& key_part, T bias, Scratch& scratch)
      : keys_(keys),
        width_(width),
        bias_(bias),
        allowed_(scratch.elements<T>(width)),
        key_part_(scratch.elements<T>(width)),
        rows_(scratch.elements<Index>(width)),
        tokens_(keys.cols() <= kFeaturesTogether ? scratch.elements<T>(keys.cols() * width) : nullptr) {
    Scratch temporary = scratch.nested();
    T* const buffer = temporary.elements<T>(keys.cols());
    for (Index j = 0; j < width; ++j) {
      rows_[j] = row(std::min(j, count - 1));
      key_part_[j] = j < count ? key_part(j) : T(0);
      allowed_[j] = j < count ? allowance<T>(n_k(j), key_part_[j]) : -std::numeric_limits<T>::infinity();
      if (tokens_ == nullptr) continue;
      const T* const from = keys.row(rows_[j], buffer);
      for (Index c = 0; c < keys.cols(); ++c) tokens_[c * width + j] = from[c];
    }
  }

  bool any_near(const T* scores, T needed, T floor) const override {
    auto margin = broadcast(std::numeric_limits<T>::lowest());
    for (Index j = 0; j < width_; j += kLanes<T>) margin = max(margin, margin_of(scores, j, needed, floor));
    return any_positive(margin);
  }

  void mend(T* scores, T needed, T floor, const T* query, T* buffer) const override {
    for (Index j = 0; j < width_; j += kLanes<T>) {
      const auto margin = margin_of(scores, j, needed, floor);
      if (!any_positive(margin)) continue;
      const auto squares = near_distances(
          query, tokens_ == nullptr ? nullptr : tokens_ + j, width_, keys_.cols(), margin,
          [&](Index i) { return squared_distance(query, keys_.row(rows_[j + i], buffer), keys_.cols()); });
      const auto mended = load(key_part_ + j) - broadcast(bias_) * squares;
      store(scores + j, select_positive(margin, mended, load(scores + j)));
    }
  }

 private:
  Packet<T> margin_of(const T* scores, Index j, T needed, T floor) const {
    return near_margin(load(scores + j), broadcast(needed), load(allowed_ + j), broadcast(floor));
  }

  TokenRows<T> keys_;
  Index width_;
  T bias_;
  T *allowed_, *key_part_;
  Index* rows_;
  T* tokens_;  ///< features of all keys, null where there are many features
};

/// FarPairs of a Gaussian.
template <class T>
class GaussianFarPairs final : public FarPairs<T> {
 public:
  GaussianFarPairs(const Sources<T>& in, T bias, Maximum maximum, Scratch& scratch)
      : in_(in),
        bias_(bias),
        maximum_(maximum),
        query_(scratch.elements<T>(in.q.cols())),
        key_(scratch.elements<T>(in.k.cols())),
        needed_(scratch.elements<T>(kTileWidth<T>)),
        floor_(scratch.elements<T>(kTileWidth<T>)),
        allowed_(scratch.elements<T>(kTileKeys<T>)) {}

  void find_near(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* panel,
                 const T* panel_maximum, T* base, T* maximum) const override {
    for (Index i = 0; i < queries.lanes(); ++i) {
      needed_[i] = base[i] == 0 ? needed_score(queries.norm[i], queries.norm[i]) : kNever;
      floor_[i] = floor_of(maximum[i], queries.norm[i], maximum_);
    }
    const auto most = broadcast(set_allowed(tile, count));
    for (Index p = 0; p < queries.lanes(); p += kLanes<T>) {
      const auto needed = load(needed_ + p), floor = load(floor_ + p);
      if (!any_positive(near_margin(load(panel_maximum + p), needed, most, floor))) continue;
      auto margin = broadcast(std::numeric_limits<T>::lowest());
      for (Index j = 0; j < count; ++j) {
        margin = max(margin, near_margin(load(panel + j * queries.lanes() + p), needed, broadcast(allowed_[j]), floor));
      }
      if (any_positive(margin)) set_bases(queries.norm + p, margin, base + p, maximum + p);
    }
  }

  void refine(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* base, const T* top, T* panel,
              T* panel_maximum) const override {
    bool any_base = false;
    for (Index i = 0; i < queries.lanes(); ++i) {
      needed_[i] = base[i] == 0 ? kNever : needed_score(queries.norm[i], T(0));
      floor_[i] = floor_of(top[i], queries.norm[i], maximum_);
      any_base = any_base || base[i] != 0;
    }
    if (!any_base) return;
    const auto most = broadcast(set_allowed(tile, count));
    for (Index p = 0; p < queries.lanes(); p += kLanes<T>) {
      const auto maximum = load(panel_maximum + p) - load(base + p);
      if (any_positive(near_margin(maximum, load(needed_ + p), most, load(floor_ + p)))) {
        store(panel_maximum + p, mend(queries, p, tile, count, load(base + p), panel + p));
      } else {
        store(panel_maximum + p, maximum);
        subtract(load(base + p), count, queries.lanes(), panel + p);
      }
    }
  }

  bool adds_nothing(const QueryStrip<T>& queries, const KeyTile<T>& tile, const T* panel_maximum,
                    const RowStatistics<T>& state) const override {
    if (!tile.finite || !queries.finite || tile.key_bias != nullptr) return false;
    const auto rounding = broadcast(score_rounding(T(1)));
    auto most = broadcast(std::numeric_limits<T>::lowest());
    for (Index p = 0; p < queries.lanes(); p += kLanes<T>) {
      const auto score = load(panel_maximum + p) - load(state.base + p) - load(state.maximum + p);
      most = max(most, multiply_add(rounding, load(queries.norm + p), score));
    }
    return largest(most) < -std::max(matters_above<T>(maximum_), T(Exp2<T>::kBias));
  }

  void expect(const QueryStrip<T>& queries, const KeyTile<T>& tile, const T* panel_maximum, T* maximum) const override {
    T most_norm = 0;
    for (Index j = 0; j < tile.count; ++j) most_norm = std::max(most_norm, -tile.norm_bias[j]);
    for (Index i = 0; i < queries.lanes(); ++i) {
      maximum[i] = std::max(maximum[i], panel_maximum[i] - score_rounding(queries.norm[i] + most_norm));
    }
  }

  const FarKeys<T>* keys(const KeyTile<T>& tile, Index lanes, Scratch& scratch) const override {
    const auto norm = [&tile](Index j) { return -tile.norm_bias[j]; };
    Index j = 0;
    while (j < tile.count && !(norm(j) > kFarNorm<T>)) ++j;
    if (j == tile.count) return nullptr;
    const auto row = [&tile](Index key) { return tile.row(key); };
    const auto key_part = [&tile](Index key) { return tile.key_part_of(key); };
    return scratch.make<GaussianFarKeys<T>>(1, in_.k, tile.count, lanes, row, norm, key_part, bias_, scratch);
  }

 private:
  static constexpr T kNever = std::numeric_limits<T>::infinity();

  /// allowed_ <- the allowance of count keys; returns the largest.
  T set_allowed(const KeyTile<T>& tile, Index count) const {
    for (Index j = 0; j < count; ++j) allowed_[j] = allowance(-tile.norm_bias[j], tile.key_part_of(j));
    return row_maximum(allowed_, count);
  }

  /// The lanes of positive margin get their norm as the base.
  static void set_bases(const T* norm, Packet<T> margin, T* base, T* maximum) {
    store(base, select_positive(margin, load(norm), load(base)));
    store(maximum, select_positive(margin, load(maximum) - load(norm), load(maximum)));
  }

  static void subtract(Packet<T> base, Index count, Index lanes, T* panel) {
    for (Index j = 0; j < count; ++j) store(panel + j * lanes, load(panel + j * lanes) - base);
  }

  /// refine for the queries from lane p on; returns the maxima of scores.
  Packet<T> mend(const QueryStrip<T>& queries, Index p, const KeyTile<T>& tile, Index count, Packet<T> base,
                 T* panel) const {
    const auto needed = load(needed_ + p), floor = load(floor_ + p);
    auto maximum = broadcast(kNoMaximum<T>);
    for (Index j = 0; j < count; ++j) {
      T* const at = panel + j * queries.lanes();
      auto score = load(at) - base;
      const auto margin = near_margin(score, needed, broadcast(allowed_[j]), floor);
      if (any_positive(margin)) {
        const auto mended =
            broadcast(tile.key_part_of(j)) - broadcast(bias_) * distances(queries, p, tile.row(j), margin);
        score = select_positive(margin, mended, score);
      }
      store(at, score);
      maximum = max(maximum, score);
    }
    return maximum;
  }

  /// |q_i - k|^2 for the queries from lane p on whose margin is positive.
  [[gnu::always_inline]] inline Packet<T> distances(const QueryStrip<T>& queries, Index p, Index key_row,
                                                    Packet<T> margin) const {
    const T* const key = in_.k.row(key_row, key_);
    const Index d = in_.q.cols();
    return near_distances(key, queries.tokens == nullptr ? nullptr : queries.tokens + p, queries.lanes(), d, margin,
                          [&](Index i) { return squared_distance(in_.q.row(queries.first + p + i, query_), key, d); });
  }

  const Sources<T>& in_;
  T bias_;
  Maximum maximum_;
  T *query_, *key_, *needed_, *floor_, *allowed_;
};

template <class T>
const FarPairs<T>* make_far_pairs(const Product<T>& product, Scratch& scratch) {
  return scratch.make<GaussianFarPairs<T>>(1, product.in, product.kernel.bias, product.maximum, scratch);
}

}  // namespace attn::detail
