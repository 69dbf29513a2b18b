/// Checks of row states at public entry points.
#pragma once

#include <attn/engine/checks.hpp>
#include <attn/engine/row_states.hpp>
#include <attn/matrix.hpp>

#include <array>
#include <span>
#include <string_view>
#include <type_traits>

namespace attn::detail {

template <class T>
std::array<Memory, 3> memory_of(const RowStates<T>& states) {
  return {Memory::of("weighted", states.weighted), Memory::of("maximum", states.maximum),
          Memory::of("sum", states.sum)};
}

/// states are those of the rows of in, which may have no keys and be of a narrower type, and overlap nothing.
template <class T, class S>
void check_partial(std::string_view who, const Inputs<T>& in, const RowStates<S>& states) {
  check_inputs(who, in, 0);
  check_states(who, states, in.q.rows(), in.v.cols());
  check_apart(who, memory_of(states), memory_of(in));
}

/// Both are of as many rows, and into overlaps nothing.
template <class T>
void check_merge(std::string_view who, const RowStates<T>& into, const RowStates<T>& from) {
  check_not_empty(who, "weighted", into.weighted);
  check_states(who, into, from.weighted.rows(), from.weighted.cols());
  check_states(who, from, into.weighted.rows(), into.weighted.cols());
  check_apart(who, memory_of(into), memory_of(from));
}

/// out has the shape of states and lse is empty or has an entry for each row; both overlap nothing, but that out may be
/// states.weighted itself.
template <class T, class S>
void check_finish(std::string_view who, const RowStates<S>& states, const MatrixRef<T>& out, std::span<S> lse) {
  check_not_empty(who, "out", out);
  check_states(who, states, out.rows(), out.cols());
  check_length(who, "lse", lse.size(), "out", out.rows());
  const std::array<Memory, 3> read = memory_of(states);
  const Memory results[] = {Memory::of("out", out), Memory::of("lse", lse)};
  const bool same_rows = out.rows() == 1 || out.outerStride() == states.weighted.outerStride();
  const bool in_place =
      std::is_same_v<T, S> && same_rows && static_cast<const void*>(out.data()) == states.weighted.data();
  check_apart(who, results, std::span(read).subspan(in_place ? 1 : 0));
}

}  // namespace attn::detail
