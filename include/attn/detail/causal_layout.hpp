/// Which keys a causal query sees as they are, and which in nodes of the past.
///
///   tokens that masks keep, one after another:    |sinks| chunk 0 | chunk 1 | ... | chunk m-1 | recent ones, query
///   nodes: 1, 2, 4, ... chunks, aligned           |   node of 2^a chunks    | node of 2^b | ... |
///
/// Of m complete chunks the query has one node for each bit of m that is set, the largest first. So a node of so many
/// chunks is used by queries of as many chunks, those after it, and every other aligned range of chunks is one.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <span>

namespace attn::detail {

/// Keys of a chunk; keys before it that a query sees as they are, whatever is complete; keys at the very beginning that
/// all do; and queries at the very beginning that see all keys so, for nodes whose keys have no queries of their own.
inline constexpr Index kChunkKeys = 512, kRecentKeys = 32, kSinkKeys = 4, kFirstQueries = 64;

/// Chunks that are complete before a query that sees so many keys, its recent ones left out.
inline Index chunks_before(Index seen) {
  return std::max<Index>(seen - 1 - kRecentKeys, 0) / kChunkKeys;
}

/// A node: chunks [first, first + chunks).
struct CausalNode {
  Index first, chunks;

  friend bool operator==(const CausalNode&, const CausalNode&) = default;
  Range range() const { return {first, first + chunks}; }
  /// The queries that use it are those of so many complete chunks.
  Range users() const { return {first + chunks, first + 2 * chunks}; }

  /// The i-th of its size, and how many there are for queries of up to most chunks.
  static CausalNode of(Index i, Index chunks) { return {2 * i * chunks, chunks}; }
  Index number() const { return first / (2 * chunks); }
  static Index count(Index most, Index chunks) { return (most / chunks + 1) / 2; }
};

/// Tokens that masks keep, in order: row numbers, and of each query how many of the keys it sees.
struct CausalTokens {
  std::span<const Index> keys, queries, seen;
  Index first_queries = kFirstQueries;  ///< which see all keys as they are

  template <class T>
  static CausalTokens make(const Sources<T>& in, const CausalLimits& limits, Scratch& scratch) {
    const Index n_k = count_kept(in.k.rows(), kept_keys(in)), n_q = count_kept(in.q.rows(), kept_queries(in));
    const std::span<Index> keys = scratch.array<Index>(n_k), queries = scratch.array<Index>(n_q),
                           seen = scratch.array<Index>(n_q);
    for (Index row = 0, i = 0; row < in.k.rows(); ++row) {
      if (keeps_key(in, row)) keys.data()[i++] = row;
    }
    for (Index row = 0, i = 0, j = 0; row < in.q.rows(); ++row) {
      if (!keeps_query(in, row)) continue;
      while (j < n_k && keys.data()[j] <= limits.of(row)) ++j;
      queries.data()[i] = row;
      seen.data()[i++] = j;
    }
    return {keys, queries, seen};
  }

  Index query_count() const { return static_cast<Index>(queries.size()); }

  /// Complete chunks of the i-th query.
  Index chunks(Index i) const { return i < first_queries ? 0 : chunks_before(seen.data()[i]); }
  Index most_chunks() const { return queries.empty() ? 0 : chunks(query_count() - 1); }

  /// Queries whose number of complete chunks is in a range.
  Range with_chunks(Range range) const {
    return {first_query([&](Index i) { return chunks(i) >= range.first; }),
            first_query([&](Index i) { return chunks(i) >= range.last; })};
  }

  /// Queries that see a key of a chunk as their last one.
  Range of_chunk(Index c) const {
    return {first_query([&](Index i) { return seen.data()[i] > c * kChunkKeys; }),
            first_query([&](Index i) { return seen.data()[i] > (c + 1) * kChunkKeys; })};
  }

  /// Row numbers that some keys span.
  Range rows(Range some) const {
    if (some.first == some.last) return {0, 0};
    return {keys.data()[some.first], keys.data()[some.last - 1] + 1};
  }

  /// Keys of a chunk but for sinks.
  std::span<const Index> keys_of_chunk(Index c) const {
    const Index first = c == 0 ? kSinkKeys : c * kChunkKeys;
    return part_of(std::span<const Index>(keys), first, (c + 1) * kChunkKeys - first);
  }

 private:
  /// The first query for which is(i), which holds for all after one for which it does.
  template <class Is>
  Index first_query(const Is& is) const {
    Index first = 0, last = query_count();
    while (first < last) {
      const Index middle = (first + last) / 2;
      if (is(middle)) {
        last = middle;
      } else {
        first = middle + 1;
      }
    }
    return first;
  }
};

}  // namespace attn::detail
