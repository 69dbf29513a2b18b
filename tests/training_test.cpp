/// A training step of every method that has a name, and of a user's own: what their gradients have in common.
#include <attn/attn.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

using attn::AnyApproximator;
using attn::Causal;
using test::Context;
using test::describe;
using test::Family;
using test::in_both_precisions;
using test::Index;
using test::Inputs;
using test::Mask;
using test::MaskedInputs;
using test::Matrix;
using test::Padded;
using test::Tokens;

/// What a step writes.
template <class T>
struct Step {
  Matrix<T> out, dq, dk, dv;

  std::array<const Matrix<T>*, 4> all() const { return {&out, &dq, &dk, &dv}; }
  bool finite() const { return out.allFinite() && dq.allFinite() && dk.allFinite() && dv.allFinite(); }
  bool operator==(const Step& other) const {
    return test::bitwise_equal(out, other.out) && test::bitwise_equal(dq, other.dq) &&
           test::bitwise_equal(dk, other.dk) && test::bitwise_equal(dv, other.dv);
  }
};

/// A forward and a backward pass into matrices of NaN.
template <class T>
Step<T> train(const AnyApproximator<T>& method, const Inputs<T>& in, const Matrix<T>& dout, Context& context,
              typename AnyApproximator<T>::Saved& saved) {
  const auto unset = [](Index rows, Index cols) -> Matrix<T> { return Matrix<T>::Constant(rows, cols, test::kNaN<T>); };
  Step<T> step{unset(in.q.rows(), in.v.cols()), unset(in.q.rows(), in.q.cols()), unset(in.k.rows(), in.k.cols()),
               unset(in.v.rows(), in.v.cols())};
  method.forward(in, step.out, context, saved);
  method.backward(in, step.out, dout, saved, {step.dq, step.dk, step.dv}, context);
  return step;
}

template <class T>
Step<T> train(const AnyApproximator<T>& method, const Inputs<T>& in, const Matrix<T>& dout, Context& context) {
  typename AnyApproximator<T>::Saved saved;
  return train(method, in, dout, context, saved);
}

template <class T>
Step<T> train(const AnyApproximator<T>& method, const Inputs<T>& in, const Matrix<T>& dout) {
  Context context;
  return train(method, in, dout, context);
}

template <class T>
Matrix<T> random_dout(Index n_q, Index d_v, std::uint64_t seed = 301) {
  return test::Random(seed).normal(n_q, d_v).template cast<T>();
}

class Training : public test::MethodTest {};

INSTANTIATE_TEST_SUITE_P(Every, Training, ::testing::ValuesIn(test::method_names()), test::test_name);

TEST_P(Training, ReturnsWhatInferenceReturns) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    for (const Index n_k : {140, 93}) {
      const MaskedInputs<T> inputs(n_k);
      for (const Inputs<T>& in : inputs.all()) {
        for (const Index m : {1, 20, 100}) {
          const auto method = make<T>(m);
          if (!method.supports(in)) continue;
          Matrix<T> out(140, 18);
          method.forward(in, out, context);
          const Step<T> step = train(method, in, random_dout<T>(140, 18), context);
          EXPECT_TRUE(step.finite()) << describe(in) << ", " << m << " landmarks";
          EXPECT_TRUE(test::bitwise_equal(step.out, out)) << describe(in) << ", " << m << " landmarks";
        }
      }
    }
  });
}

TEST_P(Training, IsBitwiseEqualWhateverTheWorkers) {
  in_both_precisions([&]<class T>(T) {
    const auto keep = test::random_keep(1100, 0.9, 302);
    const auto x = test::make_tokens<T>(Family::init, {1100, 1100, 12, 10}, 303);
    const Matrix<T> dout = random_dout<T>(1100, 10);
    for (const Mask& mask : {Mask{}, Mask{.keep_key = keep, .keep_query = keep}}) {
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
      for (const Index m : {30, 150}) {
        const auto method = make<T>(m);
        const Step<T> expected = train(method, in, dout);
        EXPECT_TRUE(expected.finite());
        for (auto& [name, context] : test::contexts()) {
          EXPECT_TRUE(train(method, in, dout, context) == expected) << name << ", " << m << " landmarks";
        }
      }
    }
  });
}

TEST_P(Training, WhatTheMasksDropHasNoInfluence) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    const Matrix<T> dout = random_dout<T>(140, 18);
    for (const Index n_k : {140, 93}) {
      const MaskedInputs<T> inputs(n_k);
      for (const Inputs<T>& in : inputs.all()) {
        const auto method = make<T>(20);
        if (!method.supports(in)) continue;
        const Step<T> clean = train(method, in, dout, context);
        EXPECT_TRUE(clean.finite());
        for (const T poison : {test::kNaN<T>, test::kInf<T>, T(1e6)}) {
          const Tokens<T> y = inputs.poisoned(in, poison);
          Matrix<T> poisoned = dout;
          for (Index i = 0; i < 140; ++i) {
            if (!reference::kept(in.mask.keep_query, i)) poisoned.row(i).setConstant(poison);
          }
          EXPECT_TRUE(train(method, {.q = y.q, .k = y.k, .v = y.v, .mask = in.mask}, poisoned, context) == clean)
              << describe(in) << ", " << poison;
        }
      }
    }
  });
}

/// Whether the rows that keep drops are 0.
template <class T>
bool dropped_are_zero(const Matrix<T>& m, std::span<const std::uint8_t> keep) {
  for (Index i = 0; i < m.rows(); ++i) {
    if (!reference::kept(keep, i) && (m.row(i).array() != T(0)).any()) return false;
  }
  return true;
}

TEST_P(Training, DroppedTokensHaveNoGradient) {
  in_both_precisions([&]<class T>(T) {
    for (const Index n_k : {140, 93}) {
      const MaskedInputs<T> inputs(n_k);
      for (const Inputs<T>& in : inputs.all()) {
        SCOPED_TRACE(describe(in));
        for (const Index m : {20, 100, 140}) {
          const auto method = make<T>(m);
          if (!method.supports(in)) continue;
          const Step<T> step = train(method, in, random_dout<T>(140, 18));
          EXPECT_TRUE(dropped_are_zero(step.dq, in.mask.keep_query));
          EXPECT_TRUE(dropped_are_zero(step.dk, in.mask.keep_key));
          for (Index j = 0; j < n_k; ++j) {
            EXPECT_EQ((step.dv.row(j).array() == T(0)).all(), !reference::kept(in.mask.keep_key, j)) << "key " << j;
          }
        }
      }
    }
  });
}

TEST_P(Training, NothingKeptGivesZeros) {
  in_both_precisions([&]<class T>(T) {
    const auto x = test::make_tokens<T>(Family::init, {40, 40, 8, 5}, 304);
    const std::vector<std::uint8_t> none(40, 0);
    for (const Mask& mask :
         {Mask{.keep_key = none}, Mask{.keep_query = none}, Mask{.keep_key = none, .keep_query = none}}) {
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
      const auto method = make<T>(6);
      if (!method.supports(in)) continue;
      const Step<T> step = train(method, in, random_dout<T>(40, 5));
      for (const Matrix<T>* m : step.all()) EXPECT_TRUE((m->array() == T(0)).all()) << describe(in);
    }
  });
}

TEST_P(Training, TakesStridedViews) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    const auto x = test::make_tokens<T>(Family::init, {67, 67, 17, 9}, 305);
    const Matrix<T> dout = random_dout<T>(67, 9);
    for (const Index m : {12, 67}) {
      const auto method = make<T>(m);
      const Step<T> expected = train(method, {.q = x.q, .k = x.k, .v = x.v}, dout);
      Padded<T> q(x.q, 3, test::kNaN<T>), k(x.k, 5, test::kNaN<T>), v(x.v, 1, test::kNaN<T>),
          dout_view(dout, 6, test::kNaN<T>);
      Padded<T> out(67, 9, 4, T(-7)), dq(67, 17, 2, T(-7)), dk(67, 17, 7, T(-7)), dv(67, 9, 3, T(-7));
      const Inputs<T> in{.q = q.view(), .k = k.view(), .v = v.view()};
      typename AnyApproximator<T>::Saved saved;
      method.forward(in, out.view(), context, saved);
      method.backward(in, out.view(), dout_view.view(), saved, {dq.view(), dk.view(), dv.view()}, context);
      EXPECT_TRUE((Step<T>{out.matrix(), dq.matrix(), dk.matrix(), dv.matrix()}) == expected) << m << " landmarks";
      for (const Padded<T>* padded : {&out, &dq, &dk, &dv}) EXPECT_TRUE(padded->padding_untouched());
    }
  });
}

TEST_P(Training, ASavedServesInputsOfOtherShapes) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    typename AnyApproximator<T>::Saved saved;
    const auto method = make<T>(12);
    const std::vector<std::uint8_t> none(50, 0);
    for (const auto& [n, d, d_v] :
         {std::array<Index, 3>{80, 16, 9}, {50, 3, 20}, {10, 16, 9}, {50, 33, 1}, {80, 16, 9}}) {
      const auto x = test::make_tokens<T>(Family::init, {n, n, d, d_v}, 306);
      const Matrix<T> dout = random_dout<T>(n, d_v);
      for (const Mask& mask : {Mask{.keep_key = none, .keep_query = none}, Mask{}}) {
        const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
        if (!mask.keep_key.empty() && n != 50) continue;
        EXPECT_TRUE(train(method, in, dout, context, saved) == train(method, in, dout)) << describe(in);
      }
    }
  });
}

/// What a query's q and dout hold, or a key's k and v, reaches only what is connected with it. Bad are the queries that
/// are changed or see a key that is; unless they see no key, for then they have no gradient. A query's dq is connected
/// with itself and with the keys that it sees; a key's dk and dv with the queries that see it: of normalized rows with
/// all that these see, so that every key which a bad query sees is connected with it.
template <class T>
class Connected {
 public:
  Connected(const Inputs<T>& in, const std::vector<bool>& bad_queries, const std::vector<bool>& bad_keys)
      : queries(bad_queries.size()), keys(bad_keys.size()) {
    for (std::size_t i = 0; i < queries.size(); ++i) {
      const std::vector<std::size_t> seen = keys_seen_by(in, i);
      const bool sees_bad_key = std::any_of(seen.begin(), seen.end(), [&](std::size_t j) { return bad_keys[j]; });
      if (seen.empty() || !(bad_queries[i] || sees_bad_key)) continue;
      queries[i] = true;
      for (const std::size_t j : seen) keys[j] = true;
    }
  }

  std::vector<bool> queries, keys;

 private:
  static std::vector<std::size_t> keys_seen_by(const Inputs<T>& in, std::size_t i) {
    std::vector<std::size_t> seen;
    for (Index j = 0; j < in.k.rows(); ++j) {
      if (reference::visible(in.mask, in.q.rows(), in.k.rows(), static_cast<Index>(i), j)) {
        seen.push_back(static_cast<std::size_t>(j));
      }
    }
    return seen;
  }
};

/// A step in which some queries and some keys hold poison.
template <class T>
Step<T> train_poisoned(const AnyApproximator<T>& method, const Inputs<T>& in, const Matrix<T>& dout, T poison,
                       const std::vector<bool>& queries, const std::vector<bool>& keys, Context& context) {
  Tokens<T> y{in.q, in.k, in.v};
  Matrix<T> poisoned = dout;
  for (Index i = 0; i < y.q.rows(); ++i) {
    if (!queries[static_cast<std::size_t>(i)]) continue;
    y.q.row(i).setConstant(poison);
    poisoned.row(i).setConstant(poison);
  }
  for (Index j = 0; j < y.k.rows(); ++j) {
    if (!keys[static_cast<std::size_t>(j)]) continue;
    y.k.row(j).setConstant(poison);
    y.v.row(j).setConstant(poison);
  }
  return train(method, {.q = y.q, .k = y.k, .v = y.v, .mask = in.mask}, poisoned, context);
}

/// Row i is the same: in every bit where poison is finite, and up to rounding otherwise, for then sums near the
/// diagonal are added up pair by pair.
template <class T>
bool row_unchanged(const Matrix<T>& poisoned, const Matrix<T>& clean, Index i, T poison) {
  if (std::isfinite(poison)) return test::same_row(poisoned, clean, i);
  constexpr T kTolerance = sizeof(T) == 4 ? T(1e-5) : T(1e-13);
  return (poisoned.row(i) - clean.row(i)).norm() <= kTolerance * (clean.row(i).norm() + 1);
}

/// What is not connected with the poison is as in clean.
template <class T>
void expect_the_rest_unchanged(const Step<T>& poisoned, const Step<T>& clean, const Connected<T>& connected, T poison) {
  for (Index i = 0; i < clean.dq.rows(); ++i) {
    if (connected.queries[static_cast<std::size_t>(i)]) continue;
    EXPECT_TRUE(test::same_row(poisoned.out, clean.out, i)) << "query " << i << ", " << poison;
    EXPECT_TRUE(row_unchanged(poisoned.dq, clean.dq, i, poison)) << "query " << i << ", " << poison;
  }
  for (Index j = 0; j < clean.dk.rows(); ++j) {
    if (connected.keys[static_cast<std::size_t>(j)]) continue;
    EXPECT_TRUE(row_unchanged(poisoned.dk, clean.dk, j, poison)) << "key " << j << ", " << poison;
    EXPECT_TRUE(row_unchanged(poisoned.dv, clean.dv, j, poison)) << "key " << j << ", " << poison;
  }
}

template <class T>
void expect_reaches_only_what_is_connected(const AnyApproximator<T>& method, const Inputs<T>& in,
                                           const std::vector<bool>& queries, const std::vector<bool>& keys,
                                           Context& context) {
  const Matrix<T> dout = random_dout<T>(in.q.rows(), in.v.cols());
  const Step<T> clean = train(method, in, dout, context);
  const Connected<T> connected(in, queries, keys);
  for (const T poison : {T(50), test::kNaN<T>}) {
    const Step<T> poisoned = train_poisoned(method, in, dout, poison, queries, keys, context);
    expect_the_rest_unchanged(poisoned, clean, connected, poison);
  }
}

TEST_P(Training, ATokenReachesOnlyWhatIsConnectedWithIt) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    const auto method = make<T>(8);
    for (const auto& [n_q, n_k] :
         {std::pair<Index, Index>{5, 5}, {40, 40}, {150, 150}, {300, 300}, {40, 150}, {150, 40}}) {
      const auto x = test::make_tokens<T>(Family::init, {n_q, n_k, 9, 6}, 307);
      const auto keep = test::random_keep(n_k, 0.8, 308);
      for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
        for (const bool masked : {false, true}) {
          Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
          if (masked) in.mask.keep_key = keep;
          if (!method.supports(in)) continue;
          SCOPED_TRACE(describe(in) + ", causal " + std::to_string(static_cast<int>(causal)));
          std::vector<bool> no_query(static_cast<std::size_t>(n_q)), no_key(static_cast<std::size_t>(n_k));
          for (const Index first : {Index{1}, n_k / 3, n_k - 1}) {  // keys from this one on
            std::vector<bool> keys = no_key;
            std::fill(keys.begin() + first, keys.end(), true);
            expect_reaches_only_what_is_connected(method, in, no_query, keys, context);
          }
          for (const Index query : {Index{0}, n_q / 3, n_q - 1}) {  // one query
            std::vector<bool> queries = no_query;
            queries[static_cast<std::size_t>(query)] = true;
            expect_reaches_only_what_is_connected(method, in, queries, no_key, context);
          }
        }
      }
    }
  });
}

/// Poison in one entry of k or v, or of q or dout: of every token, and in every column of several packets and a tail.
/// Near the diagonal one tile holds queries that see the token and others that do not.
TEST_P(Training, AnEntryReachesOnlyWhatIsConnectedWithIt) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    const auto method = make<T>(8);
    constexpr Index kColumns = 37;
    for (const auto& [n_q, n_k] : {std::pair<Index, Index>{40, 70}, {70, 40}}) {
      const auto x = test::make_tokens<T>(Family::init, {n_q, n_k, kColumns, kColumns}, 309);
      const Matrix<T> dout = random_dout<T>(n_q, kColumns);
      for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
        const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
        if (!method.supports(in)) continue;
        SCOPED_TRACE(describe(in) + ", causal " + std::to_string(static_cast<int>(causal)));
        const Step<T> clean = train(method, in, dout, context);
        for (const bool of_key : {true, false}) {
          for (Index row = 0; row < (of_key ? n_k : n_q); ++row) {
            std::vector<bool> queries(static_cast<std::size_t>(n_q)), keys(static_cast<std::size_t>(n_k));
            (of_key ? keys : queries)[static_cast<std::size_t>(row)] = true;
            const Connected<T> connected(in, queries, keys);
            for (const bool first : {true, false}) {
              const T poison = (row % 2 == 0) == first ? test::kNaN<T> : test::kInf<T>;
              Tokens<T> y = x;
              Matrix<T> seed = dout;
              (of_key ? (first ? y.k : y.v) : (first ? y.q : seed))(row, 11 * row % kColumns) = poison;
              const Step<T> step = train(method, {.q = y.q, .k = y.k, .v = y.v, .mask = in.mask}, seed, context);
              expect_the_rest_unchanged(step, clean, connected, poison);
            }
          }
        }
      }
    }
  });
}

/// Whatever the tokens that it would see hold.
TEST_P(Training, ADroppedQueryIsZeroAmidNaN) {
  in_both_precisions([&]<class T>(T) {
    MaskedInputs<T> inputs(140);
    inputs.x.k.setConstant(test::kNaN<T>);
    inputs.x.v.setConstant(test::kNaN<T>);
    for (const Inputs<T>& in : inputs.all()) {
      const auto method = make<T>(20);
      if (!method.supports(in)) continue;
      const Step<T> step = train(method, in, random_dout<T>(140, 18));
      EXPECT_TRUE(dropped_are_zero(step.out, in.mask.keep_query)) << describe(in);
      EXPECT_TRUE(dropped_are_zero(step.dq, in.mask.keep_query)) << describe(in);
    }
  });
}

}  // namespace
