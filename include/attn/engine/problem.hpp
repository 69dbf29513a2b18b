/// One streamed product: what is multiplied, the kernel in units of log2, and how the work is cut.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn::detail {

/// How many rows in front a mask drops.
inline Index first_kept(std::span<const std::uint8_t> keep) {
  return std::find_if(keep.begin(), keep.end(), [](std::uint8_t x) { return x != 0; }) - keep.begin();
}

/// n without the rows at the end that a mask drops.
inline Index length_kept(Index n, std::span<const std::uint8_t> keep) {
  while (n > 0 && !keep.empty() && keep[static_cast<std::size_t>(n - 1)] == 0) --n;
  return n;
}

/// Query i sees the keys of rows up to of(i), which without a causal mask is beyond all. lower_right counts from the
/// last query and the last key that the masks keep, so that padding behind them changes nothing; in front of them it
/// moves both by what it adds. queries: of each head. Where there is a window, it sees none of the keys between the
/// first ones, sinks, and from(i).
struct CausalLimits {
  static constexpr Index kNone = std::numeric_limits<Index>::max();

  bool causal = false;
  Index offset = 0, queries = kNone;
  Index window = kNone, sinks = 0;

  template <class In>
  static CausalLimits of_inputs(const In& in) {
    const Mask& mask = in.mask;
    const Index queries = queries_of_head(in);
    CausalLimits limits{
        .causal = mask.causal != Causal::none, .offset = mask.first_query - mask.first_key, .queries = queries};
    if (mask.causal == Causal::lower_right) {
      limits.offset = length_kept(in.k.rows(), mask.keep_key) - length_kept(queries, mask.keep_query);
    }
    if (mask.window == 0) return limits;
    limits.window = std::min<Index>(mask.window, kNone / 4);  // all of them
    const Index first = mask.first_key > 0 ? -mask.first_key : first_kept(mask.keep_key);
    limits.sinks = std::clamp<Index>(first + std::min(mask.num_sinks, mask.first_key + in.k.rows()), 0, in.k.rows());
    return limits;
  }

  Index of(Index query) const { return causal ? query % queries + offset : kNone; }

  bool has_window() const { return window != kNone; }
  Index from(Index query) const { return has_window() ? of(query) - window + 1 : 0; }

  /// Whether the given query and later ones see none of some keys, for these lie before its window.
  bool passes_over(Range keys, Index query) const {
    return has_window() && keys.first >= sinks && keys.last <= from(query);
  }

  /// Which of so many queries, of which the first sees row numbers up to limit, see a key that the last one may see but
  /// for the window.
  Range queries_seeing(Index key, Index limit, Index count) const {
    const Index first = std::max<Index>(0, key - limit);
    if (!has_window() || key < sinks) return {first, count};
    return {first, std::min(count, key - limit + window)};
  }

  /// How many of n keys every query sees, but for a window.
  Index seen_by_all(Index n) const { return causal ? std::clamp<Index>(of(0) + 1, 0, n) : n; }
};

/// The largest finite bias so far.
template <class T>
struct LargestBias {
  T value = -std::numeric_limits<T>::infinity();

  void add(T bias) {
    if (is_finite(bias)) value = std::max(value, bias);
  }

  /// What to count from: 0 where no bias is finite.
  T origin() const { return is_finite(value) ? value : T(0); }
};

template <class T>
T largest_origin(const T* bias, Index count) {
  LargestBias<T> largest;
  for (Index j = 0; j < count; ++j) largest.add(bias[j]);
  return largest.origin();
}

/// The largest finite bias that each query sees, 0 for one that sees none: of_queries (n_q) under a causal mask, else
/// null, and all have the common one. What distances weigh is not in it: that is 0 for a query's last key.
template <class T>
struct BiasOrigins {
  T common = 0;
  const T* of_queries = nullptr;

  T of(Index query) const { return of_queries == nullptr ? common : of_queries[query]; }

  static BiasOrigins of_inputs(const Sources<T>& in, Scratch& scratch) {
    if (in.key_bias.empty() && in.alibi_slope == 0) return {};
    if (in.key_bias.empty()) {
      T* const zeros = scratch.elements<T>(in.q.rows());
      std::fill_n(zeros, in.q.rows(), T(0));
      return {T(0), zeros};
    }
    LargestBias<T> largest;
    Index seen = 0;
    const auto see_up_to = [&](Index limit) {
      for (; seen < in.k.rows() && seen <= limit; ++seen) {
        if (keeps_key(in, seen)) largest.add(in.key_bias.data()[seen]);
      }
      return largest.origin();
    };
    if (in.mask.causal == Causal::none) return {see_up_to(CausalLimits::kNone), nullptr};
    const CausalLimits limits = CausalLimits::of_inputs(in);
    T* const origins = scratch.elements<T>(in.q.rows());
    const Index queries = queries_of_head(in);
    if (limits.has_window()) {
      set_in_windows(in, limits, origins, scratch.nested());
    } else {
      for (Index i = 0; i < queries; ++i) origins[i] = see_up_to(limits.of(i));
    }
    for (Index i = queries; i < in.q.rows(); ++i) origins[i] = origins[i - queries];
    return {T(0), origins};
  }

 private:
  /// origins <- the largest bias among the first keys and those in the window of each query of a head. candidates: keys
  /// of the window, each of a larger bias than those after it.
  [[gnu::noinline]] static void set_in_windows(const Sources<T>& in, const CausalLimits& limits, T* origins,
                                               Scratch scratch) {
    const T* const bias = in.key_bias.data();
    Index* const candidates = scratch.elements<Index>(in.k.rows());
    LargestBias<T> of_sinks;
    Range window{0, 0};
    for (Index i = 0, seen = 0; i < queries_of_head(in); ++i) {
      for (; seen < in.k.rows() && seen <= limits.of(i); ++seen) {
        if (!keeps_key(in, seen) || !is_finite(bias[seen])) continue;
        if (seen < limits.sinks) of_sinks.add(bias[seen]);
        while (window.first < window.last && bias[candidates[window.last - 1]] <= bias[seen]) --window.last;
        candidates[window.last++] = seen;
      }
      while (window.first < window.last && candidates[window.first] < limits.from(i)) ++window.first;
      LargestBias<T> largest = of_sinks;
      if (window.first < window.last) largest.add(bias[candidates[window.first]]);
      origins[i] = largest.origin();
    }
  }
};

/// x with half of its digits: where tokens are measured from such a number, differences to it are mostly exact.
template <class T>
T with_few_digits(T x) {
  return std::bit_cast<T>(std::bit_cast<BitsOf<T>>(x) & (~BitsOf<T>{0} << (std::numeric_limits<T>::digits / 2)));
}

/// Row 0 of count rows, a power of three, <- of each feature the median of medians of three rows ..., which reorders
/// them (the remedian of P. J. Rousseeuw and G. W. Bassett, 1990).
template <class T>
void reduce_to_medians(T* rows, Index count, Index stride) {
  for (; count > 1; count /= 3) {
    for (Index i = 0; i < count / 3; ++i) {
      const T* const three = rows + 3 * i * stride;
      for (Index c = 0; c < stride; c += kLanes<T>) {
        const auto x = load(three + c), y = load(three + stride + c), z = load(three + 2 * stride + c);
        store(rows + i * stride + c, max(min(x, y), min(max(x, y), z)));
      }
    }
  }
}

/// An origin amid the keys, d numbers: of each feature about the median over some kept keys that every query sees,
/// which tokens far from all others do not move; or the first kept key, where no other is seen by all, as under a
/// causal mask: results must not depend on later tokens.
template <class T>
const T* choose_center(const Sources<T>& in, Scratch& scratch) {
  constexpr Index kMost = 81, kFewQueries = 8, kMostForFew = 27;  // a few queries take no longer than many samples
  const Index d = in.k.cols(), most = in.q.rows() < kFewQueries ? kMostForFew : kMost;
  const Index stride = (d + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T* const center = scratch.elements<T>(d);
  Scratch temporary = scratch.nested();
  const Index seen = CausalLimits::of_inputs(in).seen_by_all(in.k.rows()), kept = count_kept(seen, kept_keys(in));
  Index count = 1;
  while (3 * count <= std::min(kept, most)) count *= 3;
  T* const samples = temporary.elements<T>(count * stride);
  std::fill_n(samples, count * stride, T(0));
  const Index step = std::max<Index>(1, kept / count);
  for (Index j = 0, taken = 0, until_next = step / 2; j < in.k.rows() && taken < count; ++j) {
    if (!keeps_key(in, j) || until_next-- > 0) continue;
    in.k.copy_row(j, samples + taken++ * stride);
    until_next = step - 1;
  }
  reduce_to_medians(samples, count, stride);
  std::transform(samples, samples + d, center, [](T x) { return is_finite(x) ? with_few_digits(x) : T(0); });
  return center;
}

/// What all tiles of one call share: the origin that keys and queries are measured from (null: zero), which changes no
/// distance but keeps digits, and the kernel in units of log2: log2 kappa = scale q.k - bias (|q|^2 + |k|^2) + a.
template <class T>
struct LogKernel {
  const T* center = nullptr;
  T scale = 0, bias = 0;
  T slope = 0;                    ///< what a score has less for each row between a key and the query's last one
  BiasOrigins<T> bias_origins{};  ///< what key biases are counted from, in their own units

  static LogKernel of(const ScoreParameters& kernel) {
    return {.scale = static_cast<T>(kernel.scale * std::numbers::log2e),
            .bias = static_cast<T>(kernel.bias * std::numbers::log2e)};
  }
};

/// What weights are relative to: the largest score so far, or nothing where no weight is above 1: they are kappa
/// itself.
enum class Maximum { running, none };

/// What no exponent of a weight is above, but for rounding.
template <class T>
T highest_exponent(Maximum maximum) {
  return maximum == Maximum::none ? T(0) : std::numeric_limits<T>::infinity();
}

/// The statistics of a row before it has seen a key.
template <class T>
inline constexpr T kNoMaximum = std::numeric_limits<T>::lowest();

/// Queries are cut into packets, strips of up to kTilePackets packets, and blocks of strips; where few queries make few
/// blocks, keys are split too. Results do not depend on the number of workers: strips and splits depend on the shapes
/// alone, and each strip is computed by itself, whatever block it is in.
struct Partition {
  Index packets, strips, blocks, splits;

  template <class T>
  static Partition of(Index n_q, Index n_k, Index d, Index d_v, Index workers) {
    const Index packets = packet_count<T>(n_q), strips = strip_count(packets, kTilePackets);
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

/// How the backward pass is cut into tasks, each some strips of queries and some keys. Where keys are cut, dq is added
/// up from several partial ones, where queries are cut, dk and dv are: so not both in many parts. Depends on the shapes
/// alone.
struct BackwardPartition {
  Index query_parts, key_parts;

  static BackwardPartition of(Index n_q, Index n_k) {
    const Index key_parts = std::clamp<Index>(n_k / kFewestKeys, 1, kMostParts);
    const Index query_parts =
        key_parts >= kEnoughParts ? 1 : std::clamp<Index>(n_q / kFewestQueries, 1, kMostParts / key_parts);
    return {query_parts, key_parts};
  }

 private:
  static constexpr Index kFewestKeys = 512, kFewestQueries = 256, kMostParts = 8, kEnoughParts = 4;
};

/// The log of a row's sum of weights as the kernels count them, which keeps digits that log sum_j kappa_ij would lose:
/// relative to Product::origin, and to base, see far_pairs.hpp.
template <class T>
struct RowLog {
  T value, base;
};

/// Where log-sums of rows go, each null if it is not wanted: absolute, log sum_j kappa_ij, and relative.
template <class T>
struct LogSums {
  T* absolute = nullptr;
  RowLog<T>* relative = nullptr;
};

/// What a row of weights, relative to a maximum, is multiplied by at the end: first second. By itself 2^maximum may be
/// out of T's range where the result is not.
template <class T>
struct RowScale {
  T first, second = 1;
};

/// 1 over the sum of a row, or 2^maximum for a raw one. A row without keys, whose sum is 0, becomes 0.
template <class T>
RowScale<T> row_scale(Rows rows, std::type_identity_t<double> maximum, T sum) {
  constexpr double kMost = std::numeric_limits<T>::max_exponent - 2;
  if (sum == 0) return {0};
  if (rows == Rows::normalized) return {1 / sum};
  const double once = std::clamp(maximum, -kMost, kMost), again = std::clamp(maximum - once, -kMost, kMost);
  return {static_cast<T>(std::exp2(once)), static_cast<T>(std::exp2(again))};
}

/// What the rows of a strip are multiplied by.
template <class T>
struct RowScales {
  alignas(64) T first[array_size(kTileWidth<T>)], second[array_size(kTileWidth<T>)];
  bool twice = false;  ///< whether any second_i is not 1

  void set(Index i, const RowScale<T>& scale) {
    first[i] = scale.first;
    second[i] = scale.second;
    twice = twice || scale.second != 1;
  }
};

/// What is known of rows of weights after some keys, one row a lane: the weights are 2^maximum times those that sum
/// adds up. base: what scores are relative to, see far_pairs.hpp.
template <class T>
struct RowStatistics {
  T *maximum, *sum, *base;
};

/// The maximum of two states together: a state of sum 0 has none.
template <class T>
T merged_maximum(T maximum, T sum, T other_maximum, T other_sum) {
  if (other_sum == 0) return maximum;
  return sum == 0 ? other_maximum : std::max(maximum, other_maximum);
}

/// What a state is multiplied by to be relative to another maximum.
template <class T>
T merge_factor(T maximum, T sum, T merged) {
  return sum == 0 ? T(0) : std::exp2(maximum - merged);
}

/// log of a sum relative to a maximum, -infinity for a row without keys.
template <class T>
inline T row_log_sum(T maximum, T sum) {
  return sum == 0 ? -std::numeric_limits<T>::infinity() : std::numbers::ln2_v<T> * (maximum + std::log2(sum));
}

template <class T>
struct Product;
template <class T>
class FarPairs;
template <class T>
const FarPairs<T>* make_far_pairs(const Product<T>& product, Scratch& scratch);

/// A kernel's product with inputs, which must outlive it. bounded: the kernel is at most 1.
template <class T>
struct Product {
  const Sources<T>& in;
  LogKernel<T> kernel;
  CausalLimits limits;
  Rows rows;
  bool bounded;
  Maximum maximum;
  Partition partition;
  const FarPairs<T>* (*make_far)(const Product&, Scratch&) = nullptr;  ///< null where no pair is mended

  const FarPairs<T>* far_pairs(Scratch& scratch) const {
    return make_far == nullptr ? nullptr : make_far(*this, scratch);
  }

  /// log2 of what a query's weights are multiplied by in kappa: they are relative to its origin. query_bias: -bias
  /// |q|^2, what log2 kappa has beyond the score, plus the base of that.
  double origin(Index query, T query_bias) const {
    return static_cast<double>(query_bias) + std::numbers::log2e * static_cast<double>(kernel.bias_origins.of(query));
  }

  /// What the weighted sums of so many queries, a multiple of kLanes, from the given one on, are multiplied by at the
  /// end. norm: bias |q|^2 of each.
  [[gnu::noinline]] void set_scales(Index query, const RowStatistics<T>& of, const T* norm, Index lanes,
                                    RowScales<T>* scales) const {
    for (Index p = 0; p < lanes; p += kLanes<T>) {  // a row without keys has sum 0 and weighted 0, and stays 0
      const auto divisor = max(load(of.sum + p), broadcast(std::numeric_limits<T>::min()));
      store(scales->first + p, broadcast(T(1)) / (rows == Rows::normalized ? divisor : broadcast(T(1))));
    }
    if (rows == Rows::normalized || maximum == Maximum::none) return;
    for (Index i = 0; i < lanes && query + i < in.q.rows(); ++i) {
      const double maximum_of_kernel = kernel_maximum(of.maximum[i], static_cast<double>(of.base[i] - norm[i]));
      scales->set(i, row_scale(rows, maximum_of_kernel + origin(query + i, T(0)), of.sum[i]));
    }
  }

  /// Log-sums of so many queries from the given one on.
  [[gnu::noinline]] void write_log_sums(const LogSums<T>& to, Index query, const RowStatistics<T>& of, const T* norm,
                                        Index count) const {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    for (Index i = 0; i < count; ++i) {
      const bool keeps = keeps_query(in, query + i);
      if (to.relative != nullptr) {
        to.relative[query + i] = {keeps ? row_log_sum(of.maximum[i], of.sum[i]) : kNone, of.base[i]};
      }
      if (to.absolute == nullptr) continue;
      const double maximum_of_kernel = kernel_maximum(of.maximum[i], static_cast<double>(of.base[i] - norm[i]));
      const double log_sum = row_log_sum(maximum_of_kernel, static_cast<double>(of.sum[i])) +
                             static_cast<double>(kernel.bias_origins.of(query + i));
      to.absolute[query + i] = keeps ? static_cast<T>(log_sum) : kNone;
    }
  }

  /// log2 of the largest weight of a row but for the origin of key biases: not above 0 where the kernel is at most 1,
  /// which rounding must not hide where squares are large. query_bias may be more precise than the kernels'.
  double kernel_maximum(T relative, double query_bias) const {
    const double maximum_so_far = static_cast<double>(relative) + query_bias;
    return bounded ? std::min(maximum_so_far, 0.0) : maximum_so_far;
  }

  /// The maximum of a row state: as near to the absolute one as T holds, which a large bias may make coarse; the
  /// weights are multiplied by scale, so that they are relative to just that. query_bias as in kernel_maximum.
  T state_maximum(Index query, T relative, T sum, double query_bias, T* scale) const {
    *scale = 1;
    if (sum == 0) return kNoMaximum<T>;
    if (maximum == Maximum::none) return 0;
    const auto bias = static_cast<double>(kernel.bias_origins.of(query));
    const double origin = std::numbers::log2e * bias,
                 rest = std::fma(std::numbers::log2e, bias, -origin);  // a product, and what it lacks
    const double beyond = kernel_maximum(relative, query_bias);
    constexpr auto kLargest = static_cast<double>(std::numeric_limits<T>::max());
    const auto rounded = static_cast<T>(std::clamp(origin, -kLargest, kLargest));
    if (!(std::abs((origin - static_cast<double>(rounded)) + rest) < kMostStateScale)) {
      // Unequal origins of this size are too far apart for one to matter beside the other, so the rounded one stands
      // for its origin.
      *scale = static_cast<T>(std::exp2(std::clamp(beyond, -kMostStateScale, kMostStateScale)));
      return rounded;
    }
    const auto absolute = static_cast<T>(origin + beyond);
    const double lost = (origin - static_cast<double>(absolute)) + beyond + rest;
    if (std::abs(lost) < kMostStateScale) *scale = static_cast<T>(std::exp2(lost));  // else scores have no digits left
    return absolute;
  }

  static constexpr double kMostStateScale = std::numeric_limits<T>::max_exponent / 4;  ///< log2 of it
};

inline constexpr std::string_view kMatmulName = "kernel_matmul";

/// The product behind a kernel and its inputs. Raw rows of a kernel that is bounded by 1 need no maximum, unless keys
/// have a bias, or sums are wanted: those may underflow.
template <ScoreKernel Kernel, class T>
Product<T> make_product(const Kernel& kernel, const Sources<T>& in, Maximum raw_rows, Index workers, Scratch& scratch) {
  const ScoreParameters parameters = score_parameters(kernel, in.q.cols());
  check_kernel<T>(kMatmulName, kernel, in.q.cols());
  const bool needs_no_maximum =
      parameters.bounded() && in.key_bias.empty() && in.alibi_slope == 0 && parameters.rows == Rows::raw;
  Product<T> product{.in = in,
                     .kernel = LogKernel<T>::of(parameters),
                     .limits = CausalLimits::of_inputs(in),
                     .rows = parameters.rows,
                     .bounded = parameters.bounded(),
                     .maximum = needs_no_maximum ? raw_rows : Maximum::running,
                     .partition = Partition::of<T>(in.q.rows(), in.k.rows(), in.q.cols(), in.v.cols(), workers)};
  product.kernel.slope = static_cast<T>(in.alibi_slope * std::numbers::log2e);
  product.kernel.bias_origins = BiasOrigins<T>::of_inputs(in, scratch);
  if constexpr (kMayHaveBias<Kernel>) {
    if (parameters.gaussian()) {
      product.kernel.center = choose_center(in, scratch);
      if (product.kernel.bias != 0) product.make_far = &make_far_pairs<T>;
    }
  }
  return product;
}

}  // namespace attn::detail
