/// Which query may attend to which key.
#pragma once

#include <attn/engine/requirements.hpp>

#include <cstddef>
#include <cstdint>
#include <span>

namespace attn {

/// Causal attention and its alignment when n_q != n_k. none: every query sees every key. upper_left: query i sees keys
/// j <= i. lower_right: query i sees keys j <= i + n_k - n_q (the last query sees all; decoding with a cache). Rows at
/// the end that a mask drops are not counted in n_q and n_k: the last kept query sees all kept keys, as in the trimmed
/// matrices.
enum class Causal { none, upper_left, lower_right };

/// Masks of one sequence; an empty span keeps everything, otherwise 0 drops and any other value keeps.
/// For a padded sequence pass the same mask to both. A query that sees no key has an output row of zeros.
///
/// A window narrows a causal mask: of the keys that a query sees, it leaves the last `window` rows and the num_sinks
/// first ones (attention sinks: Xiao et al. 2024), which are counted from the first row that keep_key keeps. The time
/// that exact attention takes is then as that of n_q (window + num_sinks) pairs.
///
/// Where q or k is a part of a longer sequence, first_query and first_key say at which of its rows they begin, and
/// upper_left compares rows of that sequence: query i sees the keys with first_key + j <= first_query + i.
struct Mask {
  Causal causal = Causal::none;                ///< whether queries see the keys after them
  std::span<const std::uint8_t> keep_key{};    ///< (n_k): a dropped key influences nothing
  std::span<const std::uint8_t> keep_query{};  ///< (n_q): a dropped query's row is 0, and it counts in no landmark
  std::ptrdiff_t window = 0;                   ///< rows up to a query's last one that it sees; 0: all of them
  std::ptrdiff_t num_sinks = 0;                ///< rows at the beginning that stay in sight of every later query
  std::ptrdiff_t first_query = 0;              ///< where q's first row is in the sequence, for upper_left
  std::ptrdiff_t first_key = 0;                ///< where k's first row is in it
};

namespace detail {

/// A mask that is not causal, by its type: what causal masks need is not compiled for it.
struct RowMask : Mask {
  RowMask() = default;
  explicit RowMask(const Mask& mask) : RowMask(mask.keep_key, mask.keep_query) {}
  RowMask(std::span<const std::uint8_t> keys, std::span<const std::uint8_t> queries)
      : Mask{.keep_key = keys, .keep_query = queries} {}
};

}  // namespace detail

/// The part of a mask that concerns keys alone: for landmarks in the place of queries.
inline detail::RowMask keys_only(const Mask& mask) {
  return {mask.keep_key, {}};
}

/// The part of a mask that concerns queries alone: for landmarks in the place of keys.
inline detail::RowMask queries_only(const Mask& mask) {
  return {{}, mask.keep_query};
}

}  // namespace attn
