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

/// Whether log2 kappa of a pair has to be computed from the difference of its tokens.
template <class T>
bool is_near(T log_kappa, T n_q, T n_k) {
  return n_q > kFarNorm<T> && n_k > kFarNorm<T> && log_kappa > (n_q + n_k) / -kNearRatio<T>;
}

/// Mends panels of scores. One for each worker. Virtual, so that calls of it compile it only where it is made: for
/// kernels that may have a bias.
template <class T>
class FarPairs {
 public:
  FarPairs(const Sources<T>& in, T bias, Maximum maximum, Scratch& scratch)
      : in_(in),
        bias_(bias),
        matters_above_(matters_above<T>(maximum)),
        query_(scratch.elements<T>(in.q.cols())),
        key_(scratch.elements<T>(in.k.cols())),
        needed_(scratch.elements<T>(kTileWidth<T>)),
        floor_(scratch.elements<T>(kTileWidth<T>)) {}

  /// Queries that have a near key among count ones get their N as the base; maximum follows. panel: scores relative to
  /// no base, with what the tile says of key biases.
  virtual void find_near(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* panel, T* base,
                         T* maximum) const {
    for (Index i = 0; i < queries.lanes(); ++i) {
      needed_[i] = base[i] == 0 ? needed(queries.norm[i], queries.norm[i]) : kNever;
      floor_[i] = maximum[i] - matters_above_;
    }
    for_each_candidate(tile, count, panel, queries.lanes(), [&](Index j) {
      const T n_k = -tile.norm_bias[j], key_part = tile.key_part_of(j);
      for (Index i = 0; i < queries.lanes(); ++i) {
        const T n_q = queries.norm[i];
        const T score = panel[j * queries.lanes() + i];
        if (base[i] != 0 || !(score > floor_[i]) || !is_near(score - key_part - n_q, n_q, n_k)) continue;
        base[i] = n_q;
        maximum[i] -= n_q;
        needed_[i] = kNever;
      }
    });
  }

  /// panel: scores relative to no base -> relative to base, those of near pairs by their difference, unless they are
  /// too far below top, what the weights of each query are relative to.
  virtual void refine(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* base, const T* top,
                      T* panel) const {
    bool any_base = false;
    for (Index i = 0; i < queries.lanes(); ++i) {
      needed_[i] = base[i] == 0 ? kNever : needed(queries.norm[i], T(0));
      floor_[i] = top[i] - matters_above_;
      any_base = any_base || base[i] != 0;
    }
    if (!any_base) return;
    for (Index j = 0; j < count; ++j) {
      for (Index p = 0; p < queries.lanes(); p += kLanes<T>) {
        T* const at = panel + j * queries.lanes() + p;
        store(at, load(at) - load(base + p));
      }
    }
    for_each_candidate(tile, count, panel, queries.lanes(), [&](Index j) {
      const T n_k = -tile.norm_bias[j], key_part = tile.key_part_of(j);
      for (Index i = 0; i < queries.lanes(); ++i) {
        T& score = panel[j * queries.lanes() + i];
        if (base[i] == 0 || !(score > floor_[i]) || !is_near(score - key_part, queries.norm[i], n_k)) continue;
        score = key_part - bias_ * distance(queries.first + i, tile.row(j));
      }
    });
  }

 private:
  static constexpr T kNever = std::numeric_limits<T>::infinity();

  /// What a score is above for near pairs, but for the part of N_k: the score is log2 kappa + beyond.
  static T needed(T n_q, T beyond) { return n_q > kFarNorm<T> ? beyond - n_q / kNearRatio<T> : kNever; }

  /// body(j) for every key that may be near to a lane whose needed_ is not kNever: scores are looked at together for
  /// kTogether keys first. They may be of pairs that are hidden, at -infinity.
  template <class Body>
  void for_each_candidate(const KeyTile<T>& tile, Index count, const T* panel, Index lanes, const Body& body) const {
    constexpr Index kTogether = 8;
    for (Index first = 0; first < count; first += kTogether) {
      const Index last = std::min(first + kTogether, count);
      auto most = broadcast(std::numeric_limits<T>::lowest());
      for (Index j = first; j < last; ++j) most = max(most, margin(tile, j, panel + j * lanes, lanes));
      for (Index j = first; j < last && largest(most) > 0; ++j) {
        if (largest(margin(tile, j, panel + j * lanes, lanes)) > 0) body(j);
      }
    }
  }

  /// How far the scores of a key are above what is needed for near pairs, of the lanes the most; lowest() for one that
  /// is not far.
  Packet<T> margin(const KeyTile<T>& tile, Index j, const T* scores, Index lanes) const {
    auto most = broadcast(std::numeric_limits<T>::lowest());
    const T n_k = -tile.norm_bias[j];
    if (!(n_k > kFarNorm<T>)) return most;
    const auto part = broadcast(n_k / kNearRatio<T> - tile.key_part_of(j));
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      const auto score = load(scores + p);
      most = max(most, min(score - load(needed_ + p) + part, score - load(floor_ + p)));
    }
    return most;
  }

  /// |q - k|^2 of rows as they are.
  T distance(Index query, Index key) const {
    return squared_distance(in_.q.row(query, query_), in_.k.row(key, key_), in_.q.cols());
  }

  const Sources<T>& in_;
  T bias_, matters_above_;
  T *query_, *key_, *needed_, *floor_;
};

template <class T>
const FarPairs<T>* make_far_pairs(const Product<T>& product, Scratch& scratch) {
  return scratch.make<FarPairs<T>>(1, product.in, product.kernel.bias, product.maximum, scratch);
}

}  // namespace attn::detail
