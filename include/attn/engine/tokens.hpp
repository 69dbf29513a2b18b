/// Rows of tokens as the kernels read and write them: in place, or, where memory holds a narrower type, converted a row
/// at a time.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/row_products.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <span>

namespace attn {

template <class T>
struct RowStates;

namespace detail {

/// to <- from, n elements.
template <NarrowScalar T>
void convert_row(const T* from, float* to, Index n) {
  const Index whole = n - n % kLanes<float>;
  for (Index i = 0; i < whole; i += kLanes<float>) store_unaligned(to + i, widen(from + i));
  std::transform(from + whole, from + n, to + whole, [](T x) { return static_cast<float>(x); });
}

/// to <- from, n elements, rounded to nearest.
template <NarrowScalar T>
void convert_row(const float* from, T* to, Index n) {
  const Index whole = n - n % kLanes<float>;
  for (Index i = 0; i < whole; i += kLanes<float>) store_narrow(to + i, load_unaligned(from + i));
  T lanes[kLanes<float>];
  store_narrow(lanes, load_row(from, whole, n));
  std::copy_n(lanes, n - whole, to + whole);
}

/// Rows in memory, whatever their type.
struct MemoryRows {
  const char* data;
  Index rows, row_bytes, stride_bytes;

  template <class M>
  [[gnu::noinline]] static MemoryRows of(const M& m) {
    constexpr Index kBytes = sizeof(typename M::Scalar);
    return {reinterpret_cast<const char*>(m.data()), m.rows(), m.cols() * kBytes, m.outerStride() * kBytes};
  }

  const char* row(Index i) const { return data + i * stride_bytes; }

  MemoryRows reversed() const { return {row(rows - 1), rows, row_bytes, -stride_bytes}; }
};

/// Rows of a matrix and, where they are not in place, how one is converted.
template <class Convert>
class ConvertibleRows {
 public:
  Index rows() const { return memory_.rows; }
  Index cols() const { return cols_; }
  const MemoryRows& memory() const { return memory_; }
  bool in_place() const { return convert_ == nullptr; }

 protected:
  template <class M>
  ConvertibleRows(const M& m, Convert convert) : memory_(MemoryRows::of(m)), cols_(m.cols()), convert_(convert) {}

  MemoryRows memory_;
  Index cols_;
  Convert convert_;
};

/// Rows to read as T.
template <class T>
class TokenRows : public ConvertibleRows<void (*)(const char* row, T* to, Index n)> {
  using Base = ConvertibleRows<void (*)(const char*, T*, Index)>;

 public:
  template <RowMajorWithContiguousRows<T> M>
  TokenRows(const M& m)  // NOLINT: implicit, as a view of it would be
      : Base(ConstMatrixRef<T>(m), nullptr) {}

  template <NarrowScalar Narrow>
    requires std::same_as<T, float>
  explicit TokenRows(const ConstMatrixRef<Narrow>& m)
      : Base(m, [](const char* row, T* to, Index n) { convert_row(reinterpret_cast<const Narrow*>(row), to, n); }),
        products_(&kRowProducts<T, Narrow>) {}

  /// Products with rows as they lie, whatever their type.
  const RowProducts<T>& products() const { return this->in_place() ? kRowProducts<T, T> : *products_; }

  /// All rows as they lie, where they are in place.
  ConstMatrixRef<T> matrix() const { return {data(), this->rows(), this->cols(), outerStride()}; }
  /// The first element, where rows are in place.
  const T* data() const { return reinterpret_cast<const T*>(this->memory_.data); }
  Index outerStride() const { return this->memory_.stride_bytes / Index{sizeof(T)}; }

  /// Row i, in place or in buffer (cols elements).
  const T* row(Index i, T* buffer) const {
    if (this->in_place()) return data() + i * outerStride();
    this->convert_(this->memory_.row(i), buffer, this->cols_);
    return buffer;
  }

  /// Row i where it lies, null where that is not of T.
  const T* row_or_null(Index i) const { return this->in_place() ? data() + i * outerStride() : nullptr; }

  [[gnu::noinline]] void copy_row(Index i, T* to) const {
    const T* from = row(i, to);
    if (from != to) std::copy_n(from, this->cols_, to);
  }

  /// The rows from the last to the first.
  TokenRows reversed() const {
    TokenRows all = *this;
    all.memory_ = this->memory_.reversed();
    return all;
  }

  TokenRows middle_rows(Index first, Index count) const {
    TokenRows some = *this;
    some.memory_.data = this->memory_.row(first);
    some.memory_.rows = count;
    return some;
  }

 private:
  const RowProducts<T>* products_ = nullptr;  ///< null where rows are in place
};

/// Rows to write as T.
template <class T>
class ResultRows : public ConvertibleRows<void (*)(const T* from, char* row, Index n)> {
  using Base = ConvertibleRows<void (*)(const T*, char*, Index)>;

 public:
  ResultRows(const MatrixRef<T>& m)  // NOLINT: implicit, as a view of it would be
      : Base(m, nullptr) {}

  template <NarrowScalar Narrow>
    requires std::same_as<T, float>
  explicit ResultRows(const MatrixRef<Narrow>& m)
      : Base(m, [](const T* from, char* row, Index n) { convert_row(from, reinterpret_cast<Narrow*>(row), n); }) {}

  /// The rows from the last to the first.
  ResultRows reversed() const {
    ResultRows all = *this;
    all.memory_ = this->memory_.reversed();
    return all;
  }

  /// All rows as they lie, where they are in place.
  MatrixRef<T> matrix() const {
    return {reinterpret_cast<T*>(row(0)), this->rows(), this->cols(), this->memory_.stride_bytes / Index{sizeof(T)}};
  }

  /// Where to write row i, in place or in buffer (cols elements); finish_row(i, that) is to follow.
  T* row(Index i, T* buffer) const { return this->in_place() ? reinterpret_cast<T*>(row(i)) : buffer; }
  void finish_row(Index i, const T* from) const {
    if (!this->in_place()) this->convert_(from, row(i), this->cols_);
  }

  /// Row i <- from.
  void set_row(Index i, const T* from) const {
    if (this->in_place()) std::copy_n(from, this->cols_, reinterpret_cast<T*>(row(i)));
    finish_row(i, from);
  }

  void set_zero() const {
    for (Index i = 0; i < this->rows(); ++i) std::fill_n(row(i), this->memory_.row_bytes, char{0});  // 0 of any type
  }

  ResultRows middle_rows(Index first, Index count) const {
    ResultRows some = *this;
    some.memory_.data = this->memory_.row(first);
    some.memory_.rows = count;
    return some;
  }

 private:
  char* row(Index i) const { return const_cast<char*>(this->memory_.row(i)); }
};

template <class T>
struct LogSums;
template <class T>
struct Product;
template <class T>
class StripKernel;
template <class T>
const StripKernel<T>& make_strip_kernel(const Product<T>& product, Scratch& scratch);
template <class T>
const StripKernel<T>& make_causal_strip_kernel(const Product<T>& product, Scratch& scratch);
template <class T>
void run_few(const Product<T>&, const ResultRows<T>&, const LogSums<T>&, Context&, Scratch&);
template <class T>
void run_few_partial(const Product<T>&, const RowStates<T>&, Context&, Scratch&);

/// The mask of Sources, and what it needs: programs compile the kernel of causal masks, and that of few queries, which
/// decode, only where a mask may be causal. Landmark methods, whose masks are RowMask, do not.
template <class T>
struct SourceMask : Mask {
  SourceMask(const Mask& mask)  // NOLINT: implicit, as the mask would be
      : Mask(mask),
        make_kernel(&make_causal_strip_kernel<T>),
        run_few(&detail::run_few<T>),
        run_few_partial(&detail::run_few_partial<T>) {}
  SourceMask(const RowMask& mask = {})  // NOLINT: likewise
      : Mask(mask), make_kernel(&make_strip_kernel<T>) {}

  const StripKernel<T>& (*make_kernel)(const Product<T>&, Scratch&);
  bool own_products = false;  ///< whether that kernel has faster ones than T's
  void (*run_few)(const Product<T>&, const ResultRows<T>&, const LogSums<T>&, Context&, Scratch&) = nullptr;
  void (*run_few_partial)(const Product<T>&, const RowStates<T>&, Context&, Scratch&) = nullptr;
};

/// Inputs as the kernels read them. heads: q has the queries of so many heads, one after another, for which the same
/// keys and masks count; keep_query is repeated.
template <class T>
struct Sources {
  TokenRows<T> q, k, v;
  SourceMask<T> mask{};
  std::span<const T> key_bias{};
  double alibi_slope = 0;
  Index heads = 1;
};

template <class In>
Index queries_of_head(const In& in) {
  if constexpr (requires { in.heads; }) return in.q.rows() / in.heads;
  return in.q.rows();
}

template <class T>
Sources<T> sources(const Inputs<T>& in) {
  return {in.q, in.k, in.v, in.mask, in.key_bias, in.alibi_slope};
}

/// x as a matrix: a view, or where it is not in place a copy.
template <class T>
ConstMatrixRef<T> whole_matrix(const TokenRows<T>& x, Scratch& scratch) {
  if (x.in_place()) return x.matrix();
  MatrixRef<T> copy = scratch.matrix<T>(x.rows(), x.cols());
  for (Index i = 0; i < x.rows(); ++i) x.copy_row(i, copy.row(i).data());
  return copy;
}

/// Which rows count: those that a mask keeps, without those of a bias of minus infinity. Null leaves all.
template <class T>
struct KeptRows {
  const std::uint8_t* keep;
  const T* bias;

  bool operator()(Index row) const {
    return (keep == nullptr || keep[row] != 0) && (bias == nullptr || !is_negative_infinity(bias[row]));
  }
};

template <class In>
auto kept_keys(const In& in) {
  return KeptRows<typename decltype(in.key_bias)::value_type>{data_or_null(in.mask.keep_key),
                                                              data_or_null(in.key_bias)};
}

template <class In>
auto kept_queries(const In& in) {
  return KeptRows<typename decltype(in.key_bias)::value_type>{data_or_null(in.mask.keep_query), nullptr};
}

template <class In>
inline bool keeps_key(const In& in, Index j) {
  return kept_keys(in)(j);
}

template <class In>
inline bool keeps_query(const In& in, Index i) {
  return kept_queries(in)(i);
}

template <class Keeps>
Index count_kept(Index n, const Keeps& keeps) {
  Index kept = 0;
  for (Index i = 0; i < n; ++i) kept += keeps(i) ? 1 : 0;
  return kept;
}

/// Rows of a matrix that will soon be read or written. Fetched into the cache a few at a time, between the steps of a
/// loop whose arithmetic hides the wait: the processor's own prefetching stops at the end of each 4 KiB page, which is
/// 16 rows of 64 floats.
class Prefetch {
 public:
  Prefetch() = default;

  /// The given rows of m, as far as m has them.
  [[gnu::noinline]] static Prefetch of(const MemoryRows& m, Range rows) {
    Prefetch prefetch;
    if (rows.first >= std::min(rows.last, m.rows)) return prefetch;
    prefetch.memory_ = {m.row(rows.first), std::min(rows.last, m.rows) - rows.first, m.row_bytes, m.stride_bytes};
    return prefetch;
  }

  /// The share of all rows that falls to steps [first, first + count) of a loop of so many steps.
  [[gnu::always_inline]] inline void fetch(Index first, Index count, Index steps) const {
    if (memory_.rows != 0) fetch({memory_.rows * first / steps, memory_.rows * std::min(first + count, steps) / steps});
  }

  /// All rows.
  void fetch() const { fetch({0, memory_.rows}); }

 private:
  static constexpr Index kLine = 64;

  /// Not inlined: all kernels call it.
  [[gnu::noinline]] void fetch(Range rows) const {
    for (Index row = rows.first; row < rows.last; ++row) {
      for (Index byte = 0; byte < memory_.row_bytes; byte += kLine) __builtin_prefetch(memory_.row(row) + byte, 0, 2);
    }
  }

  MemoryRows memory_{};
};

}  // namespace detail
}  // namespace attn
