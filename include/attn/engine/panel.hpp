/// Panels: matrices transposed so that tokens lie along the lanes of packets.
#pragma once

#include <attn/engine/simd.hpp>
#include <attn/matrix.hpp>

#include <algorithm>

namespace attn::detail {

/// The count first elements of a packet from memory, fewer than it has lanes; fill in the others. Not inlined, and so
/// compiled once.
template <class T>
[[gnu::noinline]] Packet<T> load_some(const T* from, Index count, T fill) {
  alignas(64) T lanes[kLanes<T>];
  for (Index i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? from[i] : fill;
  return load(lanes);
}

/// The count first lanes of a packet, to memory.
template <class T>
[[gnu::noinline]] void store_some(T* to, Index count, Packet<T> x) {
  alignas(64) T lanes[kLanes<T>];
  store(lanes, x);
  for (Index i = 0; i < count; ++i) to[i] = lanes[i];
}

/// Lanes [first, first + kLanes) of a row of length d, beyond it what fills them.
template <class T>
inline Packet<T> load_row(const T* row, Index first, Index d, T fill = 0) {
  return first + kLanes<T> <= d ? load_unaligned(row + first) : load_some(row + first, d - first, fill);
}

/// The same of a row that may be null, which is all zeros.
template <class T>
inline Packet<T> load_row_if(const T* row, Index first, Index d) {
  return row == nullptr ? broadcast(T(0)) : load_row(row, first, d);
}

template <class T>
inline void store_row(T* row, Index first, Index d, Packet<T> x) {
  first + kLanes<T> <= d ? store_unaligned(row + first, x) : store_some(row + first, d - first, x);
}

/// a.b of rows of length d.
template <class T>
[[gnu::noinline]] T dot_product(const T* a, const T* b, Index d) {
  auto products = broadcast(T(0));
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>)
    products = multiply_add(load_unaligned(a + c), load_unaligned(b + c), products);
  T total = sum(products);
  for (; c < d; ++c) total += a[c] * b[c];
  return total;
}

/// to <- to + factor row, of length d.
template <class T>
[[gnu::noinline]] void add_row(T factor, const T* row, T* to, Index d) {
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>) {
    store_unaligned(to + c, multiply_add(broadcast(factor), load_unaligned(row + c), load_unaligned(to + c)));
  }
  for (; c < d; ++c) to[c] += factor * row[c];
}

/// row <- row + x, of length d.
template <class T>
void add_to_row(T x, T* row, Index d) {
  for (Index c = 0; c < d; ++c) row[c] += x;
}

/// to <- factor row, of length d.
template <class T>
[[gnu::noinline]] void scale_row(T factor, const T* row, T* to, Index d) {
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>) store_unaligned(to + c, broadcast(factor) * load_unaligned(row + c));
  for (; c < d; ++c) to[c] = factor * row[c];
}

/// to <- to + (the sum of count >= 1 rows), of length d.
template <class T>
inline void add_rows(const T* const* rows, Index count, T* to, Index d) {
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>) {
    auto total = load_unaligned(rows[0] + c);
    for (Index i = 1; i < count; ++i) total = total + load_unaligned(rows[i] + c);
    store_unaligned(to + c, load_unaligned(to + c) + total);
  }
  for (; c < d; ++c) {
    T total = rows[0][c];
    for (Index i = 1; i < count; ++i) total += rows[i][c];
    to[c] += total;
  }
}

/// to <- to + (a - b)^2, element by element of rows of length d.
template <class T>
inline void add_squared_difference(const T* a, const T* b, T* to, Index d) {
  for (Index first = 0; first < d; first += kLanes<T>) {
    const auto difference = load_row(a, first, d) - load_row(b, first, d);
    store_row(to, first, d, multiply_add(difference, difference, load_row(to, first, d)));
  }
}

/// |row|^2 of a row of length d.
template <class T>
inline T squared_norm(const T* row, Index d) {
  return dot_product(row, row, d);
}

/// panel[c] <- alpha (row_i[c] - center[c]) in lane i, for kLanes rows of d elements; null rows and a null center are
/// zeros. stride: elements between two rows of the panel. Returns |row_i - center|^2 in lane i.
template <class T>
[[gnu::noinline]] Packet<T> pack_rows(const T* const (&rows)[kLanes<T>], Index d, const T* center, T alpha, T* panel,
                                      Index stride) {
  auto squares = broadcast(T(0));
  for (Index first = 0; first < d; first += kLanes<T>) {
    Packet<T> block[kLanes<T>];
    const auto origin = load_row_if(center, first, d);
    for (int i = 0; i < kLanes<T>; ++i) block[i] = load_row_if(rows[i], first, d) - origin;
    transpose(block);
    const Index count = std::min<Index>(kLanes<T>, d - first);
    auto of_block = broadcast(T(0));
    for (Index c = 0; c < count; ++c) {
      of_block = multiply_add(block[c], block[c], of_block);
      store(panel + (first + c) * stride, block[c] * broadcast(alpha));
    }
    squares = squares + of_block;
  }
  return squares;
}

/// row_i[c] <- scale_i panel[c] of lane i: the way back. Null rows are skipped.
template <class T>
inline void unpack_rows(const T* panel, Index stride, Index d, Packet<T> scale, T* const (&rows)[kLanes<T>]) {
  for (Index first = 0; first < d; first += kLanes<T>) {
    Packet<T> block[kLanes<T>];
    for (int c = 0; c < kLanes<T>; ++c) {
      block[c] = first + c < d ? load(panel + (first + c) * stride) * scale : broadcast(T(0));
    }
    transpose(block);
    for (int i = 0; i < kLanes<T>; ++i) {
      if (rows[i] != nullptr) store_row(rows[i], first, d, block[i]);
    }
  }
}

}  // namespace attn::detail
