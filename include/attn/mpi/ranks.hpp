/// The ranks of a communicator: how they end together where one fails, and reductions in an order that the number of
/// ranks alone fixes.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/rows.hpp>
#include <attn/matrix.hpp>

#include <mpi.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace attn::detail {

/// Throws unless a call of MPI has succeeded, where the communicator's error handler returns at all.
inline void check_mpi(int code) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw std::runtime_error("MPI: " + std::string(text, static_cast<std::size_t>(length)));
}

/// This process among those of a communicator.
struct Ranks {
  explicit Ranks(MPI_Comm of) : communicator(of) {
    check_mpi(MPI_Comm_rank(communicator, &rank));
    check_mpi(MPI_Comm_size(communicator, &count));
  }

  /// The rank so many places after another one, or before it where steps is negative, in a ring of all.
  int after(int other, int steps) const { return ((other + steps) % count + count) % count; }

  MPI_Comm communicator;
  int rank = 0, count = 1;
};

/// What messages are made of: with more than a byte at a time, an int counts enough of them.
struct alignas(64) Line {
  std::byte bytes[64];
};

/// Line as a type of MPI.
class LineType {
 public:
  LineType() {
    check_mpi(MPI_Type_contiguous(sizeof(Line), MPI_BYTE, &type_));
    check_mpi(MPI_Type_commit(&type_));
  }
  LineType(const LineType&) = delete;
  LineType& operator=(const LineType&) = delete;
  ~LineType() { MPI_Type_free(&type_); }

  MPI_Datatype get() const { return type_; }

 private:
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

/// How many lines n elements take.
template <class T>
Index lines_of(Index n) {
  constexpr Index kSize = sizeof(T), kLine = sizeof(Line);
  return (n * kSize + kLine - 1) / kLine;
}

/// Memory of a message, cut into parts of several types, each from a new line on.
class Parcel {
 public:
  explicit Parcel(Line* lines) : next_(lines) {}

  template <class T>
  T* take(Index n) {
    T* const part = reinterpret_cast<T*>(next_);
    next_ += lines_of<T>(n);
    return part;
  }

  template <class T>
  MatrixRef<T> matrix(Index rows, Index cols) {
    return {take<T>(rows * cols), rows, cols, cols};
  }

 private:
  Line* next_;
};

/// Errors that ranks share: what may throw on one of them runs in guard, and settle, which all call, throws on all what
/// the first rank has that failed. What is between the two goes on as if nothing had happened, so that no rank waits
/// for a message that another one does not send.
class Agreement {
 public:
  explicit Agreement(const Ranks& ranks) : ranks_(ranks) {}

  /// Runs body, unless one has thrown on this rank.
  template <class Body>
  void guard(const Body& body) {
    if (exception_ != nullptr) return;
    try {
      body();
    } catch (...) {
      exception_ = std::current_exception();
    }
  }

  void settle() {
    const int own = exception_ == nullptr ? ranks_.count : ranks_.rank;
    int first = own;
    check_mpi(MPI_Allreduce(&own, &first, 1, MPI_INT, MPI_MIN, ranks_.communicator));
    if (first == ranks_.count) return;
    Failure failure{};
    if (first == ranks_.rank) failure = describe();
    check_mpi(MPI_Bcast(&failure, sizeof failure, MPI_BYTE, first, ranks_.communicator));
    raise(failure);
  }

 private:
  enum class Kind : int { invalid_argument, bad_alloc, other };

  struct Failure {
    Kind kind;
    char text[1100];
  };

  Failure describe() const {
    const auto failure = [&](Kind kind, const char* what) {
      Failure result{kind, ""};
      std::snprintf(result.text, sizeof result.text, "rank %d: %s", ranks_.rank, what);
      return result;
    };
    try {
      std::rethrow_exception(exception_);
    } catch (const std::invalid_argument& e) {
      return failure(Kind::invalid_argument, e.what());
    } catch (const std::bad_alloc& e) {
      return failure(Kind::bad_alloc, e.what());
    } catch (const std::exception& e) {
      return failure(Kind::other, e.what());
    } catch (...) {
      return failure(Kind::other, "an exception of no known type");
    }
  }

  [[noreturn]] static void raise(const Failure& failure) {
    if (failure.kind == Kind::bad_alloc) throw std::bad_alloc();
    if (failure.kind == Kind::invalid_argument) throw std::invalid_argument(failure.text);
    throw std::runtime_error(failure.text);
  }

  const Ranks& ranks_;
  std::exception_ptr exception_{};
};

/// own, on every rank, <- what all of them combine to: combine() is to add received to own. A binary tree, in which
/// each rank but the first sends its own once; then the first one's goes to all.
template <class Combine>
void reduce(const Ranks& ranks, std::span<Line> own, std::span<Line> received, const Combine& combine) {
  constexpr int kTag = 0x61;
  const LineType line;
  const int lines = static_cast<int>(own.size());
  for (int step = 1; step < ranks.count; step *= 2) {
    if ((ranks.rank & step) != 0) {
      check_mpi(MPI_Send(own.data(), lines, line.get(), ranks.rank - step, kTag, ranks.communicator));
      break;
    }
    if (ranks.rank + step >= ranks.count) continue;
    check_mpi(
        MPI_Recv(received.data(), lines, line.get(), ranks.rank + step, kTag, ranks.communicator, MPI_STATUS_IGNORE));
    combine();
  }
  check_mpi(MPI_Bcast(own.data(), lines, line.get(), 0, ranks.communicator));
}

/// A matrix in memory that ranks can reduce, and beside it that of what arrives.
template <class T>
class ReducibleMatrix {
 public:
  ReducibleMatrix(Index rows, Index cols, Scratch& scratch)
      : own_(scratch.array<Line>(lines_of<T>(rows * cols))),
        received_(scratch.array<Line>(lines_of<T>(rows * cols))),
        matrix(Parcel(own_.data()).matrix<T>(rows, cols)) {
    set_zero(matrix);
  }

  /// matrix <- the sum of all ranks'.
  void add_up(const Ranks& ranks) const {
    reduce(ranks, own_, received_,
           [&] { add_row(T(1), reinterpret_cast<const T*>(received_.data()), matrix.data(), matrix.size()); });
  }

 private:
  std::span<Line> own_, received_;

 public:
  MatrixRef<T> matrix;
};

}  // namespace attn::detail
