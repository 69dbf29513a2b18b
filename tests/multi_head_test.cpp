#include <attn/multi_head.hpp>
#include <attn/any_approximator.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::HeadsView;
using attn::multi_head;
using attn::SoftmaxAttention;
using test::Context;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

static_assert(std::is_aggregate_v<HeadsView<float>> && std::is_trivially_copyable_v<HeadsView<const float>>);
static_assert(std::is_convertible_v<HeadsView<float>, HeadsView<const float>>);
static_assert(!std::is_convertible_v<HeadsView<const float>, HeadsView<float>>);
static_assert(!std::is_convertible_v<HeadsView<float>, HeadsView<const double>>);

/// How an array lies in memory. padded: rows, heads and batch items with a gap of their own behind each. batch_inside:
/// [length, batch, heads, dim].
enum class Layout { head_major, token_major, padded, batch_inside };
constexpr Layout kLayouts[] = {Layout::head_major, Layout::token_major, Layout::padded, Layout::batch_inside};

/// A four-dimensional array of NaN in a buffer of its own that has not an element more, so that an address sanitizer
/// sees what is read behind it.
template <class T>
class Array {
 public:
  Array(Layout layout, Index batch, Index heads, Index length, Index dim)
      : view_(place(layout, batch, heads, length, dim)) {
    const Index last_head = (batch - 1) * view_.batch_stride + (heads - 1) * view_.head_stride;
    data_.assign(static_cast<std::size_t>(last_head + (length - 1) * view_.row_stride + dim), test::kNaN<T>);
    view_.data = data_.data();
  }
  Array(const Array&) = delete;
  Array(Array&&) = default;

  const HeadsView<T>& view() const { return view_; }
  Matrix<T> head(Index b, Index h) const { return view_(b, h); }
  const std::vector<T>& data() const { return data_; }

  /// Entries that are still NaN.
  Index untouched() const {
    return std::count_if(data_.begin(), data_.end(), [](T x) { return std::isnan(x); });
  }
  Index gaps() const { return static_cast<Index>(data_.size()) - view_.batch * view_.heads * view_.length * view_.dim; }

 private:
  static HeadsView<T> place(Layout layout, Index batch, Index heads, Index length, Index dim) {
    switch (layout) {
      case Layout::head_major:
        return attn::head_major<T>(nullptr, batch, heads, length, dim);
      case Layout::token_major:
        return attn::token_major<T>(nullptr, batch, length, heads, dim);
      case Layout::batch_inside:
        return {nullptr, batch, heads, length, dim, heads * dim, dim, batch * heads * dim};
      case Layout::padded:
        break;
    }
    const Index row = dim + 3, head = length * row + 5, item = heads * head + 7;
    return {nullptr, batch, heads, length, dim, item, head, row};
  }

  HeadsView<T> view_;
  std::vector<T> data_;
};

struct Shapes {
  Index batch, q_heads, k_heads;
  test::Shape head;

  std::string text() const {
    std::string all;
    for (const Index x : {batch, q_heads, k_heads, head.n_q, head.n_k, head.d, head.d_v}) {
      all += std::to_string(x) + " ";
    }
    return all;
  }
};

/// Arrays of seeded tokens, each head with its own.
template <class T>
struct Arrays {
  Array<T> q, k, v, out;

  Arrays(const Shapes& s, Layout layout)
      : q(layout, s.batch, s.q_heads, s.head.n_q, s.head.d),
        k(layout, s.batch, s.k_heads, s.head.n_k, s.head.d),
        v(layout, s.batch, s.k_heads, s.head.n_k, s.head.d_v),
        out(layout, s.batch, s.q_heads, s.head.n_q, s.head.d_v) {
    std::uint64_t seed = 1;
    for (Index b = 0; b < s.batch; ++b) {
      for (Index h = 0; h < s.q_heads; ++h) q.view()(b, h) = test::make_tokens<T>(Family::init, s.head, ++seed).q;
      for (Index h = 0; h < s.k_heads; ++h) {
        const auto x = test::make_tokens<T>(Family::init, s.head, ++seed);
        k.view()(b, h) = x.k;
        v.view()(b, h) = x.v;
      }
    }
  }

  template <class A>
  void run(const A& a, std::span<const Mask> masks, Context& context) {
    multi_head(a, q.view(), k.view(), v.view(), out.view(), masks, context);
  }
};

/// The key head of each query head: k_0, k_0, ..., k_1, k_1, ...
std::vector<Index> repeated_heads(Index q_heads, Index k_heads) {
  std::vector<Index> of;
  for (Index h = 0; h < k_heads; ++h) of.insert(of.end(), static_cast<std::size_t>(q_heads / k_heads), h);
  return of;
}

/// check(b, h, inputs, mask of b) for every head, its inputs copied into matrices of their own.
template <class T, class Check>
void for_each_head(const Arrays<T>& x, const std::vector<Mask>& masks, const Check& check) {
  const std::vector<Index> kv = repeated_heads(x.q.view().heads, x.k.view().heads);
  for (Index b = 0; b < x.q.view().batch; ++b) {
    for (Index h = 0; h < x.q.view().heads; ++h) {
      const Index from = kv[static_cast<std::size_t>(h)];
      const Matrix<T> q = x.q.head(b, h), k = x.k.head(b, from), v = x.v.head(b, from);
      SCOPED_TRACE("batch item " + std::to_string(b) + ", head " + std::to_string(h));
      check(b, h, Inputs<T>{.q = q, .k = k, .v = v, .mask = masks[static_cast<std::size_t>(b)]});
    }
  }
}

/// out is bitwise what forward gives head by head, and nothing between the heads has been written.
template <class T, class A>
void expect_equal_to_forward(const A& a, const Arrays<T>& x, const std::vector<Mask>& mask_of_item) {
  EXPECT_EQ(x.out.untouched(), x.out.gaps());
  Context context;
  for_each_head(x, mask_of_item, [&](Index b, Index h, const Inputs<T>& in) {
    Matrix<T> expected(in.q.rows(), in.v.cols());
    a.forward(in, expected, context);
    EXPECT_TRUE(test::bitwise_equal(x.out.head(b, h), expected));
  });
}

/// A different mask for each batch item: other lengths, other holes, causal or not. Owns what the masks refer to.
struct Masks {
  std::vector<std::vector<std::uint8_t>> keep_key, keep_query;
  std::vector<Mask> masks;

  Masks(const Shapes& s, bool causal) {
    const auto batch = static_cast<std::size_t>(s.batch);
    for (std::uint64_t b = 0; b < batch; ++b) {
      keep_key.push_back(test::random_keep(s.head.n_k, 0.8, 10 + b));
      for (auto& kept : std::span(keep_key.back()).last(b * keep_key.back().size() / (2 * batch))) kept = 0;
      keep_query.push_back(test::random_keep(s.head.n_q, 0.9, 20 + b));
    }
    constexpr Causal kCausal[] = {Causal::lower_right, Causal::none, Causal::upper_left};
    for (std::size_t b = 0; b < batch; ++b) {
      const Causal alignment = causal ? kCausal[b % 3] : Causal::none;
      masks.push_back({.causal = alignment, .keep_key = keep_key[b], .keep_query = keep_query[b]});
    }
  }
};

template <class T>
class MultiHead : public ::testing::Test {};
TYPED_TEST_SUITE(MultiHead, test::Scalars);

constexpr Shapes kShapes[] = {{1, 1, 1, {7, 7, 8, 8}},   {2, 3, 3, {5, 9, 8, 4}},       {3, 8, 2, {33, 20, 17, 24}},
                              {2, 6, 1, {1, 70, 16, 3}}, {1, 4, 2, {130, 130, 32, 32}}, {4, 1, 1, {20, 31, 5, 1}}};

TYPED_TEST(MultiHead, AgreesWithTheOracleInEveryLayout) {
  const SoftmaxAttention<TypeParam> softmax;
  Context context;
  for (const Shapes& s : kShapes) {
    const Masks masks(s, true);
    for (const Layout layout : kLayouts) {
      SCOPED_TRACE(s.text() + ", layout " + std::to_string(static_cast<int>(layout)));
      Arrays<TypeParam> x(s, layout);
      x.run(softmax, masks.masks, context);
      EXPECT_EQ(x.out.untouched(), x.out.gaps());
      for_each_head(x, masks.masks, [&](Index b, Index h, const Inputs<TypeParam>& in) {
        const reference::Problem p = test::to_reference(in);
        const reference::Kernel kernel = reference::softmax_kernel(in.q.cols());
        test::expect_close(x.out.head(b, h), reference::attend(kernel, p), p, kernel);
      });
    }
  }
}

TYPED_TEST(MultiHead, EqualsForwardOfEveryMethod) {
  Context context;
  for (const auto& method : attn::methods<TypeParam>()) {
    const auto a = method.make(test::of_size(8));
    for (const Shapes& s : kShapes) {
      if (method.name == "shifted-nystrom" && s.head.n_q != s.head.n_k) continue;
      SCOPED_TRACE(std::string(method.name) + ", " + s.text());
      Arrays<TypeParam> x(s, Layout::token_major);
      x.run(a, {}, context);
      expect_equal_to_forward(a, x, std::vector<Mask>(static_cast<std::size_t>(s.batch)));
    }
  }
}

TYPED_TEST(MultiHead, MasksNoneOneOrOneForEachItem) {
  const Shapes s{3, 4, 2, {30, 40, 16, 12}};
  const Masks masks(s, true);
  const SoftmaxAttention<TypeParam> softmax;
  Context context;
  Arrays<TypeParam> x(s, Layout::head_major);
  x.run(softmax, {}, context);
  expect_equal_to_forward(softmax, x, std::vector<Mask>(3));
  x.run(softmax, std::array{masks.masks[2]}, context);
  expect_equal_to_forward(softmax, x, std::vector<Mask>(3, masks.masks[2]));
  x.run(softmax, masks.masks, context);
  expect_equal_to_forward(softmax, x, masks.masks);
}

TYPED_TEST(MultiHead, CausalItemsHaveLengthsOfTheirOwn) {
  const Shapes s{3, 4, 2, {6, 40, 16, 12}};
  constexpr Index kQueries[] = {6, 4, 1}, kKeys[] = {23, 40, 3};  // kept, of each item
  std::vector<std::vector<std::uint8_t>> keep;
  for (int b = 0; b < 3; ++b) {
    for (const auto& [n, length] : {std::pair(s.head.n_q, kQueries[b]), std::pair(s.head.n_k, kKeys[b])}) {
      keep.emplace_back(static_cast<std::size_t>(n), std::uint8_t{0});
      std::fill_n(keep.back().begin(), length, std::uint8_t{1});
    }
  }
  std::vector<Mask> masks;
  for (std::size_t b = 0; b < 3; ++b) {
    masks.push_back({.causal = Causal::lower_right, .keep_key = keep[2 * b + 1], .keep_query = keep[2 * b]});
  }
  Arrays<TypeParam> x(s, Layout::token_major);
  Context context;
  x.run(SoftmaxAttention<TypeParam>{}, masks, context);
  for_each_head(x, masks, [&](Index b, Index h, const Inputs<TypeParam>& in) {
    const Index n_q = kQueries[b], n_k = kKeys[b];
    const reference::Problem trimmed = test::to_reference<TypeParam>({.q = in.q.topRows(n_q),
                                                                      .k = in.k.topRows(n_k),
                                                                      .v = in.v.topRows(n_k),
                                                                      .mask = {.causal = Causal::lower_right}});
    const reference::Kernel kernel = reference::softmax_kernel(16);
    const Matrix<TypeParam> out = x.out.head(b, h);
    test::expect_close<TypeParam>(out.topRows(n_q), reference::attend(kernel, trimmed), trimmed, kernel);
    EXPECT_TRUE((out.bottomRows(s.head.n_q - n_q).array() == TypeParam(0)).all());
  });
}

TYPED_TEST(MultiHead, TakesAProjectionOfAllThree) {
  constexpr Index kBatch = 2, kLength = 12, kHeads = 3, kDim = 8, kRow = 3 * kHeads * kDim;
  Matrix<TypeParam> qkv = test::Random(5).normal(kBatch * kLength, kRow).template cast<TypeParam>();
  const auto part = [&](Index i) -> HeadsView<const TypeParam> {
    return {qkv.data() + i * kHeads * kDim, kBatch, kHeads, kLength, kDim, kLength * kRow, kDim, kRow};
  };
  Array<TypeParam> out(Layout::token_major, kBatch, kHeads, kLength, kDim);
  Context context;
  const SoftmaxAttention<TypeParam> softmax;
  multi_head(softmax, part(0), part(1), part(2), out.view(), {}, context);
  for (Index b = 0; b < kBatch; ++b) {
    for (Index h = 0; h < kHeads; ++h) {
      const auto block = [&](Index i) { return qkv.block(b * kLength, (i * kHeads + h) * kDim, kLength, kDim); };
      EXPECT_TRUE(test::bitwise_equal(out.head(b, h), attn::attention(softmax, block(0), block(1), block(2))));
    }
  }
}

TYPED_TEST(MultiHead, InputsMayRepeatHeadsAndItems) {
  const Shapes one{1, 1, 1, {20, 25, 16, 12}}, many{2, 3, 1, {20, 25, 16, 12}};
  Arrays<TypeParam> repeated(many, Layout::head_major), grouped(many, Layout::head_major);
  const Arrays<TypeParam> single(one, Layout::head_major);
  const auto repeat = [](HeadsView<TypeParam> x, Index heads) {
    x.batch = 2;
    x.heads = heads;
    x.batch_stride = x.head_stride = 0;
    return x;
  };
  Context context;
  const SoftmaxAttention<TypeParam> softmax;
  const auto k = single.k.view(), v = single.v.view();
  multi_head(softmax, repeated.q.view(), repeat(k, 3), repeat(v, 3), repeated.out.view(), {}, context);
  multi_head(softmax, grouped.q.view(), repeat(k, 1), repeat(v, 1), grouped.out.view(), {}, context);
  EXPECT_EQ(repeated.out.untouched(), 0);
  EXPECT_EQ(repeated.out.data(), grouped.out.data());
}

/// Contexts of 1 to 5 workers of either kind.
std::vector<std::pair<std::string, Context>> contexts_of_up_to_5() {
  std::vector<std::pair<std::string, Context>> all;
  for (int count = 1; count <= 5; ++count) {
    all.emplace_back("threads " + std::to_string(count), Context{test::Threads{.count = count}});
#ifdef _OPENMP
    all.emplace_back("OpenMP " + std::to_string(count), Context{attn::OpenMP{.threads = count}});
#endif
  }
  return all;
}

/// Few small heads, many small ones, more than there are tasks, and large ones that do not go evenly.
constexpr Shapes kSharedShapes[] = {{1, 3, 3, {16, 16, 16, 16}},
                                    {2, 10, 5, {70, 130, 32, 32}},
                                    {7, 60, 4, {16, 20, 16, 8}},
                                    {1, 7, 1, {400, 400, 32, 32}}};

TYPED_TEST(MultiHead, IsBitwiseEqualForEveryNumberOfWorkers) {
  const attn::Skyformer<TypeParam> skyformer(attn::UniformSample{.num_landmarks = 24});
  const SoftmaxAttention<TypeParam> softmax;
  auto contexts = contexts_of_up_to_5();
  for (const Shapes& s : kSharedShapes) {
    const Masks masks(s, true), not_causal(s, false);
    const auto results = [&](Context& context) {
      Arrays<TypeParam> exact(s, Layout::token_major), approximate(s, Layout::head_major);
      exact.run(softmax, masks.masks, context);
      approximate.run(skyformer, not_causal.masks, context);
      return std::pair(exact.out.data(), approximate.out.data());
    };
    Context serial;
    const auto expected = results(serial);
    for (auto& [name, context] : contexts) EXPECT_TRUE(results(context) == expected) << s.text() << ", " << name;
  }
}

/// A call of kSharedShapes for use by several threads: its own arrays, its own context.
void run_with_a_context_of_its_own(const Shapes& s, Context context, Arrays<float>& x) {
  const Masks masks(s, true);
  for (int call = 0; call < 3; ++call) x.run(SoftmaxAttention<float>{}, masks.masks, context);
}

TEST(MultiHeadThreads, SeveralContextsWorkAtOnce) {
  for (const Shapes& s : kSharedShapes) {
    SCOPED_TRACE(s.text());
    Arrays<float> first(s, Layout::head_major), second(s, Layout::token_major);
    std::thread other([&] { run_with_a_context_of_its_own(s, Context{test::Threads{.count = 2}}, first); });
    run_with_a_context_of_its_own(s, Context{test::Threads{.count = 3}}, second);
    other.join();
    expect_equal_to_forward(SoftmaxAttention<float>{}, first, Masks(s, true).masks);
    expect_equal_to_forward(SoftmaxAttention<float>{}, second, Masks(s, true).masks);
  }
}

#ifdef _OPENMP
TEST(MultiHeadThreads, WorksInsideAParallelRegionOfTheCaller) {
  for (const Shapes& s : kSharedShapes) {
    SCOPED_TRACE(s.text());
    std::vector<Arrays<float>> x;
    for (const Layout layout : {Layout::head_major, Layout::token_major}) x.emplace_back(s, layout);
#pragma omp parallel for num_threads(2) schedule(static, 1)
    for (std::size_t i = 0; i < 2; ++i) run_with_a_context_of_its_own(s, Context{attn::OpenMP{.threads = 2}}, x[i]);
    for (const auto& result : x) expect_equal_to_forward(SoftmaxAttention<float>{}, result, Masks(s, true).masks);
  }
}
#endif

TEST(ForEachProblem, RunsEachOnceWithTheWorkersWhereTheyAreWorthMost) {
  constexpr Index kTiny = 1, kSmall = Index{1} << 21, kLarge = Index{1} << 24;
  struct Expected {
    Index n, multiply_adds;
    int workers;
    Index whole;  // problems that get a serial context
  };
  for (const auto& [n, multiply_adds, workers, whole] :
       {Expected{10, kTiny, 3, 10}, Expected{10, kSmall, 3, 10}, Expected{10, kLarge, 3, 9}, Expected{2, kLarge, 3, 0},
        Expected{500, kLarge, 3, 498}, Expected{9, kLarge, 3, 9}, Expected{0, kLarge, 3, 0}}) {
    SCOPED_TRACE(std::to_string(n) + " of " + std::to_string(multiply_adds));
    Context context{test::Threads{.count = workers}};
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
    std::atomic<Index> serial = 0;
    attn::detail::for_each_problem(n, multiply_adds, context, [&](Index i, Context& on) {
      ++runs[static_cast<std::size_t>(i)];
      if (on.workers() == 1) ++serial;
    });
    for (const auto& r : runs) EXPECT_EQ(r, 1);
    EXPECT_EQ(serial, whole);
  }
}

/// The training half of a method of which only the forward pass is tested.
struct WithoutTraining {
  using Scalar = float;
  struct Saved {};
  void forward(const Inputs<float>&, attn::MatrixRef<float>, Context&, Saved&) const {}
  void backward(const Inputs<float>&, test::ConstMatrixRef<float>, test::ConstMatrixRef<float>, const Saved&,
                const attn::Gradients<float>&, Context&) const {}
};

/// Throws std::bad_alloc in heads whose first element is negative, otherwise copies it.
struct Failing : WithoutTraining {
  using WithoutTraining::forward;
  static constexpr std::string_view kName = "failing";
  bool supports(const Inputs<float>&) const { return true; }
  void forward(const Inputs<float>& in, attn::MatrixRef<float> out, Context&) const {
    if (in.q(0, 0) < 0) throw std::bad_alloc();
    out.setConstant(in.q(0, 0));
  }
};

TEST(MultiHeadExceptions, ReachTheCallingThread) {
  const Shapes s{2, 20, 20, {40, 40, 32, 32}};  // enough to be shared
  for (auto& [name, context] : contexts_of_up_to_5()) {
    SCOPED_TRACE(name);
    Arrays<float> x(s, Layout::head_major);
    for (Index h = 0; h < 40; ++h) x.q.view()(h / 20, h % 20)(0, 0) = h % 3 == 2 ? -1.0F : 1.0F;
    EXPECT_THROW(x.run(Failing{}, {}, context), std::bad_alloc);
    for (Index h = 0; h < 40; ++h) x.q.view()(h / 20, h % 20)(0, 0) = 2;
    EXPECT_NO_THROW(x.run(Failing{}, {}, context));
    for (Index h = 0; h < 40; ++h) EXPECT_EQ(x.out.head(h / 20, h % 20), Matrix<float>::Constant(40, 32, 2));
  }
}

TEST(MultiHeadShapes, AnEmptyBatchIsLeftAlone) {
  Context context{test::Threads{.count = 2}};
  const auto empty = attn::head_major<float>(nullptr, 0, 4, 10, 8);
  EXPECT_NO_THROW(multi_head(SoftmaxAttention<float>{}, empty, empty, empty, empty, {}, context));
}

/// Says that it does not support causal masks, but would run.
struct NotCausal : WithoutTraining {
  using WithoutTraining::forward;
  static constexpr std::string_view kName = "not_causal";
  bool supports(const Inputs<float>& in) const { return in.mask.causal == Causal::none; }
  void forward(const Inputs<float>&, attn::MatrixRef<float> out, Context&) const { out.setZero(); }
};

/// The error of a call on zeros whose views change(q, k, v, out) has altered; checks that nothing is written.
template <class A, class Change>
std::string error_of(const A& a, std::span<const Mask> masks, const Change& change) {
  std::vector<float> zeros(2 * 8 * 6 * 4, 0.0F), result(2 * 8 * 5 * 3, 7.0F);
  const std::vector<float> before = result;
  const float* data = zeros.data();
  auto q = attn::head_major(data, 2, 8, 5, 4), k = attn::head_major(data, 2, 4, 6, 4);
  auto v = attn::head_major(data, 2, 4, 6, 3);
  auto out = attn::head_major(result.data(), 2, 8, 5, 3);
  change(q, k, v, out);
  Context context;
  try {
    multi_head(a, q, k, v, out, masks, context);
  } catch (const std::invalid_argument& e) {
    EXPECT_EQ(result, before);
    return e.what();
  }
  return "no error";
}

template <class Change>
std::string error_of(const Change& change) {
  return error_of(SoftmaxAttention<float>{}, {}, change);
}

constexpr auto kNothing = [](auto&, auto&, auto&, auto&) {};

TEST(MultiHeadErrors, CountsThatDisagree) {
  EXPECT_EQ(error_of(kNothing), "no error");
  EXPECT_EQ(error_of([](auto&, auto& k, auto& v, auto&) { k.heads = v.heads = 3; }),
            "multi_head: q has 8 heads, k has 3, which do not divide them");
  EXPECT_EQ(error_of([](auto&, auto& k, auto& v, auto&) { k.heads = v.heads = 16; }),
            "multi_head: q has 8 heads, k has 16, which do not divide them");
  const auto expect = [](const auto& change, const std::string& text) {
    EXPECT_EQ(error_of(change), "multi_head: " + text);
  };
  expect([](auto&, auto&, auto& v, auto&) { v.heads = 2; }, "v.heads is 2, k.heads is 4");
  expect([](auto&, auto&, auto&, auto& out) { out.heads = 4; }, "out.heads is 4, q.heads is 8");
  expect([](auto&, auto& k, auto&, auto&) { k.batch = 1; }, "k.batch is 1, q.batch is 2");
  expect([](auto&, auto&, auto& v, auto&) { v.batch = 1; }, "v.batch is 1, q.batch is 2");
  expect([](auto&, auto&, auto&, auto& out) { out.batch = 1; }, "out.batch is 1, q.batch is 2");
}

TEST(MultiHeadErrors, ShapesThatDisagree) {
  const auto expect = [](const auto& change, const std::string& text) {
    EXPECT_EQ(error_of(change), "multi_head: " + text);
  };
  expect([](auto&, auto& k, auto&, auto&) { k.length = 5; }, "k has 5 rows, v has 6");
  expect([](auto&, auto& k, auto&, auto&) { k.dim = 3; }, "q has 4 columns, k has 3");
  expect([](auto&, auto&, auto&, auto& out) { out.length = 4; }, "out is 4 x 3, should be 5 x 3");
}

TEST(MultiHeadErrors, EmptyAndNegativeShapes) {
  const auto expect = [](const auto& change, const std::string& shape) {
    EXPECT_EQ(error_of(change),
              "multi_head: " + shape + " (batch, heads, length, dim), should be at least 0 x 1 x 1 x 1");
  };
  expect([](auto& q, auto&, auto&, auto&) { q.length = 0; }, "q is 2 x 8 x 0 x 4");
  expect([](auto&, auto& k, auto& v, auto&) { k.heads = v.heads = 0; }, "k is 2 x 0 x 6 x 4");
  expect([](auto&, auto&, auto& v, auto&) { v.dim = -1; }, "v is 2 x 4 x 6 x -1");
  expect([](auto&, auto&, auto&, auto& out) { out.batch = -2; }, "out is -2 x 8 x 5 x 3");
}

TEST(MultiHeadErrors, Strides) {
  EXPECT_EQ(error_of([](auto& q, auto&, auto&, auto&) { q.row_stride = 0; }),
            "multi_head: q.row_stride is 0, should be at least its dim of 4");
  const auto expect = [](Index batch_stride, Index head_stride, Index row_stride, const std::string& text) {
    EXPECT_EQ(error_of([&](auto&, auto&, auto&, auto& out) {
                out.batch_stride = batch_stride;
                out.head_stride = head_stride;
                out.row_stride = row_stride;
              }),
              text);
  };
  const std::string overlaps = "multi_head: out overlaps itself: its ";
  expect(120, 15, 2, "multi_head: out.row_stride is 2, should be at least its dim of 3");
  expect(120, 14, 3, overlaps + "batch_stride is 120, its head_stride 14, its row_stride 3");
  expect(0, 15, 3, overlaps + "batch_stride is 0, its head_stride 15, its row_stride 3");
  expect(120, 3, 23, overlaps + "batch_stride is 120, its head_stride 3, its row_stride 23");
  expect(120, 3, 24, "no error");
}

TEST(MultiHeadErrors, Masks) {
  const std::vector<std::uint8_t> five(5, 1), six(6, 1);
  const std::vector<Mask> three(3), causal{{}, {.causal = Causal::upper_left, .keep_key = six}};
  const std::vector<Mask> wrong_keys{{.keep_key = six}, {.keep_key = five}};
  const std::vector<Mask> wrong_queries{{.keep_query = five}, {.keep_query = six}};
  const SoftmaxAttention<float> softmax;
  EXPECT_EQ(error_of(softmax, causal, kNothing), "no error");
  EXPECT_EQ(error_of(softmax, three, kNothing),
            "multi_head: masks has 3 entries, should have none, one, or one for each of the 2 batch items");
  EXPECT_EQ(error_of(softmax, wrong_keys, kNothing), "multi_head: keep_key has 5 entries, k has 6 rows");
  EXPECT_EQ(error_of(softmax, wrong_queries, kNothing), "multi_head: keep_query has 6 entries, q has 5 rows");
}

TEST(MultiHeadErrors, WhatTheMethodDoesNotSupport) {
  const std::vector<std::uint8_t> six(6, 1);
  const std::vector<Mask> second_causal{{}, {.causal = Causal::upper_left, .keep_key = six}};
  EXPECT_EQ(error_of(NotCausal{}, second_causal, kNothing),
            "multi_head: not_causal does not support batch item 1: 5 queries, 6 keys, causal, keep_key");
  EXPECT_EQ(error_of(attn::make_approximator<float>("nystrom"), second_causal, kNothing),
            "multi_head: nystrom does not support batch item 1: 5 queries, 6 keys, causal, keep_key");
  EXPECT_EQ(error_of(attn::ShiftedNystrom<float>{}, {}, kNothing),
            "multi_head: shifted-nystrom does not support batch item 0: 5 queries, 6 keys");
  EXPECT_EQ(error_of(attn::Nystrom<float>(attn::SegmentMeans{.num_landmarks = 0}), {}, kNothing),
            "nystrom: num_landmarks is 0, should be at least 1");
}

}  // namespace
