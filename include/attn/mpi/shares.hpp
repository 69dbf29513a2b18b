/// The shares of all ranks: what each holds of the tokens, and where its rows lie among all of them.
#pragma once

#include <attn/approximator.hpp>
#include <attn/context.hpp>
#include <attn/detail/split_mix64.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/ranks.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>

namespace attn::detail {

/// What all ranks know of one. first_q, first_k: of its rows among those of all ranks; kept_ and first_kept_, the same
/// of rows that masks keep; length_: its rows without those at the end that masks drop.
struct ShareFacts {
  Index n_q = 0, n_k = 0, d = 0, d_v = 0;
  Index first_q = 0, first_k = 0, kept_q = 0, kept_k = 0, first_kept_q = 0, first_kept_k = 0;
  Index length_q = 0, length_k = 0;
  std::uint64_t method = 0;  ///< its name, the type of its matrices and its options
  int causal = 0, masks_keys = 0, has_bias = 0;
};

/// A number that stands for some options, as good as different for different ones.
class Fingerprint {
 public:
  explicit Fingerprint(std::string_view name) {
    for (const char c : name) add(static_cast<std::uint64_t>(static_cast<unsigned char>(c)));
  }

  void add(std::uint64_t x) { value_ = SplitMix64(value_ ^ x)(); }
  void add(double x) { add(std::bit_cast<std::uint64_t>(x)); }
  void add(const ScoreParameters& kernel) {
    add(kernel.scale);
    add(kernel.bias);
    add(static_cast<std::uint64_t>(kernel.rows));
  }

  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0;
};

/// The shares of all ranks.
class Shares {
 public:
  /// Memory for so many.
  Shares(const Ranks& of, Scratch& scratch) : ranks(of), all_(scratch.array<ShareFacts>(of.count)) {}

  /// Of all ranks, this one's from its inputs. method: a fingerprint. A collective call.
  template <class T>
  void gather(std::uint64_t method, const Inputs<T>& in) {
    const auto keeps_q = kept_queries(in);
    const auto keeps_k = kept_keys(in);
    ShareFacts own{.n_q = in.q.rows(), .n_k = in.k.rows(), .d = in.q.cols(), .d_v = in.v.cols()};
    own.kept_q = count_kept(own.n_q, keeps_q);
    own.kept_k = count_kept(own.n_k, keeps_k);
    own.length_q = length_kept(own.n_q, in.mask.keep_query);
    own.length_k = length_kept(own.n_k, in.mask.keep_key);
    own.method = method;
    own.causal = static_cast<int>(in.mask.causal);
    own.masks_keys = in.mask.keep_key.empty() ? 0 : 1;
    own.has_bias = in.key_bias.empty() ? 0 : 1;
    check_mpi(MPI_Allgather(&own, sizeof own, MPI_BYTE, all_.data(), sizeof own, MPI_BYTE, ranks.communicator));
    set_firsts();
    set_causal_offset();
  }

  /// Throws the same on all ranks where their shares are not of one product.
  void check(std::string_view who) const {
    for (int rank = 1; rank < ranks.count; ++rank) {
      const ShareFacts &one = of(rank), &first = of(0);
      if (one.d != first.d) refuse(who, "k has %td columns on rank %d, %td on rank 0", one.d, rank, first.d);
      if (one.d_v != first.d_v) refuse(who, "v has %td columns on rank %d, %td on rank 0", one.d_v, rank, first.d_v);
      if (one.method != first.method)
        refuse(who, "rank %d has another method, or other options of it, than rank 0", rank);
      if (one.causal != first.causal) refuse(who, "rank %d has another causal mask than rank 0", rank);
    }
    if (n_q() == 0) refuse(who, "q is empty on every rank");
    if (n_k() == 0) refuse(who, "k is empty on every rank");
  }

  const ShareFacts& of(int rank) const { return all_[static_cast<std::size_t>(rank)]; }
  const ShareFacts& own() const { return of(ranks.rank); }

  Index n_q() const { return last().first_q + last().n_q; }
  Index n_k() const { return last().first_k + last().n_k; }
  Index kept_q() const { return last().first_kept_q + last().kept_q; }
  Index kept_k() const { return last().first_kept_k + last().kept_k; }
  Index d() const { return own().d; }
  Index d_v() const { return own().d_v; }
  bool mask_keys() const {
    return any([](const ShareFacts& share) { return share.masks_keys != 0; });
  }
  bool have_bias() const {
    return any([](const ShareFacts& share) { return share.has_bias != 0; });
  }

  Causal causal() const { return static_cast<Causal>(own().causal); }

  /// Query i of one rank sees key j of another where j <= i + offset.
  Index causal_offset(const ShareFacts& queries, const ShareFacts& keys) const {
    return queries.first_q - keys.first_k + causal_offset_;
  }

  /// Whether any query of one rank sees any key of another.
  bool meet(const ShareFacts& queries, const ShareFacts& keys) const {
    if (queries.n_q == 0 || keys.n_k == 0) return false;
    return causal() == Causal::none || queries.n_q - 1 + causal_offset(queries, keys) >= 0;
  }

  /// part(queries, keys, causal) for what the queries of one rank see of the keys of another, some queries at a time:
  /// keys that all of these see, and a triangle.
  template <class Part>
  void for_each_part(const ShareFacts& of_queries, const ShareFacts& of_keys, const Part& part,
                     Index queries_at_once = 1024) const {
    const bool is_causal = causal() != Causal::none;
    const Index n_q = of_queries.n_q, n_k = of_keys.n_k, offset = causal_offset(of_queries, of_keys);
    if (n_k == 0) return;
    for (Index first = 0; first < n_q; first += queries_at_once) {  // MPI moves on between these
      Range queries{first, first + std::min(n_q - first, queries_at_once)};
      if (!is_causal || queries.first + offset >= n_k - 1) {
        part(queries, Range{0, n_k}, Causal::none);
        continue;
      }
      queries.first = std::max(queries.first, -offset);
      if (queries.first >= queries.last) continue;
      const Index seen = queries.first + offset;
      if (seen > 0) part(queries, Range{0, seen}, Causal::none);
      part(queries, Range{seen, n_k}, Causal::upper_left);
    }
  }

  const Ranks& ranks;

 private:
  const ShareFacts& last() const { return all_.back(); }

  template <class Predicate>
  bool any(const Predicate& predicate) const {
    return std::any_of(all_.begin(), all_.end(), predicate);
  }

  void set_firsts() {
    for (std::size_t i = 1; i < all_.size(); ++i) {
      const ShareFacts& before = all_[i - 1];
      all_[i].first_q = before.first_q + before.n_q;
      all_[i].first_k = before.first_k + before.n_k;
      all_[i].first_kept_q = before.first_kept_q + before.kept_q;
      all_[i].first_kept_k = before.first_kept_k + before.kept_k;
    }
  }

  /// As CausalLimits has it, of all rows.
  void set_causal_offset() {
    Index length_q = 0, length_k = 0;
    for (const ShareFacts& share : all_) {
      if (share.length_q > 0) length_q = share.first_q + share.length_q;
      if (share.length_k > 0) length_k = share.first_k + share.length_k;
    }
    causal_offset_ = causal() == Causal::lower_right ? length_k - length_q : 0;
  }

  std::span<ShareFacts> all_;
  Index causal_offset_ = 0;
};

}  // namespace attn::detail
