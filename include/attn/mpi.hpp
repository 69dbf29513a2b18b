/// Attention of sequences that are longer than a machine: tokens spread over the ranks of MPI. Needs MPI.
#pragma once

#include <attn/engine/requirements.hpp>

#if !__has_include(<mpi.h>)
#error "attn/mpi.hpp needs MPI: compile with mpicxx (CMake: link attn::mpi)"
#include <the_error_above_says_why>
#endif

#include <attn/approximator.hpp>
#include <attn/context.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/exact.hpp>
#include <attn/mpi/multipole.hpp>
#include <attn/mpi/nystrom.hpp>
#include <attn/mpi/ranks.hpp>
#include <attn/mpi/shares.hpp>
#include <attn/mpi/shifted_nystrom.hpp>
#include <attn/mpi/skyformer.hpp>

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace attn {

/// A method that distributed_forward takes: ExactAttention of any kernel, Multipole of the library's kernels, Nystrom
/// and ShiftedNystrom with SegmentMeans, Skyformer and LiftedSoftmax with UniformSample or StridedSample.
template <class Method>
concept DistributedMethod = requires { typename detail::Distributed<Method>::Saved; };

/// One that distributed_backward takes as well: all of these but Multipole.
template <class Method>
concept DistributedTraining = DistributedMethod<Method> && requires { &detail::Distributed<Method>::backward; };

/// What distributed_backward needs of distributed_forward, on each rank its own: made once, then reused from step to
/// step.
template <DistributedMethod Method>
using DistributedSaved = typename detail::Distributed<Method>::Saved;

/// Rows [first, first + count) of a sequence.
struct Share {
  Index first;  ///< the first row
  Index count;  ///< how many there are
};

/// A rank's rows of n tokens, of which each rank has as many.
inline Share even_share(Index n, int ranks, int rank) {
  const detail::Range rows = detail::nth_part(n, ranks, rank);
  return {rows.first, rows.last - rows.first};
}

/// A rank's rows of n tokens under a causal mask, where a later query meets more keys: rank r begins at row
/// n sqrt(r / ranks), so that all ranks have as many pairs to compute.
inline Share causal_share(Index n, int ranks, int rank) {
  const auto begin = [&](int of) {
    return static_cast<Index>(std::llround(static_cast<double>(n) * std::sqrt(static_cast<double>(of) / ranks)));
  };
  return {begin(rank), begin(rank + 1) - begin(rank)};
}

namespace detail {

/// The checks of a rank's own share. Of the ranks together at least one has queries, and one has keys.
template <class Method, class T>
void check_share(const Method& method, const Inputs<T>& in, Context& context) {
  check_inputs(Method::kName, in, 0, 0);
  Method::kMasks.check(Method::kName, in);
  constexpr bool kCausal = requires { Distributed<Method>::kCausal; };
  if (const char* const what = MaskSupport{.causal = kCausal, .key_bias = true}.lacks(in); what != nullptr) {
    refuse(Method::kName, "%s are not supported over MPI", what);
  }
  Scratch scratch = context.scratch();
  wide_method(method).check(arithmetic_sources(in, scratch));
}

template <class Method, class T>
std::uint64_t fingerprint(const Method& method, const Inputs<T>& in) {
  Fingerprint print(Method::kName);
  print.add(static_cast<std::uint64_t>(sizeof(T)));
  print.add(static_cast<std::uint64_t>(std::is_same_v<T, Eigen::half>));
  Distributed<Method>::add_options(method, in.k.cols(), print);
  return print.value();
}

/// body(shares, agreement), once what check throws on any rank has been thrown on all of them, and shares fit together.
template <class Method, class T, class Check, class Body>
void run_on_shares(const Method& method, const Inputs<T>& in, MPI_Comm communicator, Context& context,
                   const Check& check, const Body& body) {
  const Ranks ranks(communicator);
  Agreement agreement(ranks);
  Scratch scratch = context.scratch();
  std::optional<Shares> shares;
  agreement.guard([&] {
    check_share(method, in, context);
    check();
    shares.emplace(ranks, scratch);
  });
  agreement.settle();
  shares->gather(fingerprint(method, in), in);
  shares->check(Method::kName);
  body(*shares, agreement);
}

template <class Method, class T>
void run_distributed_forward(const Method& method, const Inputs<T>& in, const MatrixRef<T>& out, MPI_Comm communicator,
                             Context& context, DistributedSaved<Method>* saved) {
  run_on_shares(
      method, in, communicator, context, [&] { check_results(Method::kName, in, out); },
      [&](const Shares& shares, Agreement& agreement) {
        Distributed<Method>::forward(method, in, out, shares, agreement, context, saved);
      });
}

}  // namespace detail

/// out <- this rank's rows of attention by a method over the tokens of all ranks. A collective call: each rank of the
/// communicator passes its own share, a contiguous part of the sequence, in the order of ranks: q (n_q, d), k (n_k, d),
/// v (n_k, d_v), its entries of the masks and key biases, and out (n_q, d_v). Shares may be of any size, 0 included,
/// and those of q of other sizes than those of k; masks and biases that a rank leaves out keep its rows, and are 0.
/// Causal limits count all ranks' rows; windows, offsets and slopes are refused. Results are a single process's to
/// rounding (Multipole's to its error, for each rank's keys have clusters of their own), and the same to the bit at
/// every run with the same shares on the same machines. Where any rank fails, all throw the same: std::invalid_argument
/// when shapes disagree, on a rank or between ranks, an option is out of range or differs between ranks, or inputs are
/// not supported, with the rank in its text; std::bad_alloc. MPI must be initialised, with MPI_THREAD_FUNNELED where
/// the context has threads; messages of tags 0x61 to 0x64 on this communicator are the call's own. What is sent:
/// docs/distributed.md.
template <DistributedMethod Method>
void distributed_forward(const Method& method, const Inputs<typename Method::Scalar>& in,
                         MatrixRef<typename Method::Scalar> out, MPI_Comm communicator, Context& context) {
  detail::run_distributed_forward(method, in, out, communicator, context, nullptr);
}

/// The same for training.
template <DistributedTraining Method>
void distributed_forward(const Method& method, const Inputs<typename Method::Scalar>& in,
                         MatrixRef<typename Method::Scalar> out, MPI_Comm communicator, Context& context,
                         DistributedSaved<Method>& saved) {
  detail::run_distributed_forward(method, in, out, communicator, context, &saved);
}

/// gradients <- those by this rank's q, k and v, for its rows of dout (n_q, d_v), the gradient of a loss by out: for
/// the inputs, the out and the saved of that distributed_forward. A collective call, with errors as there.
template <DistributedTraining Method>
void distributed_backward(const Method& method, const Inputs<typename Method::Scalar>& in,
                          ConstMatrixRef<typename Method::Scalar> out, ConstMatrixRef<typename Method::Scalar> dout,
                          const DistributedSaved<Method>& saved, const Gradients<typename Method::Scalar>& gradients,
                          MPI_Comm communicator, Context& context) {
  detail::run_on_shares(
      method, in, communicator, context,
      [&] {
        detail::check_gradients(Method::kName, in, out, dout, gradients);
        detail::Distributed<Method>::check_saved(in, saved);
      },
      [&](const detail::Shares& shares, detail::Agreement& agreement) {
        detail::Distributed<Method>::backward(method, in, out, dout, saved, gradients, shares, agreement, context);
      });
}

}  // namespace attn
