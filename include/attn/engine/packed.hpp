/// Right operands of products, packed for the register tile, and the product with one.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <array>
#include <cstddef>

namespace attn::detail {

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

/// (row_i - origin).v in lane i, for kLanes rows of d elements; a null origin is zeros, null rows give anything.
template <class T>
[[gnu::noinline]] Packet<T> dot_products(const T* const (&rows)[kLanes<T>], const T* origin, const T* v, Index d) {
  Packet<T> total[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) total[i] = broadcast(T(0));
  for (Index c = 0; c < d; c += kLanes<T>) {
    const auto x = load_row(v, c, d), zero = load_row_if(origin, c, d);
    for (int i = 0; i < kLanes<T>; ++i) total[i] = multiply_add(x, load_row_if(rows[i], c, d) - zero, total[i]);
  }
  return sums_of_lanes(total);
}

/// products[v] <- row_i.vectors[v] in lane i, for the count first of kLanes rows of d elements that lie stride apart;
/// the others give anything. Rows are read once.
template <std::size_t kVectors, class T>
[[gnu::noinline]] void row_products(const T* rows, Index stride, Index count, const std::array<const T*, kVectors>& v,
                                    Index d, std::array<Packet<T>, kVectors>& products) {
  constexpr int kAtOnce = std::min(4, kLanes<T>);
  Packet<T> total[kVectors][kLanes<T>];
  const Index whole = d - d % kLanes<T>;
  for (int i = 0; i < kLanes<T>; i += kAtOnce) {
    const T* row[array_size(kAtOnce)];
    Packet<T> sums[kVectors][array_size(kAtOnce)];
#pragma GCC unroll 4
    for (int r = 0; r < kAtOnce; ++r) {
      row[r] = rows + std::min<Index>(i + r, count - 1) * stride;
#pragma GCC unroll 2
      for (std::size_t n = 0; n < kVectors; ++n) sums[n][r] = broadcast(T(0));
    }
    for (Index c = 0; c < whole; c += kLanes<T>) {
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) {
        const auto x = load_unaligned(row[r] + c);
#pragma GCC unroll 2
        for (std::size_t n = 0; n < kVectors; ++n) sums[n][r] = multiply_add(load_unaligned(v[n] + c), x, sums[n][r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 2
      for (std::size_t n = 0; n < kVectors; ++n) {
        if (whole < d) sums[n][r] = multiply_add(load_row(v[n], whole, d), load_row(row[r], whole, d), sums[n][r]);
        total[n][i + r] = sums[n][r];
      }
    }
  }
  for (std::size_t n = 0; n < kVectors; ++n) products[n] = sums_of_lanes(total[n]);
}

/// The same of one vector.
template <class T>
Packet<T> row_products(const T* rows, Index stride, Index count, const T* v, Index d) {
  std::array<Packet<T>, 1> products;
  row_products<1>(rows, stride, count, {v}, d, products);
  return products[0];
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

/// A matrix or the transpose of one: element (i, j) at data + i row_step + j column_step, one of which is 1.
template <class T>
struct Operand {
  const T* data;
  Index rows, cols, row_step, column_step;

  [[gnu::noinline]] Operand(const T* first, Index n_rows, Index n_cols, Index to_next_row, Index to_next_column)
      : data(first), rows(n_rows), cols(n_cols), row_step(to_next_row), column_step(to_next_column) {}

  template <RowMajorWithContiguousRows<T> M>
  Operand(const M& m)  // NOLINT: implicit, as a view of it would be
      : Operand(m.data(), m.rows(), m.cols(), row_stride(m.derived()), 1) {}

  Operand some_rows(Range some) const {
    return {data + some.first * row_step, some.last - some.first, cols, row_step, column_step};
  }
};

template <class M>
Operand<typename M::Scalar> transposed(const M& m) {
  return {m.data(), m.cols(), m.rows(), 1, row_stride(m.derived())};
}

template <class T>
MatrixRef<T> rows_of(const MatrixRef<T>& m, Range rows) {
  return {m.data() + rows.first * m.outerStride(), rows.last - rows.first, m.cols(), m.outerStride()};
}

/// What each row of a product is multiplied by: element i of data, or with step 0 one factor for all.
template <class T>
struct RowFactors {
  const T* data;
  Index step;
};

/// Some rows of c <- beta c + tile, whose rows hold width elements.
template <class T>
[[gnu::noinline]] void add_tile(const T* tile, Index rows, Index width, T beta, T* c, Index stride, Index columns) {
  for (Index r = 0; r < rows; ++r, tile += width, c += stride) {
    for (Index at = 0; at < columns; at += kLanes<T>) {
      const auto x = load(tile + at);
      store_row(c, at, columns, beta == 0 ? x : multiply_add(broadcast(beta), load_row(c, at, columns), x));
    }
  }
}

/// c <- beta c + diag(factor) a b, b a panel of a.cols rows. c has at most as many columns as the panel. What is
/// prefetch is fetched meanwhile.
template <int kPackets, class T>
[[gnu::noinline]] void multiply_panel(const RowFactors<T>& factor, const Operand<T>& a, const T* panel, T beta,
                                      MatrixRef<T> c, const Prefetch& prefetch) {
  constexpr int kRows = kPanelRows<kPackets>;
  constexpr Index kWidth = kPackets * kLanes<T>;
  alignas(64) T buffer[array_size(kRows * kWidth)];
  for (Index i = 0; i < a.rows; i += kRows) {
    const Index rows = std::min<Index>(kRows, a.rows - i);
    const bool stores = beta == 0 && c.cols() == kWidth && rows == kRows;
    T* const to = row_of(c, i);
    T* const out = stores ? to : buffer;
    const Index out_stride = stores ? c.outerStride() : kWidth;
    prefetch.fetch(i, kRows, a.rows);
    Packet<T> tile[array_size(kRows)][array_size(kPackets)];
    multiply_tile(a.data + i * a.row_step, rows, a.row_step, a.column_step, panel, a.cols, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto x = broadcast(factor.data[(i + std::min<Index>(r, rows - 1)) * factor.step]);
#pragma GCC unroll 4
      for (int p = 0; p < kPackets; ++p) store_unaligned(out + r * out_stride + p * kLanes<T>, x * tile[r][p]);
    }
    if (!stores) add_tile<T>(buffer, rows, kWidth, beta, to, c.outerStride(), c.cols());
  }
}

/// A right operand (depth, columns), packed; zeros fill up its packets.
template <class T>
struct Panels {
  T* data;
  Index depth, packets;

  static Panels pack(const Operand<T>& b, Scratch& scratch) {
    const Index packets = packet_count<T>(b.cols);
    const Panels panels{scratch.elements<T>(b.rows * packets * kLanes<T>), b.rows, packets};
    for (Index s = 0; s < panels.strips(); ++s) {
      const Range strip = panels.strip(s);
      for (Index p = strip.first; p < strip.last; ++p) {
        pack_packet(b, p * kLanes<T>, panels.panel(strip) + (p - strip.first) * kLanes<T>,
                    (strip.last - strip.first) * kLanes<T>);
      }
    }
    return panels;
  }

  /// Strips of at most kPanelPackets packets of columns.
  Index strips() const { return strip_count(packets, kPanelPackets); }

  /// c <- beta c + diag(factor) a b, as far as c has columns. What is prefetch is fetched meanwhile. Sums run over at
  /// most kDepth terms at a time.
  [[gnu::noinline]] void multiply(const RowFactors<T>& factor, const Operand<T>& a, T beta, const MatrixRef<T>& c,
                                  Prefetch prefetch) const {
    for (Index s = 0; s < strips(); ++s) {
      multiply_strip(s, factor, a, beta, c, prefetch);
      prefetch = {};
    }
  }

  /// The first column of a strip.
  Index first_column(Index s) const { return strip(s).first * kLanes<T>; }

  /// c <- beta c + diag(factor) a b for the columns of one strip alone.
  void multiply_strip(Index s, const RowFactors<T>& factor, const Operand<T>& a, T beta, const MatrixRef<T>& c,
                      Prefetch prefetch) const {
    const Range strip = this->strip(s);
    const Index wide = strip.last - strip.first, column = strip.first * kLanes<T>;
    const MatrixRef<T> to(c.data() + column, c.rows(), std::min(c.cols() - column, wide * kLanes<T>), c.outerStride());
    Index first = 0;
    do {  // once even where there are no terms: their sum is 0
      const Index last = std::min(depth, first + kDepth);
      const Operand<T> terms(a.data + first * a.column_step, a.rows, last - first, a.row_step, a.column_step);
      with_packets<kPanelPackets>(static_cast<int>(wide), [&](auto width) {
        multiply_panel<width, T>(factor, terms, panel(strip) + first * wide * kLanes<T>, first == 0 ? beta : T(1), to,
                                 prefetch);
      });
      first = last;
      prefetch = {};
    } while (first < depth);
  }

 private:
  static constexpr Index kDepth = 256;

  Range strip(Index s) const { return nth_part(packets, strips(), s); }
  T* panel(Range strip) const { return data + strip.first * kLanes<T> * depth; }

  /// Columns column .. of b, kLanes of them, into rows of a panel that lie stride apart.
  static void pack_packet(const Operand<T>& b, Index column, T* to, Index stride) {
    if (b.column_step == 1) {
      for (Index l = 0; l < b.rows; ++l) store(to + l * stride, load_row(b.data + l * b.row_step, column, b.cols));
      return;
    }
    const T* rows[kLanes<T>];
    for (Index i = 0; i < kLanes<T>; ++i)
      rows[i] = column + i < b.cols ? b.data + (column + i) * b.column_step : nullptr;
    pack_rows<T>(rows, b.rows, nullptr, T(1), to, stride);
  }
};

/// c <- beta c + scale a b; a and b may be transposed(...). c must not overlap a or b, and is not read where beta is 0.
/// Sums run over at most 256 terms at a time.
template <class T>
void gemm(T scale, const Operand<T>& a, const Operand<T>& b, T beta, const MatrixRef<T>& c, Context& context) {
  constexpr Index kBlockRows = 256, kWorthSharing = 4 << 20;  // multiply-adds: below, waking the workers costs more
  Scratch scratch = context.scratch();
  const Panels<T> panels = Panels<T>::pack(b, scratch);
  const Index blocks = (c.rows() + kBlockRows - 1) / kBlockRows, strips = panels.strips();
  const auto multiply_item = [&](Index item, int) {
    const Range rows = nth_part(c.rows(), blocks, item / strips);
    panels.multiply_strip(item % strips, {&scale, 0}, a.some_rows(rows), beta, rows_of(c, rows), {});
  };
  const TaskRef multiply(multiply_item);
  if (c.rows() * c.cols() * a.cols >= kWorthSharing) return context.for_each(blocks * strips, multiply);
  for (Index item = 0; item < blocks * strips; ++item) multiply(item, 0);
}

/// Rows i + r, columns j to j + kLanes of c, in packet r; the last row of c stands for those beyond it.
template <class T>
void load_block(const MatrixRef<T>& c, Index i, Index j, Packet<T> (&block)[kLanes<T>]) {
  for (Index r = 0; r < kLanes<T>; ++r) block[r] = load_row(row_of(c, std::min(i + r, c.rows() - 1)), j, c.cols());
}

template <class T>
void store_block(const MatrixRef<T>& c, Index i, Index j, const Packet<T> (&block)[kLanes<T>]) {
  for (Index r = 0; r < kLanes<T> && i + r < c.rows(); ++r) store_row(row_of(c, i + r), j, c.cols(), block[r]);
}

/// The square c, in blocks of whole packets: what is above the diagonal <- what is below, or both <- their mean.
template <bool kAverage, class T>
void mirror_blocks(const MatrixRef<T>& c) {
  for (Index i = 0; i < c.rows(); i += kLanes<T>) {
    for (Index j = 0; j <= i; j += kLanes<T>) {
      Packet<T> lower[kLanes<T>], upper[kLanes<T>];
      load_block(c, i, j, lower);
      if constexpr (kAverage) {
        load_block(c, j, i, upper);
        transpose(upper);
        for (Index r = 0; r < kLanes<T>; ++r) lower[r] = broadcast(T(0.5)) * (lower[r] + upper[r]);
        store_block(c, i, j, lower);
      }
      if (j == i) continue;
      transpose(lower);
      store_block(c, j, i, lower);
    }
  }
}

/// c <- (c + c^T) / 2.
template <class T>
void make_symmetric(const MatrixRef<T>& c) {
  mirror_blocks<true>(c);
}

/// c <- beta c + scale a b as gemm, for a c and a product of a and b that are symmetric but for rounding: what lies
/// below the diagonal, in whole strips, stands for what is above.
template <class T>
void symmetric_gemm(T scale, const Operand<T>& a, const Operand<T>& b, T beta, const MatrixRef<T>& c,
                    Context& context) {
  constexpr Index kBlockRows = 256, kWorthSharing = 4 << 20;  // as in gemm
  Scratch scratch = context.scratch();
  const Panels<T> panels = Panels<T>::pack(b, scratch);
  const Index blocks = (c.rows() + kBlockRows - 1) / kBlockRows, strips = panels.strips();
  const auto multiply_item = [&](Index item, int) {
    Range rows = nth_part(c.rows(), blocks, item / strips);
    rows.first = std::max(rows.first, panels.first_column(item % strips));
    if (rows.first >= rows.last) return;
    panels.multiply_strip(item % strips, {&scale, 0}, a.some_rows(rows), beta, rows_of(c, rows), {});
  };
  const TaskRef multiply(multiply_item);
  if (c.rows() * c.cols() * a.cols >= 2 * kWorthSharing) {
    context.for_each(blocks * strips, multiply);
  } else {
    for (Index item = 0; item < blocks * strips; ++item) multiply(item, 0);
  }
  if (strips > 1) mirror_blocks<false>(c);
}

}  // namespace attn::detail
