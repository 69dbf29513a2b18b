/// Matrices and views: what every method takes and returns. Row-major, one token a row.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/mask.hpp>

#include <Eigen/Core>

#include <concepts>
#include <span>
#include <type_traits>
#include <utility>

namespace attn {

using Eigen::Index;

/// A type that matrices may hold and that arithmetic does not use, which is in float.
template <class T>
concept NarrowScalar = std::same_as<T, Eigen::half> || std::same_as<T, Eigen::bfloat16>;

/// Row-major dynamic matrix: one token a row.
template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace detail {

/// What arithmetic on matrices of T is in.
template <class T>
using Arithmetic = std::conditional_t<NarrowScalar<T>, float, T>;

/// The Eigen type that M is or derives from.
template <class M>
using EigenType = std::remove_cvref_t<decltype(std::declval<const M&>().derived())>;

/// Elements between two rows; a column vector is a matrix of one column, whose rows are one element apart.
template <class M>
Index row_stride(const M& m) {
  if constexpr (M::IsRowMajor) {
    return m.outerStride();
  } else {
    return m.innerStride();
  }
}

/// Where the elements of x are, null if there are none.
template <class T>
T* data_or_null(std::span<T> x) {
  return x.empty() ? nullptr : x.data();
}

}  // namespace detail

/// An Eigen object whose rows lie contiguously in memory, so that it can be viewed without a copy: a Matrix, a Map, Ref
/// or Block of one, or a vector. A column-major matrix or an inner stride is refused at compile time, because
/// converting it would copy silently.
template <class M, class T>
concept RowMajorWithContiguousRows =
    std::same_as<typename detail::EigenType<M>::Scalar, T> &&
    bool(detail::EigenType<M>::Flags & Eigen::DirectAccessBit) &&
    bool(detail::EigenType<M>::IsRowMajor || detail::EigenType<M>::ColsAtCompileTime == 1) &&
    int(detail::EigenType<M>::InnerStrideAtCompileTime) == 1;

/// RowMajorWithContiguousRows that can be written to as well.
template <class M, class T>
concept WritableRowMajorWithContiguousRows =
    RowMajorWithContiguousRows<M, T> && !std::is_const_v<std::remove_reference_t<M>> && requires(M& m) {
      { m.data() } -> std::same_as<T*>;
    };

namespace detail {

/// @{ The reasons why an Eigen object cannot be viewed as rows of T; it has one of them at most.
template <class M, class T>
concept OfOtherScalar = !std::same_as<typename EigenType<M>::Scalar, T>;

template <class M, class T>
concept ExpressionOf =
    std::same_as<typename EigenType<M>::Scalar, T> && !(EigenType<M>::Flags & Eigen::DirectAccessBit);

template <class M, class T>
concept WithoutContiguousRows = std::same_as<typename EigenType<M>::Scalar, T> &&
                                bool(EigenType<M>::Flags & Eigen::DirectAccessBit) && !RowMajorWithContiguousRows<M, T>;
/// @}

/// An Eigen object that owns its elements, as a Matrix does and a view of one does not.
template <class M>
concept OwnsElements = std::derived_from<EigenType<M>, Eigen::PlainObjectBase<EigenType<M>>>;

}  // namespace detail

/// Read-only view of a row-major matrix with an outer stride; an Eigen::Map in every other respect. Does not own the
/// data.
template <class T>
class ConstMatrixRef : public Eigen::Map<const Matrix<T>, Eigen::Unaligned, Eigen::OuterStride<>> {
  using Map = Eigen::Map<const Matrix<T>, Eigen::Unaligned, Eigen::OuterStride<>>;

 public:
  /// View of (rows, cols) elements at data, row_stride elements from row to row. Not inlined: Eigen's checks of it
  /// would be compiled wherever a view is made.
  [[gnu::noinline]] ConstMatrixRef(const T* data, Index rows, Index cols, Index row_stride)
      : Map(data, rows, cols, Eigen::OuterStride<>(row_stride)) {}

  /// View of m, which must outlive it.
  template <RowMajorWithContiguousRows<T> M>
  ConstMatrixRef(const M& m)  // NOLINT: implicit, so that a Matrix can be passed as it is
      : ConstMatrixRef(m.data(), m.rows(), m.cols(), detail::row_stride(m.derived())) {}

  /// @{ What cannot be viewed without a copy. Compilers print the line of the function that is refused.
  template <detail::OfOtherScalar<T> M>
  ConstMatrixRef(const M&) = delete;  // of another type: attn::Matrix<T> y = x.template cast<T>();
  template <detail::ExpressionOf<T> M>
  ConstMatrixRef(const M&) = delete;  // an expression has no memory to view: attn::Matrix<T> y = expression;
  template <detail::WithoutContiguousRows<T> M>
  ConstMatrixRef(const M&) = delete;  // not row-major, as Eigen::MatrixXf is not: attn::Matrix<T> y = x;  (a copy)
  /// @}
};

/// Writable view of a row-major matrix with an outer stride; an Eigen::Map in every other respect. Does not own the
/// data.
template <class T>
class MatrixRef : public Eigen::Map<Matrix<T>, Eigen::Unaligned, Eigen::OuterStride<>> {
  using Map = Eigen::Map<Matrix<T>, Eigen::Unaligned, Eigen::OuterStride<>>;

 public:
  /// View of (rows, cols) elements at data, row_stride elements from row to row.
  [[gnu::noinline]] MatrixRef(T* data, Index rows, Index cols, Index row_stride)
      : Map(data, rows, cols, Eigen::OuterStride<>(row_stride)) {}

  /// View of m, which must outlive it.
  template <WritableRowMajorWithContiguousRows<T> M>
  MatrixRef(M&& m)  // NOLINT: implicit, and from a temporary Block or Map too
      : MatrixRef(m.data(), m.rows(), m.cols(), detail::row_stride(m.derived())) {}

  template <class M>
    requires(requires { typename detail::EigenType<M>; } && !WritableRowMajorWithContiguousRows<M, T> &&
             !std::same_as<std::remove_cvref_t<M>, MatrixRef>)
  MatrixRef(M&&) = delete;  // results need rows that can be written: an attn::Matrix<T>, not const, nor column-major

  /// Writable however the view itself is qualified, as for any pointer.
  T* data() const { return const_cast<T*>(Map::data()); }

  /// A view of the same elements.
  MatrixRef(const MatrixRef&) = default;
  using Map::operator=;
  /// Assigns the elements, as every Eigen view does.
  MatrixRef& operator=(const MatrixRef& other) {
    Map::operator=(other);
    return *this;
  }
};

/// A view that may be kept: of a matrix that has a name, or of what another view views. A ConstMatrixRef in every other
/// respect.
template <class T>
class KeptMatrixRef : public ConstMatrixRef<T> {
 public:
  /// As for a ConstMatrixRef.
  KeptMatrixRef(const T* data, Index rows, Index cols, Index row_stride)
      : ConstMatrixRef<T>(data, rows, cols, row_stride) {}

  /// What view views.
  KeptMatrixRef(const ConstMatrixRef<T>& view) : ConstMatrixRef<T>(view) {}  // NOLINT: implicit, as every view is

  /// View of m. Whatever else it may be converts too, so that compilers come to the reason why it cannot be viewed
  /// rather than find no function for a call with it in braces.
  template <class M>
    requires(requires { typename detail::EigenType<M>; } && !std::derived_from<M, ConstMatrixRef<T>>)
  KeptMatrixRef(const M& m)  // NOLINT: likewise
      : ConstMatrixRef<T>(m) {}

  template <detail::OwnsElements M>
    requires(!std::is_lvalue_reference_v<M>)
  KeptMatrixRef(M&&) = delete;  // a temporary ends before the view of it: give the matrix a name first
};

/// What attention reads. Entry a_j of key_bias multiplies key j's weight by exp(a_j); -infinity removes the key. With
/// an alibi_slope m, at least 0, the weight of a key that lies r rows before the last one that the causal mask lets the
/// query see is multiplied by exp(-m r) (Press et al. 2022).
template <class T>
struct Inputs {
  KeptMatrixRef<T> q;             ///< queries (n_q, d)
  KeptMatrixRef<T> k;             ///< keys (n_k, d)
  KeptMatrixRef<T> v;             ///< values (n_k, d_v)
  Mask mask{};                    ///< which keys each query sees; all of them unless given
  std::span<const T> key_bias{};  ///< log-weights (n_k), or empty
  double alibi_slope = 0;         ///< what weights fall by from row to row, 0: nothing; needs a causal mask
};

/// Inputs whose keys and values lie in a narrow type beside float queries and results, as in a cache of half the size;
/// all else as in those of float.
template <NarrowScalar Cache>
struct CacheInputs {
  KeptMatrixRef<float> q;             ///< queries (n_q, d)
  KeptMatrixRef<Cache> k;             ///< keys (n_k, d)
  KeptMatrixRef<Cache> v;             ///< values (n_k, d_v)
  Mask mask{};                        ///< which keys each query sees
  std::span<const float> key_bias{};  ///< log-weights (n_k), or empty
  double alibi_slope = 0;             ///< as in Inputs
};

/// Where a backward pass writes the gradients by its inputs: overwritten, not added to. Must not overlap the inputs or
/// one another. Dropped queries and keys get zeros.
template <class T>
struct Gradients {
  MatrixRef<T> dq;  ///< by q (n_q, d)
  MatrixRef<T> dk;  ///< by k (n_k, d)
  MatrixRef<T> dv;  ///< by v (n_k, d_v)
};

}  // namespace attn
