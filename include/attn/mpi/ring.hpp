/// Shares that travel from rank to rank, round a ring, while each rank computes with the one that it has.
#pragma once

#include <attn/context.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/ranks.hpp>

#include <algorithm>
#include <utility>

namespace attn::detail {

/// A message that arrives and one that leaves, while this rank computes.
class Exchange {
 public:
  explicit Exchange(const Ranks& ranks) : ranks_(ranks) {}
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  void receive(int from, int tag, Line* to, Index lines) {
    check_mpi(MPI_Irecv(to, static_cast<int>(lines), line_.get(), from, tag, ranks_.communicator, &requests_[0]));
  }

  void send(int to, int tag, const Line* from, Index lines) {
    check_mpi(MPI_Isend(from, static_cast<int>(lines), line_.get(), to, tag, ranks_.communicator, &requests_[1]));
  }

  /// Lets MPI move on: many implementations do so within their own calls alone.
  void progress() {
    int done = 0;
    check_mpi(MPI_Testall(2, requests_, &done, MPI_STATUSES_IGNORE));
  }

  void wait() { check_mpi(MPI_Waitall(2, requests_, MPI_STATUSES_IGNORE)); }
  void wait_for_arrival() { check_mpi(MPI_Wait(&requests_[0], MPI_STATUS_IGNORE)); }
  void wait_for_departure() { check_mpi(MPI_Wait(&requests_[1], MPI_STATUS_IGNORE)); }

 private:
  const Ranks& ranks_;
  LineType line_;
  MPI_Request requests_[2] = {MPI_REQUEST_NULL, MPI_REQUEST_NULL};
};

/// The way of all shares: at each step every one moves to the rank after (or, where direction is -1, before), as far as
/// there is one that needs it. needs(owner, rank), the same on all ranks. At step s a rank has the share of the rank s
/// places back.
template <class Needs>
class Route {
 public:
  Route(const Ranks& ranks, int direction, const Needs& needs) : ranks_(ranks), direction_(direction), needs_(needs) {}

  const Ranks& ranks() const { return ranks_; }
  int next() const { return ranks_.after(ranks_.rank, direction_); }
  int previous() const { return ranks_.after(ranks_.rank, -direction_); }

  /// Whose share this rank has at a step.
  int owner(int step) const { return ranks_.after(ranks_.rank, -direction_ * step); }
  bool has(int step) const { return step < ranks_.count && step <= steps_of(owner(step)); }
  bool passes_on(int step) const { return step < steps_of(owner(step)); }

  /// How many steps a share takes.
  int steps_of(int owner) const {
    int steps = ranks_.count - 1;
    while (steps > 0 && !needs_(owner, ranks_.after(owner, direction_ * steps))) --steps;
    return steps;
  }

  /// Which rank has a share last.
  int last(int owner) const { return ranks_.after(owner, direction_ * steps_of(owner)); }

 private:
  const Ranks& ranks_;
  int direction_;
  const Needs& needs_;
};

/// The most lines of any share.
template <class Lines>
Index most_lines(const Ranks& ranks, const Lines& lines) {
  Index most = 0;
  for (int rank = 0; rank < ranks.count; ++rank) most = std::max(most, lines(rank));
  return most;
}

/// Two parcels, each for the largest share of any rank.
struct TravelMemory {
  TravelMemory(Index lines, Scratch& scratch)
      : own(scratch.elements<Line>(lines)), spare(scratch.elements<Line>(lines)) {}

  Line *own, *spare;
};

/// visit(step, lines of the share that this rank has, progress) for each share that it gets to see, its own first,
/// while that one is sent on and the next one arrives; progress() is to be called now and then. Errors of visit wait
/// until all is over; leave(step) follows it whether or not it has thrown. lines(rank): of its share.
template <class Needs, class Lines, class Visit, class Leave>
void travel(const Route<Needs>& route, TravelMemory memory, Agreement& agreement, const Lines& lines,
            const Visit& visit, const Leave& leave) {
  constexpr int kTag = 0x62;
  for (int step = 0; step < route.ranks().count; ++step) {
    Exchange exchange(route.ranks());
    if (route.has(step + 1)) exchange.receive(route.previous(), kTag, memory.spare, lines(route.owner(step + 1)));
    if (route.passes_on(step)) exchange.send(route.next(), kTag, memory.own, lines(route.owner(step)));
    if (route.has(step)) {
      agreement.guard([&] { visit(step, memory.own, [&] { exchange.progress(); }); });
      leave(step);
    }
    exchange.wait();
    std::swap(memory.own, memory.spare);
  }
}

}  // namespace attn::detail
