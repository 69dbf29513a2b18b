/// A cache of keys and values for decoding: causal attention of the last tokens of a sequence that grows.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/context.hpp>
#include <attn/detail/cached_nodes.hpp>
#include <attn/detail/causal_layout.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/exact.hpp>
#include <attn/heads.hpp>
#include <attn/kernel.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>
#include <attn/multi_head.hpp>
#include <attn/multipole.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

namespace attn {

/// Heads of a KeyCache, and features of a token in each: heads of queries, of which heads / key_heads share a head of
/// keys and values.
struct CacheShape {
  Index heads = 1;      ///< of queries, a multiple of key_heads
  Index key_heads = 1;  ///< of keys and values
  Index d = 64;         ///< features of a query and of a key
  Index d_v = 64;       ///< features of a value
};

namespace detail {

/// Rows of some heads that grow in number, those of a head one after another.
template <class T>
class GrowingHeads {
 public:
  GrowingHeads(Index heads, Index dim) : heads_(heads), dim_(dim) {}

  Index dim() const { return dim_; }
  std::size_t bytes() const { return data_.size() * sizeof(T); }

  /// Makes room for so many rows of each head, of which the first length are kept.
  void reserve(Index rows, Index length) {
    if (rows <= capacity_) return;
    if (rows > PTRDIFF_MAX / Index{sizeof(T)} / (heads_ * dim_)) throw std::bad_alloc();
    std::vector<T> data(static_cast<std::size_t>(heads_ * rows * dim_));
    for (Index h = 0; h < heads_; ++h) {
      std::copy_n(data_.data() + h * capacity_ * dim_, length * dim_, data.data() + h * rows * dim_);
    }
    data_.swap(data);
    capacity_ = rows;
  }

  /// Rows of all heads side by side, from row number first on.
  void set(Index first, const ConstMatrixRef<T>& rows) {
    for (Index h = 0; h < heads_; ++h) {
      for (Index i = 0; i < rows.rows(); ++i) {
        std::copy_n(rows.data() + i * rows.outerStride() + h * dim_, dim_,
                    data_.data() + (h * capacity_ + first + i) * dim_);
      }
    }
  }

  /// The first rows of each head.
  HeadsView<const T> first(Index length) const {
    return {data_.data(), 1, heads_, length, dim_, heads_ * capacity_ * dim_, capacity_ * dim_, dim_};
  }

 private:
  Index heads_, dim_, capacity_ = 0;
  std::vector<T> data_;
};

}  // namespace detail

/// Keys and values of the tokens of one sequence so far, for causal attention of those that are appended. attend gives
/// what Multipole gives under a causal mask for the whole sequence: recent keys and the first ones exactly, the past
/// before in nodes of clusters, which are kept from call to call; attend_exactly gives softmax attention. In whatever
/// pieces tokens are appended and attended to, the bits are the same, and those of Multipole for the whole sequence
/// once that has more than 544 tokens. Below it is exact attention by default, as it always is with 508 or more
/// clusters, and agrees to rounding. Matrices hold a token a row, all heads side by side: q (n, heads d), k (n,
/// key_heads d), v (n, key_heads d_v).
///
/// Memory: heads d + key_heads (d + d_v) numbers a token, and for nodes key_heads (d + d_v) of what arithmetic is in,
/// and with clusters of a default size about that at most for each query head. Appending takes a copy, and room for
/// half as many tokens again where there is none; nodes take O(log n) (d + d_v) time a token, in steps of a chunk of
/// 512. Not for use by several threads at once; heads are spread over the workers of a call.
template <class T, ScoreKernel Kernel = SoftmaxKernel>
class KeyCache {
 public:
  static constexpr std::string_view kName = "key_cache";  ///< in error messages

  /// Empty. clusters: as of Multipole under a causal mask. Throws std::invalid_argument when an option is out of range.
  explicit KeyCache(const CacheShape& shape, Clusters clusters = {}, Kernel kernel = {})
      : shape_(checked(shape)),
        clusters_(clusters),
        kernel_(kernel),
        q_(shape.heads, shape.d),
        k_(shape.key_heads, shape.d),
        v_(shape.key_heads, shape.d_v),
        nodes_(static_cast<std::size_t>(shape.key_heads)) {
    clusters.check(kName);
    detail::check_kernel<Wide>(kName, kernel, shape.d);
  }

  /// @{ A cache can be moved, not copied. One that was moved from is empty.
  KeyCache(KeyCache&& other) noexcept
      : shape_(other.shape_),
        clusters_(other.clusters_),
        kernel_(other.kernel_),
        q_(shape_.heads, shape_.d),
        k_(shape_.key_heads, shape_.d),
        v_(shape_.key_heads, shape_.d_v) {
    *this = std::move(other);
  }
  KeyCache& operator=(KeyCache&& other) noexcept {
    std::swap(shape_, other.shape_);
    std::swap(clusters_, other.clusters_);
    std::swap(kernel_, other.kernel_);
    std::swap(q_, other.q_);
    std::swap(k_, other.k_);
    std::swap(v_, other.v_);
    numbers_.swap(other.numbers_);
    nodes_.swap(other.nodes_);
    std::swap(length_, other.length_);
    return *this;
  }
  KeyCache(const KeyCache&) = delete;
  KeyCache& operator=(const KeyCache&) = delete;
  /// @}

  /// Heads and features.
  const CacheShape& shape() const { return shape_; }
  /// Tokens.
  Index length() const { return length_; }
  /// Tokens that there is room for.
  Index capacity() const { return static_cast<Index>(numbers_.size()) - (numbers_.empty() ? 0 : 1); }
  /// Bytes of memory, without the room for less than one node that clears.
  std::size_t bytes() const {
    std::size_t total = q_.bytes() + k_.bytes() + v_.bytes() + numbers_.size() * sizeof(Index);
    for (const auto& nodes : nodes_) total += nodes.bytes();
    return total;
  }

  /// Makes room for so many tokens in all.
  void reserve(Index tokens) {
    if (tokens <= capacity()) return;
    q_.reserve(tokens, length_);
    k_.reserve(tokens, length_);
    v_.reserve(tokens, length_);
    numbers_.resize(static_cast<std::size_t>(tokens) + 1);
    std::iota(numbers_.begin(), numbers_.end(), Index{0});
  }

  /// Adds tokens: k (n, key_heads d), v (n, key_heads d_v), q (n, heads d), from which landmarks of the past are made.
  /// Throws std::invalid_argument where shapes differ, std::bad_alloc where memory ends, and is then as it was.
  void append(ConstMatrixRef<T> k, ConstMatrixRef<T> v, ConstMatrixRef<T> q) {
    const Index n = k.rows();
    detail::check_not_empty(kName, "k", k, 0);
    detail::check_shape(kName, "k", k, n, shape_.key_heads * shape_.d);
    detail::check_shape(kName, "v", v, n, shape_.key_heads * shape_.d_v);
    detail::check_shape(kName, "q", q, n, shape_.heads * shape_.d);
    nodes_.resize(static_cast<std::size_t>(shape_.key_heads));  // a cache that was moved from has none
    if (length_ + n > capacity()) reserve(std::max(length_ + n, capacity() + capacity() / 2));
    k_.set(length_, k);
    v_.set(length_, v);
    q_.set(length_, q);
    length_ += n;
  }

  /// out (n, heads d_v) <- attention of q (n, heads d), the queries of the last n tokens, to the tokens up to each.
  /// Throws std::invalid_argument where shapes differ, there are more queries than tokens, or out overlaps q.
  void attend(ConstMatrixRef<T> q, MatrixRef<T> out, Context& context) {
    check(q, out);
    if (detail::CausalCounts{clusters_}.exact()) return attend_exactly(q, out, context);
    if (shape_.key_heads < context.workers()) {
      for (Index h = 0; h < shape_.key_heads; ++h) attend_key_head(h, q, out, context);
    } else {
      context.for_each_call(shape_.key_heads, [&](Index h, Context& own) { attend_key_head(h, q, out, own); });
    }
  }

  /// The same by exact attention.
  void attend_exactly(ConstMatrixRef<T> q, MatrixRef<T> out, Context& context) const {
    check(q, out);
    multi_head(ExactAttention<T, Kernel>(kernel_), heads_of(q.data(), q, shape_.d), k_.first(length_),
               v_.first(length_), heads_of(out.data(), out, shape_.d_v), Mask{.causal = Causal::lower_right}, context);
  }

  /// Keeps the first tokens. Throws std::invalid_argument where there are fewer, or the number is negative.
  void truncate(Index length) {
    if (length < 0 || length > length_) detail::refuse(kName, "truncate(%td) of %td tokens", length, length_);
    length_ = length;
    for (auto& nodes : nodes_) nodes.truncate(length);
  }

  /// Forgets all tokens, and keeps the room for them.
  void clear() { truncate(0); }

 private:
  using Wide = detail::Arithmetic<T>;

  static const CacheShape& checked(const CacheShape& shape) {
    if (shape.key_heads < 1 || shape.heads < 1 || shape.heads % shape.key_heads != 0) {
      detail::refuse(kName, "heads is %td, should be a multiple of key_heads, which is %td", shape.heads,
                     shape.key_heads);
    }
    detail::check_at_least(kName, "d", static_cast<double>(shape.d), 1);
    detail::check_at_least(kName, "d_v", static_cast<double>(shape.d_v), 1);
    return shape;
  }

  void check(const ConstMatrixRef<T>& q, const MatrixRef<T>& out) const {
    detail::check_not_empty(kName, "q", q);
    detail::check_shape(kName, "q", q, q.rows(), shape_.heads * shape_.d);
    detail::check_shape(kName, "out", out, q.rows(), shape_.heads * shape_.d_v);
    if (q.rows() > length_) detail::refuse(kName, "q has %td rows, the cache %td tokens", q.rows(), length_);
    const detail::Memory results[] = {detail::Memory::of("out", out)}, inputs[] = {detail::Memory::of("q", q)};
    detail::check_apart(kName, results, inputs);
  }

  template <class U, class M>
  HeadsView<U> heads_of(U* data, const M& m, Index dim) const {
    return {data, 1, shape_.heads, m.rows(), dim, m.rows() * m.outerStride(), dim, m.outerStride()};
  }

  /// Tokens of the last n queries.
  detail::CausalTokens tokens(Index n) const {
    const std::span<const Index> all(numbers_);
    return {detail::part_of(all, 0, length_), detail::part_of(all, 0, n), detail::part_of(all, length_ - n + 1, n), 0};
  }

  /// The product of some queries with the keys of a head.
  const detail::Product<Wide>& product(const ConstMatrixRef<T>& q, Index key_head, Scratch& scratch) const {
    using namespace detail;
    Sources<Wide> in{TokenRows<Wide>(q), TokenRows<Wide>(k_.first(length_)(0, key_head)),
                     TokenRows<Wide>(v_.first(length_)(0, key_head)), Mask{.causal = Causal::lower_right}};
    Product<Wide> made = make_product(kernel_, *scratch.make<Sources<Wide>>(1, in), Maximum::running, 1, scratch);
    made.bounded = false;  // what a cluster weighs is not at most 1
    if (made.kernel.center != nullptr) made.kernel.center = early_center(made.in, scratch);
    return *scratch.make<Product<Wide>>(1, made);
  }

  void attend_key_head(Index key_head, const ConstMatrixRef<T>& q, const MatrixRef<T>& out, Context& context) {
    using namespace detail;
    Scratch scratch = context.scratch();
    const Index group = shape_.heads / shape_.key_heads, n = q.rows();
    const std::span<const Product<Wide>*> cached = scratch.array<const Product<Wide>*>(group);
    const std::span<CachedQueries<Wide>*> queries = scratch.array<CachedQueries<Wide>*>(group);
    const CausalTokens all = tokens(length_), last = tokens(n);
    for (Index g = 0; g < group; ++g) {
      const Index h = key_head * group + g;
      cached.data()[g] = &product(q_.first(length_)(0, h), key_head, scratch);
      Product<Wide> of_last = product({q.data() + h * shape_.d, n, shape_.d, q.outerStride()}, key_head, scratch);
      of_last.kernel = cached.data()[g]->kernel;  // with the same center
      const Product<Wide>& kept = *scratch.make<Product<Wide>>(1, of_last);
      queries.data()[g] = scratch.make<CachedQueries<Wide>>(1, *cached.data()[g], kept, last, context, scratch);
    }
    add_nodes(key_head, cached, all, last, queries, context);
    for (Index g = 0; g < group; ++g) {
      const MatrixRef<T> to(out.data() + (key_head * group + g) * shape_.d_v, n, shape_.d_v, out.outerStride());
      queries.data()[g]->finish(ResultRows<Wide>(to), nullptr);
    }
  }

  void add_nodes(Index key_head, std::span<const detail::Product<Wide>* const> cached, const detail::CausalTokens& all,
                 const detail::CausalTokens& last, std::span<detail::CachedQueries<Wide>*> queries, Context& context) {
    using namespace detail;
    const CausalCounts counts{clusters_};
    CachedNodes<Wide>& nodes = nodes_[static_cast<std::size_t>(key_head)];
    for (Index m = std::max<Index>(1, last.chunks(0)); m <= last.most_chunks(); ++m) {
      nodes.turn_to(m, [&](const CausalNode& node) {
        return std::make_unique<CachedNode<Wide>>(cached, all, node, counts(1), counts(node.chunks), context);
      });
      for (std::size_t g = 0; g < queries.size(); ++g) queries[g]->add_nodes(nodes, m, g);
    }
  }

  CacheShape shape_;
  Clusters clusters_;
  Kernel kernel_;
  detail::GrowingHeads<T> q_, k_, v_;
  std::vector<Index> numbers_;  ///< 0, 1, ..., capacity
  std::vector<detail::CachedNodes<Wide>> nodes_;
  Index length_ = 0;
};

}  // namespace attn
