/// Every method's forward and backward pass on arguments that need not fit together, with any numbers in them: each is
/// refused with std::invalid_argument, and then leaves its results alone, or it writes every element of them and no
/// more.
#include <attn/any_approximator.hpp>

#include "source.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <vector>

namespace {

using attn::Index;

constexpr float kUnwritten = -1234.5F;

/// A view of rows x cols elements, most of them alike, in a buffer that ends where they do.
class View {
 public:
  View(fuzz::Source& source, Index rows, Index cols)
      : rows_(rows),
        cols_(cols),
        stride_(cols + source.below(5)),
        data_(static_cast<std::size_t>(std::max<Index>(0, rows - 1) * stride_ + cols)) {
    const float common = source.any<float>();
    std::fill(data_.begin(), data_.end(), common);
    for (Index i = source.below(8); i > 0 && !data_.empty(); --i) {
      data_[static_cast<std::size_t>(source.below(data_.size()))] = source.any<float>();
    }
  }

  attn::MatrixRef<float> view() { return {data_.data(), rows_, cols_, stride_}; }

  void erase() { std::fill(data_.begin(), data_.end(), kUnwritten); }
  bool unwritten() const {
    return std::all_of(data_.begin(), data_.end(), [](float x) { return x == kUnwritten; });
  }
  /// Whether every element is written, and none between the rows.
  bool written() const {
    for (std::size_t at = 0; at < data_.size(); ++at) {
      const bool element = static_cast<Index>(at) % stride_ < cols_;
      if (element == (data_[at] == kUnwritten)) return false;
    }
    return true;
  }

 private:
  Index rows_, cols_, stride_;
  std::vector<float> data_;
};

/// Mostly what is right, sometimes another.
Index nearly(fuzz::Source& source, Index right) {
  return source.below(8) == 0 ? source.below(40) : right;
}

template <class T>
std::vector<T> entries(fuzz::Source& source, Index right) {
  std::vector<T> x(source.below(3) == 0 ? static_cast<std::size_t>(nearly(source, right)) : 0);
  for (T& one : x) one = source.any<T>();
  return x;
}

attn::MethodOptions draw_options(fuzz::Source& source) {
  attn::MethodOptions options{.seed = source.any<std::uint64_t>()};
  if (source.below(2) == 0) options.num_landmarks = source.below(70) - 2;
  if (source.below(2) == 0) options.num_clusters = source.below(70) - 2;
  if (source.below(4) == 0) options.num_groups = source.below(20) - 2;
  if (source.below(2) == 0) options.num_near = source.below(20) - 2;
  if (source.below(4) == 0) options.iterations = static_cast<int>(source.below(20)) - 2;
  if (source.below(4) == 0) options.num_probes = static_cast<int>(source.below(40)) - 2;
  if (source.below(4) == 0) options.gamma = source.any<double>();
  if (source.below(4) == 0) options.scale = source.any<double>();
  if (source.below(4) == 0) options.bandwidth = source.any<double>();
  options.rows = source.below(2) == 0 ? attn::Rows::raw : attn::Rows::normalized;
  options.mode = static_cast<attn::ShiftMode>(source.below(3));
  return options;
}

/// Whether call is not refused. Aborts if results are not as they should be then.
template <class Call>
bool accepts(const Call& call, std::initializer_list<View*> results) {
  for (View* result : results) result->erase();
  bool accepted = true;
  try {
    call();
  } catch (const std::invalid_argument&) {
    accepted = false;
  }
  for (const View* result : results) {
    if (accepted ? !result->written() : !result->unwritten()) std::abort();
  }
  return accepted;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Source source(data, size);
  const auto methods = attn::methods<float>();
  const auto method = methods[static_cast<std::size_t>(source.below(methods.size()))].make(draw_options(source));
  const Index n_q = 1 + source.below(70), n_k = source.below(2) == 0 ? n_q : 1 + source.below(70),
              d = 1 + source.below(20);
  const Index d_v = 1 + source.below(20);
  const auto draw = [&](Index rows, Index cols) { return View{source, nearly(source, rows), nearly(source, cols)}; };
  View q = draw(n_q, d), k = draw(n_k, d), v = draw(n_k, d_v), out = draw(n_q, d_v);
  const auto keep_key = entries<std::uint8_t>(source, n_k), keep_query = entries<std::uint8_t>(source, n_q);
  const auto key_bias = entries<float>(source, n_k);
  const attn::Inputs<float> in{
      .q = q.view(),
      .k = k.view(),
      .v = v.view(),
      .mask = {.causal = static_cast<attn::Causal>(source.below(3)), .keep_key = keep_key, .keep_query = keep_query},
      .key_bias = key_bias};
  attn::Context context;
  if (source.below(3) == 0) {
    accepts([&] { method.forward(in, out.view(), context); }, {&out});
    return 0;
  }
  attn::AnyApproximator<float>::Saved saved;
  if (!accepts([&] { method.forward(in, out.view(), context, saved); }, {&out})) return 0;
  View dout = draw(n_q, d_v), dq = draw(n_q, d), dk = draw(n_k, d), dv = draw(n_k, d_v);
  accepts(
      [&] {
        method.backward(in, out.view(), dout.view(), saved, {dq.view(), dk.view(), dv.view()}, context);
      },
      {&dq, &dk, &dv});
  return 0;
}
