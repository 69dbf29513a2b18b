#include "compare/sequences.hpp"

#include "common/npy.hpp"
#include "common/number.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <sstream>
#include <stdexcept>
#include <unistd.h>
#include <utility>

namespace {

using attn::Index;

/// A file's array as (batch, heads, n, d).
struct File {
  std::string path;
  Index batch, heads, n, d;
  std::vector<float> values;
};

[[noreturn]] void refuse(const std::string& path, const std::string& expected, const std::string& found) {
  throw std::runtime_error(path + ": expected " + expected + ", found " + found);
}

File read_file(const std::string& path) {
  npy::Array<float> array = npy::read<float>(path);
  std::vector<Index> shape = array.shape;
  if (shape.size() < 2 || shape.size() > 4) {
    refuse(path, "shape (n, d), (heads, n, d) or (batch, heads, n, d)", npy::shape_text(array.shape));
  }
  if (array.values.empty()) refuse(path, "a shape without 0", npy::shape_text(array.shape));
  shape.insert(shape.begin(), 4 - shape.size(), 1);
  return {path, shape[0], shape[1], shape[2], shape[3], std::move(array.values)};
}

/// found, a number of what in file, is that of other.
void check_same(const File& file, const char* what, Index found, const File& other, Index expected) {
  if (found == expected) return;
  refuse(file.path, std::to_string(expected) + " " + what + " as in " + other.path, std::to_string(found));
}

void check_fit(const File& q, const File& k, const File& v) {
  check_same(k, "features", k.d, q, q.d);
  check_same(k, "batch items", k.batch, q, q.batch);
  check_same(v, "tokens", v.n, k, k.n);
  check_same(v, "heads", v.heads, k, k.heads);
  check_same(v, "batch items", v.batch, k, k.batch);
  if (q.heads % k.heads != 0) {
    refuse(k.path, "a number of heads that divides the " + std::to_string(q.heads) + " of " + q.path,
           std::to_string(k.heads));
  }
}

/// Every token that is kept is finite; keep (batch, n) or empty.
void check_finite(const File& file, std::span<const std::uint8_t> keep) {
  for (Index at = 0; const float x : file.values) {
    const Index feature = at % file.d, token = at / file.d % file.n, head = at / (file.d * file.n);
    const bool dropped = !keep.empty() && keep[static_cast<std::size_t>(head / file.heads * file.n + token)] == 0;
    if (!std::isfinite(x) && !dropped) {
      refuse(file.path, "finite numbers of float's range",
             std::string(std::isnan(x) ? "NaN" : "an infinity") + " in head " + std::to_string(head) + ", token " +
                 std::to_string(token) + ", feature " + std::to_string(feature));
    }
    ++at;
  }
}

/// What a mask's values say: keep where they are not 0, or, of an additive mask, keep where they are 0.
enum class MaskMeaning { keeps, adds };

/// Of booleans and integers 0 drops. Floating-point numbers are 1 to keep and 0 to drop, or what frameworks add to
/// scores: 0 to keep and -infinity, or something as good, to drop. Refused: anything else, and zeros alone, which could
/// be either.
MaskMeaning mask_meaning(const std::string& path, const npy::Array<double>& mask) {
  constexpr double kAsGoodAsInfinity = -1e4;
  const auto all = [&](const auto& fits) { return std::all_of(mask.values.begin(), mask.values.end(), fits); };
  const auto any = [&](const auto& fits) { return std::any_of(mask.values.begin(), mask.values.end(), fits); };
  const auto is_positive = [](double x) { return x > 0; };
  const auto is_negative = [](double x) { return x < 0; };
  if (any([](double x) { return std::isnan(x); })) refuse(path, "numbers", "NaN");
  if (!mask.of_floats && (any(is_positive) || !any(is_negative))) return MaskMeaning::keeps;
  if (mask.of_floats && any(is_positive) && all([](double x) { return x == 0 || x == 1; })) return MaskMeaning::keeps;
  if (mask.of_floats && any(is_negative) && all([](double x) { return x == 0 || x <= kAsGoodAsInfinity; }))
    return MaskMeaning::adds;
  const auto odd = std::find_if(mask.values.begin(), mask.values.end(), [](double x) { return x != 0 && x != 1; });
  std::ostringstream found;
  if (odd == mask.values.end())
    found << "zeros alone, which could be either";
  else
    found << *odd;
  refuse(path,
         "a mask of 1 to keep and 0 to drop, or of floating-point 0 to keep and -infinity, or at most -10000, to drop",
         found.str());
}

/// (batch, n_k) from a file of (n_k) or (batch, n_k).
std::vector<std::uint8_t> read_mask(const std::string& path, Index batch, Index n_k) {
  const npy::Array<double> array = npy::read<double>(path);
  const bool shared = array.shape == std::vector<Index>{n_k};
  if (!shared && array.shape != std::vector<Index>{batch, n_k}) {
    refuse(path, npy::shape_text({n_k}) + " or " + npy::shape_text({batch, n_k}) + ", an entry for each key",
           npy::shape_text(array.shape));
  }
  const bool zero_keeps = mask_meaning(path, array) == MaskMeaning::adds;
  std::vector<std::uint8_t> keep;
  for (Index item = 0; item < (shared ? batch : 1); ++item) {
    for (const double x : array.values) keep.push_back((x == 0) == zero_keeps ? 1 : 0);
  }
  return keep;
}

/// The first length of n_k tokens, batch times.
std::vector<std::uint8_t> first_tokens(Index length, Index batch, Index n_k) {
  if (length > n_k) {
    throw std::runtime_error("--keep-length: expected at most " + std::to_string(n_k) + ", the number of keys, found " +
                             std::to_string(length));
  }
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(batch * n_k));
  for (std::size_t i = 0; i < keep.size(); ++i) keep[i] = static_cast<Index>(i) % n_k < length ? 1 : 0;
  return keep;
}

std::vector<std::uint8_t> wanted_mask(const Options& options, Index batch, Index n_k) {
  if (options.mask) return read_mask(*options.mask, batch, n_k);
  if (options.keep_length) return first_tokens(*options.keep_length, batch, n_k);
  return {};
}

Sequences read_files(const Options& options) {
  File q = read_file(*options.q), k = read_file(*options.k), v = read_file(*options.v);
  check_fit(q, k, v);
  Sequences s{.description = q.path + ", " + k.path + ", " + v.path,
              .batch = q.batch,
              .heads = q.heads,
              .kv_heads = k.heads,
              .n_q = q.n,
              .n_k = k.n,
              .d = q.d,
              .d_v = v.d,
              .q = {},
              .k = {},
              .v = {},
              .keep = wanted_mask(options, q.batch, k.n),
              .causal = wanted_causal(options)};
  check_finite(q, s.masks_queries() ? s.keep : std::span<const std::uint8_t>{});
  check_finite(k, s.keep);
  check_finite(v, s.keep);
  s.q = std::move(q.values);
  s.k = std::move(k.values);
  s.v = std::move(v.values);
  return s;
}

/// Refuses more tokens than fit: queries, keys and values twice, as they are made and as they are kept, and results of
/// both targets, of a method and of the mean.
void check_memory(const Options& options) {
  constexpr double kArrays = 2 * 3 + 4, kGiB = 1 << 30;
  const double needed =
      kArrays * sizeof(float) * static_cast<double>(options.n) * static_cast<double>(options.d) / kGiB;
  const double here = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE)) / kGiB;
  if (needed <= here) return;
  throw std::runtime_error("--n: " + std::to_string(options.n) + " tokens of " + std::to_string(options.d) +
                           " features take " + number("%.0f", needed) + " GiB, this machine has " +
                           number("%.0f", here) + "; try a smaller --n");
}

Sequences make_sequences(const Options& options) {
  check_memory(options);
  const auto tokens =
      families::make_tokens<float>(options.family, {options.n, options.n, options.d, options.d}, options.seed);
  const auto values = [](const attn::Matrix<float>& m) { return std::vector<float>(m.data(), m.data() + m.size()); };
  return {.description = family_name(options.family) + " tokens, seed " + std::to_string(options.seed),
          .n_q = options.n,
          .n_k = options.n,
          .d = options.d,
          .d_v = options.d,
          .q = values(tokens.q),
          .k = values(tokens.k),
          .v = values(tokens.v),
          .keep = wanted_mask(options, 1, options.n),
          .causal = wanted_causal(options)};
}

}  // namespace

attn::Inputs<float> Sequences::inputs(Index head) const {
  const Index item = head / heads, kv_head = item * kv_heads + head % heads / (heads / kv_heads);
  const auto view = [](const std::vector<float>& x, Index i, Index n, Index columns) {
    return attn::ConstMatrixRef<float>(x.data() + i * n * columns, n, columns, columns);
  };
  attn::Inputs<float> in{
      view(q, head, n_q, d), view(k, kv_head, n_k, d), view(v, kv_head, n_k, d_v), {.causal = causal}};
  if (keep.empty()) return in;
  in.mask.keep_key = std::span(keep).subspan(static_cast<std::size_t>(item * n_k), static_cast<std::size_t>(n_k));
  if (masks_queries()) in.mask.keep_query = in.mask.keep_key;
  return in;
}

std::vector<attn::Mask> Sequences::masks() const {
  std::vector<attn::Mask> of_items;
  for (Index item = 0; item < batch; ++item) of_items.push_back(inputs(item * heads).mask);
  return of_items;
}

Sequences load(const Options& options) {
  return options.q ? read_files(options) : make_sequences(options);
}
