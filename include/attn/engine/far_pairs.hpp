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

/// Whether log2 kappa of a pair has to be computed from the difference of its tokens.
template <class T>
bool is_near(T log_kappa, T n_q, T n_k) {
  return n_q > kFarNorm<T> && n_k > kFarNorm<T> && log_kappa > (n_q + n_k) / -kNearRatio<T>;
}

/// Mends panels of scores. One for each worker.
template <class T>
class FarPairs {
 public:
  FarPairs(const Sources<T>& in, T bias, Scratch& scratch)
      : in_(in),
        bias_(bias),
        query_(scratch.elements<T>(in.q.cols())),
        key_(scratch.elements<T>(in.k.cols())),
        needed_(scratch.elements<T>(kTileWidth<T>)) {}

  /// Queries that have a near key among count ones get their N as the base; maximum follows. panel: scores relative to
  /// no base, with what the tile says of key biases.
  [[gnu::noinline]] void find_near(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* panel,
                                   T* base, T* maximum) const {
    for (Index i = 0; i < queries.lanes(); ++i)
      needed_[i] = base[i] == 0 ? needed(queries.norm[i], queries.norm[i]) : kNever;
    for (Index j = 0; j < count; ++j, panel += queries.lanes()) {
      const T n_k = -tile.norm_bias[j], key_part = tile.key_part_of(j);
      if (!may_be_near(n_k, key_part, panel, queries.lanes())) continue;
      for (Index i = 0; i < queries.lanes(); ++i) {
        const T n_q = queries.norm[i];
        if (base[i] != 0 || !is_near(panel[i] - key_part - n_q, n_q, n_k)) continue;
        base[i] = n_q;
        maximum[i] -= n_q;
        needed_[i] = kNever;
      }
    }
  }

  /// panel: scores relative to no base -> relative to base, those of near pairs by their difference.
  [[gnu::noinline]] void refine(const QueryStrip<T>& queries, const KeyTile<T>& tile, Index count, const T* base,
                                T* panel) const {
    for (Index i = 0; i < queries.lanes(); ++i) needed_[i] = base[i] == 0 ? kNever : needed(queries.norm[i], T(0));
    for (Index j = 0; j < count; ++j, panel += queries.lanes()) {
      for (Index p = 0; p < queries.lanes(); p += kLanes<T>) store(panel + p, load(panel + p) - load(base + p));
      const T n_k = -tile.norm_bias[j], key_part = tile.key_part_of(j);
      if (!may_be_near(n_k, key_part, panel, queries.lanes())) continue;
      for (Index i = 0; i < queries.lanes(); ++i) {
        if (base[i] == 0 || !is_near(panel[i] - key_part, queries.norm[i], n_k)) continue;
        panel[i] = key_part - bias_ * distance(queries.first + i, tile.row(j));
      }
    }
  }

 private:
  static constexpr T kNever = std::numeric_limits<T>::infinity();

  /// What a score is above for near pairs, but for the part of N_k: the score is log2 kappa + beyond.
  static T needed(T n_q, T beyond) { return n_q > kFarNorm<T> ? beyond - n_q / kNearRatio<T> : kNever; }

  /// Whether a key is near to any lane whose needed_ is not kNever; scores may be of pairs that are hidden, at
  /// -infinity.
  bool may_be_near(T n_k, T key_part, const T* scores, Index lanes) const {
    if (!(n_k > kFarNorm<T>)) return false;
    auto most = broadcast(std::numeric_limits<T>::lowest());
    for (Index p = 0; p < lanes; p += kLanes<T>) most = max(most, load(scores + p) - load(needed_ + p));
    return largest(most) - key_part > n_k / -kNearRatio<T>;
  }

  /// |q - k|^2 of rows as they are.
  T distance(Index query, Index key) const {
    return squared_distance(in_.q.row(query, query_), in_.k.row(key, key_), in_.q.cols());
  }

  const Sources<T>& in_;
  T bias_;
  T *query_, *key_, *needed_;
};

}  // namespace attn::detail
