/// What the tests over MPI share: the ranks, how tokens are cut among them, and what they send.
#pragma once

#include <attn/matrix.hpp>
#include <attn/mpi.hpp>

#include "common/inputs.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <mpi.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace world {

using attn::Causal;
using attn::Index;
using attn::Inputs;
using attn::Mask;
using attn::Matrix;
using attn::Share;

inline const MPI_Comm kAll = MPI_COMM_WORLD;

inline int rank() {
  int result = 0;
  MPI_Comm_rank(kAll, &result);
  return result;
}

inline int count() {
  int result = 0;
  MPI_Comm_size(kAll, &result);
  return result;
}

/// Payload that this rank has handed to MPI since the last call of reset_bytes.
std::size_t bytes_sent();
void reset_bytes();

/// Lets allocations on this rank fail while it lives.
class FailingMemory {
 public:
  FailingMemory();
  ~FailingMemory();
  FailingMemory(const FailingMemory&) = delete;
  FailingMemory& operator=(const FailingMemory&) = delete;
};

/// How rows are cut: as evenly as they go, for causal masks, unevenly with nothing on the first rank, or all on the
/// last.
enum class Cut { even, causal, uneven, last };

inline Share cut(Index n, Cut how, int rank) {
  const int ranks = count();
  const auto begin = [&](int of) { return n * of * of / (ranks * ranks); };
  switch (how) {
    case Cut::even:
      return attn::even_share(n, ranks, rank);
    case Cut::causal:
      return attn::causal_share(n, ranks, rank);
    case Cut::uneven:
      return rank == 0 && ranks > 1 ? Share{0, 0}
             : rank == 1            ? Share{0, begin(2)}
                                    : Share{begin(rank), begin(rank + 1) - begin(rank)};
    default:
      return rank + 1 == ranks ? Share{0, n} : Share{0, 0};
  }
}

template <class T>
std::span<T> part(std::span<T> x, Share share) {
  return x.empty() ? x : x.subspan(static_cast<std::size_t>(share.first), static_cast<std::size_t>(share.count));
}

/// This rank's part of inputs that all ranks have whole.
template <class T>
Inputs<T> share_of(const Inputs<T>& in, Share queries, Share keys) {
  return {in.q.middleRows(queries.first, queries.count),
          in.k.middleRows(keys.first, keys.count),
          in.v.middleRows(keys.first, keys.count),
          {in.mask.causal, part(in.mask.keep_key, keys), part(in.mask.keep_query, queries)},
          part(in.key_bias, keys)};
}

/// Rows of a whole result are this rank's part of it: the largest difference, relative to the largest element of all.
template <class T>
void expect_share(const Matrix<T>& actual, const Matrix<T>& whole, Share share, double tolerance, const char* what) {
  double most = 0, largest = 0;
  for (Index i = 0; i < whole.size(); ++i) largest = std::max(largest, std::abs(static_cast<double>(whole.data()[i])));
  for (Index i = 0; i < share.count; ++i) {
    for (Index c = 0; c < whole.cols(); ++c) {
      const double x = std::abs(static_cast<double>(actual(i, c)) - static_cast<double>(whole(share.first + i, c)));
      most = std::max(most, std::isnan(x) ? std::numeric_limits<double>::infinity() : x);
    }
  }
  EXPECT_LE(most, tolerance * (largest > 0 ? largest : 1)) << what << " on rank " << rank();
}

/// A matrix of NaN.
template <class T>
Matrix<T> unset(Index rows, Index cols) {
  Matrix<T> m(rows, cols);
  std::fill_n(m.data(), m.size(), static_cast<T>(test::kNaN<float>));
  return m;
}

/// A method over all ranks gives what it gives in one process.
template <class Method>
void expect_same(const Method& method, const Inputs<typename Method::Scalar>& in, Cut of_queries, Cut of_keys,
                 double tolerance) {
  using T = typename Method::Scalar;
  const Share queries = cut(in.q.rows(), of_queries, rank()), keys = cut(in.k.rows(), of_keys, rank());
  attn::Context context;
  Matrix<T> whole(in.q.rows(), in.v.cols());
  method.forward(in, whole, context);
  Matrix<T> out = unset<T>(queries.count, in.v.cols()), again = unset<T>(queries.count, in.v.cols());
  attn::distributed_forward(method, share_of(in, queries, keys), out, kAll, context);
  attn::distributed_forward(method, share_of(in, queries, keys), again, kAll, context);
  expect_share(out, whole, queries, tolerance, "out");
  EXPECT_TRUE(out.size() == 0 || test::bitwise_equal(out, again)) << "a second run has other bits";
}

/// The same of its gradients.
template <class Method>
void expect_same_gradients(const Method& method, const Inputs<typename Method::Scalar>& in, Cut of_queries, Cut of_keys,
                           double tolerance) {
  using T = typename Method::Scalar;
  const Index n_q = in.q.rows(), n_k = in.k.rows(), d = in.q.cols(), d_v = in.v.cols();
  const Share queries = cut(n_q, of_queries, rank()), keys = cut(n_k, of_keys, rank());
  attn::Context context;
  const Matrix<T> dout = test::Random(77).normal(n_q, d_v).template cast<T>();
  Matrix<T> whole(n_q, d_v), whole_dq(n_q, d), whole_dk(n_k, d), whole_dv(n_k, d_v);
  typename Method::Saved whole_saved;
  method.forward(in, whole, context, whole_saved);
  method.backward(in, whole, dout, whole_saved, {whole_dq, whole_dk, whole_dv}, context);
  Matrix<T> out = unset<T>(queries.count, d_v), dq = unset<T>(queries.count, d), dk = unset<T>(keys.count, d),
            dv = unset<T>(keys.count, d_v);
  const Inputs<T> own = share_of(in, queries, keys);
  attn::DistributedSaved<Method> saved;
  attn::distributed_forward(method, own, out, kAll, context, saved);
  attn::distributed_backward(method, own, out, dout.middleRows(queries.first, queries.count), saved, {dq, dk, dv}, kAll,
                             context);
  expect_share(out, whole, queries, tolerance, "out");
  expect_share(dq, whole_dq, queries, tolerance, "dq");
  expect_share(dk, whole_dk, keys, tolerance, "dk");
  expect_share(dv, whole_dv, keys, tolerance, "dv");
}

/// What call throws on this rank: "bad_alloc", what() of another exception, or "no error".
template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::bad_alloc&) {
    return "bad_alloc";
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

template <class T>
inline constexpr double kTolerance = std::is_same_v<T, double>  ? 1e-12
                                     : std::is_same_v<T, float> ? 5e-6
                                                                : 2e-3;

}  // namespace world
