/// Gradients: of the streamed product against the oracle's, of every method against differences of its forward pass.
#include <attn/attn.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numbers>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using attn::AnyApproximator;
using attn::Causal;
using attn::Rows;
using attn::SegmentMeans;
using attn::ShiftMode;
using attn::SpectralShift;
using test::Context;
using test::describe;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;
using test::Shape;
using test::Tokens;

/// Every combination of masks for so many queries and keys, with and without a key bias.
template <class T>
class Conditions {
 public:
  Conditions(Index n_q, Index n_k)
      : keep_query_(test::random_keep(n_q, 0.8, 201)),
        keep_key_(test::random_keep(n_k, 0.7, 202)),
        key_bias_(test::random_key_bias<T>(n_k, 0.1, 203)) {}

  std::vector<Inputs<T>> all(const Tokens<T>& x) const& {
    std::vector<Inputs<T>> result;
    for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
      for (const unsigned bits : {0U, 1U, 2U, 3U, 4U, 7U}) {
        Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
        if ((bits & 1U) != 0) in.mask.keep_key = keep_key_;
        if ((bits & 2U) != 0) in.mask.keep_query = keep_query_;
        if ((bits & 4U) != 0) in.key_bias = key_bias_;
        result.push_back(in);
      }
    }
    return result;
  }

 private:
  std::vector<std::uint8_t> keep_query_, keep_key_;
  std::vector<T> key_bias_;
};

/// The oracle's kernel as the library's.
struct Kernel {
  reference::Kernel parameters;
  double scale(Index) const { return parameters.scale; }
  double bias(Index) const { return parameters.bias; }
  Rows rows() const { return parameters.normalized ? Rows::normalized : Rows::raw; }
};

/// Softmax, Gaussian with raw and with normalized rows, and kernels of a user's, whose bias is not half their scale.
std::vector<reference::Kernel> kernels(Index d) {
  return {reference::softmax_kernel(d),
          reference::gaussian_kernel(d),
          reference::gaussian_kernel(d, {}, true),
          {.scale = 0.3, .bias = 0.1, .normalized = false},
          {.scale = 0.2, .bias = 0.3, .normalized = true}};
}

/// All that kernel_matmul_backward writes.
template <class T>
struct Written {
  Matrix<T> dq, dk, dv, dbias;
};

template <class T>
Written<T> backward(const reference::Kernel& parameters, const Inputs<T>& in, const Matrix<T>& dout, Context& context) {
  const Kernel kernel{parameters};
  const auto unset = [](Index rows, Index cols) -> Matrix<T> { return Matrix<T>::Constant(rows, cols, test::kNaN<T>); };
  const Index n_k = in.k.rows(), d = in.k.cols();
  Written<T> to{unset(in.q.rows(), d), unset(n_k, d), unset(n_k, in.v.cols()), unset(n_k, 1)};
  Matrix<T> out(in.q.rows(), in.v.cols());
  std::vector<T> lse(static_cast<std::size_t>(in.q.rows()));
  attn::kernel_matmul(kernel, in, out, std::span<T>(lse), context);
  attn::kernel_matmul_backward(kernel, in, out, std::span<const T>(lse), dout, {to.dq, to.dk, to.dv}, context,
                               std::span<T>(to.dbias.data(), static_cast<std::size_t>(n_k)));
  return to;
}

template <class T>
void expect_close(const Written<T>& found, const reference::Gradients& expected) {
  constexpr double kTolerance = sizeof(T) == 4 ? 2e-5 : 1e-11;
  const auto expect = [](const Matrix<T>& a, const reference::Matrix& b, const char* name) {
    EXPECT_LE((a.template cast<double>() - b).norm(), kTolerance * (1 + b.norm())) << name << " of norm " << b.norm();
  };
  expect(found.dq, expected.dq, "dq");
  expect(found.dk, expected.dk, "dk");
  expect(found.dv, expected.dv, "dv");
  expect(found.dbias, expected.dbias, "dbias");
}

template <class T>
bool bitwise_equal(const Written<T>& a, const Written<T>& b) {
  return test::bitwise_equal(a.dq, b.dq) && test::bitwise_equal(a.dk, b.dk) && test::bitwise_equal(a.dv, b.dv) &&
         test::bitwise_equal(a.dbias, b.dbias);
}

template <class T>
Matrix<T> random_dout(const Inputs<T>& in, std::uint64_t seed) {
  return test::Random(seed).normal(in.q.rows(), in.v.cols()).template cast<T>();
}

template <class T>
class Backward : public ::testing::Test {};
TYPED_TEST_SUITE(Backward, test::Scalars);

TYPED_TEST(Backward, IsTheOracles) {
  using T = TypeParam;
  Context context;
  for (const Shape& shape : {Shape{1, 1, 1, 1}, Shape{1, 50, 3, 16}, Shape{50, 1, 16, 33}, Shape{7, 13, 33, 3},
                             Shape{33, 33, 64, 1}, Shape{64, 100, 1, 64}, Shape{130, 65, 16, 18}}) {
    const auto x = test::make_tokens<T>(Family::init, shape, 211);
    const Conditions<T> conditions(shape.n_q, shape.n_k);
    for (const Inputs<T>& in : conditions.all(x)) {
      const Matrix<T> dout = random_dout(in, 212);
      for (const reference::Kernel& kernel : kernels(shape.d)) {
        SCOPED_TRACE(describe(in) + ", scale " + std::to_string(kernel.scale) + ", bias " +
                     std::to_string(kernel.bias));
        expect_close(backward(kernel, in, dout, context),
                     reference::attend_backward(kernel, test::to_reference(in), dout.template cast<double>()));
      }
    }
  }
}

/// Sizes whose keys, whose queries, or both are cut into parts.
TYPED_TEST(Backward, InPartsIsTheOraclesAndBitwiseEqualWhateverTheWorkers) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{300, 1100, 5, 3}, Shape{700, 40, 3, 5}, Shape{530, 1030, 3, 3}, Shape{70, 2100, 2, 5}}) {
    const auto x = test::make_tokens<T>(Family::init, shape, 213);
    const Conditions<T> conditions(shape.n_q, shape.n_k);
    const auto all = conditions.all(x);
    for (const std::size_t condition : {0U, 5U, 6U, 11U, 12U, 17U}) {  // of each causal limit the first and the last
      const Inputs<T>& in = all[condition];
      const Matrix<T> dout = random_dout(in, 214);
      for (const reference::Kernel& kernel : {kernels(shape.d)[0], kernels(shape.d)[3]}) {
        SCOPED_TRACE(describe(in) + ", scale " + std::to_string(kernel.scale));
        Context serial;
        const Written<T> found = backward(kernel, in, dout, serial);
        expect_close(found, reference::attend_backward(kernel, test::to_reference(in), dout.template cast<double>()));
        for (auto& [name, context] : test::contexts())
          EXPECT_TRUE(bitwise_equal(backward(kernel, in, dout, context), found)) << name;
      }
    }
  }
}

/// Gradients by the key bias are made where the kernel needs them, whether one asks for them or not.
TYPED_TEST(Backward, WithoutTheBiasesGradientTheOthersAreTheSame) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{50, 70, 9, 5}, Shape{700, 40, 3, 5}}) {
    const auto x = test::make_tokens<T>(Family::init, shape, 215);
    const Conditions<T> conditions(shape.n_q, shape.n_k);
    for (const Inputs<T>& in : conditions.all(x)) {
      for (const reference::Kernel& parameters : kernels(shape.d)) {
        SCOPED_TRACE(describe(in) + ", scale " + std::to_string(parameters.scale));
        const Kernel kernel{parameters};
        const Matrix<T> dout = random_dout(in, 216);
        Context context;
        const Written<T> expected = backward(parameters, in, dout, context);
        Written<T> found = expected;
        Matrix<T> out(shape.n_q, shape.d_v);
        std::vector<T> lse(static_cast<std::size_t>(shape.n_q));
        attn::kernel_matmul(kernel, in, out, std::span<T>(lse), context);
        for (Matrix<T>* m : {&found.dq, &found.dk, &found.dv}) m->setConstant(test::kNaN<T>);
        attn::kernel_matmul_backward(kernel, in, out, std::span<const T>(lse), dout, {found.dq, found.dk, found.dv},
                                     context);
        EXPECT_TRUE(bitwise_equal(found, expected));
      }
    }
  }
}

/// The derivative at 0 of a smooth f, by five points.
double derivative(const std::function<double(double)>& f) {
  constexpr double kStep = 2e-4;  // so short that the largest row sums of the iterations stay the largest
  return (8 * (f(kStep) - f(-kStep)) - (f(2 * kStep) - f(-2 * kStep))) / (12 * kStep);
}

using Loss = std::function<double(const Tokens<double>&)>;

/// Along random directions of q, k and v the gradients are the loss's derivatives, to 1e-6 of what such a direction has
/// in the mean.
void expect_gradients(const Loss& loss, const Tokens<double>& x, const Tokens<double>& gradients) {
  test::Random random(221);
  for (const auto& [name, part] :
       {std::pair{"q", &Tokens<double>::q}, {"k", &Tokens<double>::k}, {"v", &Tokens<double>::v}}) {
    const Matrix<double>& gradient = gradients.*part;
    const Matrix<double> direction = random.normal(gradient.rows(), gradient.cols());
    const double expected = derivative([&, moved = part](double step) {
      Tokens<double> y = x;
      y.*moved += step * direction;
      return loss(y);
    });
    EXPECT_NEAR(gradient.cwiseProduct(direction).sum(), expected, 1e-6 * gradient.norm() + 1e-10) << "by " << name;
  }
}

/// Gradients of a training step, of the shapes of q, k and v.
template <class Method>
Tokens<double> train(const Method& method, const Inputs<double>& in, const Matrix<double>& dout,
                     typename Method::Saved& saved, Context& context) {
  Matrix<double> out(in.q.rows(), in.v.cols());
  Tokens<double> gradients{in.q, in.k, in.v};
  method.forward(in, out, context, saved);
  method.backward(in, out, dout, saved, {gradients.q, gradients.k, gradients.v}, context);
  return gradients;
}

double sum_of_products(const Matrix<double>& a, const Matrix<double>& b) {
  return a.cwiseProduct(b).sum();
}

struct Case {
  std::string name;
  AnyApproximator<double> method;
};

/// Every method, of a small size and of one that exceeds the tokens', and every option that its gradients depend on.
std::vector<Case> cases() {
  using attn::GaussianKernel, attn::PreconditionedPinv, attn::StridedSample;
  std::vector<Case> all;
  const auto add = [&](std::string name, const auto& method) {
    all.push_back({std::move(name), AnyApproximator<double>(method)});
  };
  for (const auto& entry : attn::methods<double>()) {
    attn::MethodOptions few{.num_landmarks = 7};
    few.num_clusters = few.num_groups = 1;  // a step of a difference may move a token to another cluster
    few.num_near = 0;
    if (entry.name != "shifted-nystrom") all.push_back({std::string(entry.name), entry.make(few)});
    all.push_back({std::string(entry.name) + ", many landmarks", entry.make(test::of_size(200))});
  }
  const GaussianKernel normalized{.rows = Rows::normalized};
  add("softmax, scale", attn::SoftmaxAttention<double>({.scale = 0.7}));
  add("gaussian, normalized", attn::GaussianAttention<double>(normalized));
  add("gaussian, bandwidth", attn::GaussianAttention<double>({.bandwidth = 1.7}));
  add("nystrom, 1 iteration", attn::Nystrom<double>(SegmentMeans{3}, {.iterations = 1}, {.scale = 0.4}));
  add("skyformer, normalized", attn::Skyformer<double>({.num_landmarks = 8}, {}, normalized));
  for (const int iterations : {1, 6}) {
    const std::string suffix = ", " + std::to_string(iterations) + " iterations";
    const PreconditionedPinv inverse{.gamma = 0.2, .iterations = iterations};
    add("skyformer, preconditioned" + suffix, attn::Skyformer<double, StridedSample, PreconditionedPinv>({9}, inverse));
    add("lifted-softmax, preconditioned" + suffix,
        attn::LiftedSoftmax<double, StridedSample, PreconditionedPinv>({9}, inverse));
  }
  add("lifted-softmax, strided", attn::LiftedSoftmax<double, StridedSample>({5}, {.gamma = 0.1}, {.scale = 0.5}));
  return all;
}

TEST(Gradients, OfEveryMethodAreItsDerivatives) {
  Context context;
  for (const Shape& shape : {Shape{1, 1, 3, 2}, Shape{1, 33, 16, 1}, Shape{33, 33, 3, 1}, Shape{20, 45, 16, 5},
                             Shape{45, 20, 1, 3}, Shape{64, 64, 33, 17}}) {
    const auto x = test::make_tokens<double>(Family::init, shape, 222);
    const Conditions<double> conditions(shape.n_q, shape.n_k);
    for (const Inputs<double>& in : conditions.all(x)) {
      const Matrix<double> dout = random_dout(in, 223);
      for (const auto& [name, method] : cases()) {
        if (!method.supports(in)) continue;
        SCOPED_TRACE(name + ", " + describe(in));
        AnyApproximator<double>::Saved saved;
        const Loss loss = [&, &m = method](const Tokens<double>& y) {
          Matrix<double> out(shape.n_q, shape.d_v);
          m.forward({.q = y.q, .k = y.k, .v = y.v, .mask = in.mask, .key_bias = in.key_bias}, out, context);
          return sum_of_products(dout, out);
        };
        expect_gradients(loss, x, train(method, in, dout, saved, context));
      }
    }
  }
}

/// Many more landmarks than their kernel matrix has directions: since the method is exact, its gradients are those of
/// exact attention.
TYPED_TEST(Backward, OfSkyformerLeavesOutDirectionsThatAreZeroButForRounding) {
  using T = TypeParam;
  Context context;
  const auto x = test::curve_tokens<T>({400, 500, 8, 5}, 228);
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  const Matrix<T> dout = random_dout(in, 229);
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const auto expected = reference::attend_backward(reference::gaussian_kernel(8, {}, rows == Rows::normalized),
                                                     test::to_reference(in), dout.template cast<double>());
    for (const double gamma : {0.0, 1e-6}) {
      const attn::Skyformer<T> method({.num_landmarks = 400}, {.gamma = gamma}, {.rows = rows});
      typename attn::Skyformer<T>::Saved saved;
      Matrix<T> out(400, 5), dq = x.q, dk = x.k, dv = x.v;
      method.forward(in, out, context, saved);
      method.backward(in, out, dout, saved, {dq, dk, dv}, context);
      const double tolerance = sizeof(T) == 4 ? 5e-3 : gamma > 0 ? 1e-3 : 1e-5;
      EXPECT_LE(test::relative_error(dq, expected.dq), tolerance) << gamma;
      EXPECT_LE(test::relative_error(dk, expected.dk), tolerance) << gamma;
      EXPECT_LE(test::relative_error(dv, expected.dv), sizeof(T) == 4 ? 1e-5 : 1e-6) << gamma;
    }
  }
}

/// A training step of Skyformer or LiftedSoftmax, and its gradient by the key bias where there is one.
template <class T, class Method>
Written<T> train_with_bias(const Method& method, const Inputs<T>& in, const Matrix<T>& dout, Context& context) {
  typename Method::Saved saved;
  Written<T> to{in.q, in.k, in.v, Matrix<T>::Zero(in.k.rows(), 1)};
  Matrix<T> out(in.q.rows(), in.v.cols());
  method.forward(in, out, context, saved);
  const attn::Gradients<T> gradients{to.dq, to.dk, to.dv};
  if constexpr (requires { method.backward(in, out, dout, saved, gradients, std::span<T>{}, context); }) {
    method.backward(in, out, dout, saved, gradients,
                    std::span<T>(to.dbias.data(), static_cast<std::size_t>(in.k.rows())), context);
  } else {
    method.backward(in, out, dout, saved, gradients, context);
  }
  return to;
}

template <class T, class U>
void expect_near(const Written<T>& found, const Written<U>& expected, double tolerance) {
  const auto expect = [&](const Matrix<T>& a, const Matrix<U>& b, const char* name) {
    EXPECT_LE((a.template cast<double>() - b.template cast<double>()).norm(),
              tolerance * b.template cast<double>().norm())
        << name;
  };
  expect(found.dq, expected.dq, "dq");
  expect(found.dk, expected.dk, "dk");
  expect(found.dv, expected.dv, "dv");
  expect(found.dbias, expected.dbias, "dbias");
}

/// What all key biases have in common changes no gradient of normalized rows, and multiplies those of raw ones.
TYPED_TEST(Backward, OfSkyformerKnowsACommonBias) {
  using T = TypeParam;
  Context context;
  const auto x = test::make_tokens<T>(Family::init, {60, 70, 16, 5}, 230);
  Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  const Matrix<T> dout = random_dout(in, 231);
  const auto with_bias = [&](const auto& method, double common) {
    std::vector<T> bias(70, static_cast<T>(common));
    bias[3] = -test::kInf<T>;
    in.key_bias = bias;
    return train_with_bias(method, in, dout, context);
  };
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-11, large = sizeof(T) == 4 ? 80 : 600;
  const attn::Skyformer<T> normalized({.num_landmarks = 24}, {}, {.rows = Rows::normalized}),
      raw({.num_landmarks = 24});
  const attn::LiftedSoftmax<T> lifted({.num_landmarks = 24});
  for (const double common : {40.0, 89.0, 1e4, -1e4, 1e30, static_cast<double>(std::numeric_limits<T>::lowest())}) {
    expect_near(with_bias(normalized, common), with_bias(normalized, 0), tolerance);
    expect_near(with_bias(lifted, common), with_bias(lifted, 0), 50 * tolerance);
  }
  for (const double common : {20.0, -20.0, large, -large}) {
    Written<T> expected = with_bias(raw, 0);
    const T factor = static_cast<T>(std::exp(common));
    for (Matrix<T>* m : {&expected.dq, &expected.dk, &expected.dv, &expected.dbias}) *m *= factor;
    expect_near(with_bias(raw, common), expected, tolerance);
  }
}

/// Tokens so far from one another that float's exponents do not reach from one landmark to another.
TEST(Gradients, OfSkyformerInFloatAreThoseInDoubleWhereTokensAreFarFromOneAnother) {
  using attn::PreconditionedPinv, attn::RidgeInverse, attn::StridedSample;
  Context context;
  const attn::GaussianKernel kernel{.rows = Rows::normalized};
  const auto keep_query = test::random_keep(90, 0.8, 233), keep_key = test::random_keep(120, 0.7, 234);
  const auto bias = test::random_key_bias<float>(120, 0.1, 235);
  for (const double deviation : {3.0, 5.0}) {
    const auto x = test::scaled(test::make_tokens<float>(Family::unit, {90, 120, 64, 5}, 232), deviation);
    for (const bool masked : {false, true}) {
      Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
      if (masked) in.mask = {.keep_key = keep_key, .keep_query = keep_query};
      if (masked) in.key_bias = bias;
      const std::vector<double> wide_bias(in.key_bias.begin(), in.key_bias.end());
      const Tokens<double> y{x.q.cast<double>(), x.k.cast<double>(), x.v.cast<double>()};
      const Inputs<double> wide{.q = y.q, .k = y.k, .v = y.v, .mask = in.mask, .key_bias = wide_bias};
      const Matrix<float> dout = random_dout(in, 236);
      const Matrix<double> wide_dout = dout.cast<double>();
      const auto compare = [&]<class Inverse>(const Inverse& inverse) {
        const StridedSample landmarks{.num_landmarks = 24};
        expect_near(train_with_bias(attn::Skyformer<float, StridedSample, Inverse>(landmarks, inverse, kernel), in,
                                    dout, context),
                    train_with_bias(attn::Skyformer<double, StridedSample, Inverse>(landmarks, inverse, kernel), wide,
                                    wide_dout, context),
                    2e-4);
      };
      SCOPED_TRACE(std::to_string(deviation) + ", " + describe(in));
      compare(RidgeInverse{});
      compare(PreconditionedPinv{});
    }
  }
}

/// Where double's exponents would not do with one common factor.
TEST(Gradients, OfSkyformerAreItsDerivativesWhereTokensAreFarFromOneAnother) {
  Context context;
  const auto x = test::scaled(test::make_tokens<double>(Family::unit, {40, 50, 32, 4}, 237), 12);
  const std::vector<double> bias(50, 400);
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    Inputs<double> in{.q = x.q, .k = x.k, .v = x.v};
    if (rows == Rows::raw) in.key_bias = bias;
    const Matrix<double> dout = (rows == Rows::raw ? 1e-170 : 1.0) * random_dout(in, 238);
    const attn::Skyformer<double, attn::StridedSample> method({16}, {}, {.rows = rows});
    attn::Skyformer<double, attn::StridedSample>::Saved saved;
    const Loss loss = [&](const Tokens<double>& y) {
      Matrix<double> out(40, 4);
      method.forward({.q = y.q, .k = y.k, .v = y.v, .key_bias = in.key_bias}, out, context);
      return sum_of_products(dout, out);
    };
    const Tokens<double> gradients = train(method, in, dout, saved, context);
    EXPECT_FALSE(saved.exponents.empty()) << "one common factor does";
    expect_gradients(loss, x, gradients);
  }
}

/// [z z1] of random numbers, so that some rows' sums are negative: the guard is what divides these, and makes them
/// large.
TEST(Gradients, OfGuardedDivisorsAreTheirDerivatives) {
  Context context;
  test::Random random(227);
  const attn::GaussianKernel kernel{.rows = Rows::normalized};
  const Tokens<double> x{random.normal(12, 3), random.normal(5, 3), random.normal(5, 3)};  // q, landmarks, [z z1]
  const Matrix<double> dout = random.normal(12, 2);
  Matrix<double> out(12, 2);
  const auto queries = [](const Tokens<double>& y) { return Inputs<double>{.q = y.q, .k = y.k, .v = y.v}; };
  const auto divide = [&](const Tokens<double>& y) {
    Matrix<double> values(5, 4);
    values << y.v, y.v.col(2).cwiseAbs();
    attn::detail::divide_rows<double>(kernel, attn::detail::sources(queries(y)), y.k, values,
                                      attn::MatrixRef<double>(out), context);
  };
  divide(x);
  EXPECT_GT(out.cwiseAbs().maxCoeff(), 1e4) << "no divisor is guarded";
  Tokens<double> gradients = x;
  attn::detail::divide_rows_backward<double>(kernel, queries(x), x.k, Matrix<double>(x.v), out, dout, gradients.q,
                                             gradients.k, gradients.v, context);
  const Loss loss = [&](const Tokens<double>& y) {
    divide(y);
    return sum_of_products(dout, out);
  };
  expect_gradients(loss, x, gradients);
}

/// Z - delta Z Z with delta given and Z by the iteration's definition.
struct PaperCore {
  int iterations;
  double delta;

  void check(std::string_view) const {}
  template <class T>
  void apply(attn::MatrixRef<T> a, attn::MatrixRef<T> x, Context&) const {
    const Matrix<T> eye = Matrix<T>::Identity(a.rows(), a.cols());
    Matrix<T> z = a.transpose() / (a.cwiseAbs().rowwise().sum().maxCoeff() * a.cwiseAbs().colwise().sum().maxCoeff());
    for (int i = 0; i < iterations; ++i) {
      const Matrix<T> az = a * z;
      z = (z * (13 * eye - az * (15 * eye - az * (7 * eye - az)))).eval() / 4;
    }
    const Matrix<T> once = z * x;
    x = once - delta * z * once;
  }
  template <class T>
  void backward(attn::MatrixRef<T>, attn::MatrixRef<T>, attn::MatrixRef<T>, attn::MatrixRef<T>, Context&) const {
    throw std::logic_error("only forward passes are compared");
  }
};

/// scale_i (N v)_i + shift_i v_i of what the forward pass saved: what it returned, and what its gradients are those of.
TEST(Gradients, OfSpectralShiftAreTheDerivativesForAGivenShift) {
  using attn::Nystrom, attn::ShiftedNystrom;
  Context context;
  const auto keep = test::random_keep(64, 0.8, 224);
  for (const Mask& mask : {Mask{}, Mask{.keep_key = keep, .keep_query = keep}}) {
    const auto x = test::make_tokens<double>(Family::self, {64, 64, 12, 5}, 225);
    const Inputs<double> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
    const Matrix<double> dout = random_dout(in, 226);
    for (const ShiftMode mode : {ShiftMode::paper, ShiftMode::scalar, ShiftMode::row}) {
      for (const int iterations : {1, 6}) {
        SCOPED_TRACE("mode " + std::to_string(static_cast<int>(mode)) + ", " + std::to_string(iterations) +
                     " iterations, " + describe(in));
        const ShiftedNystrom<double> method(SegmentMeans{7}, {.mode = mode, .iterations = iterations});
        ShiftedNystrom<double>::Saved saved;
        const Tokens<double> gradients = train(method, in, dout, saved, context);
        const Nystrom<double, SegmentMeans, PaperCore> nystrom(SegmentMeans{7}, {iterations, saved.delta});
        const auto shifted = [&](const Tokens<double>& y) {
          Matrix<double> out(64, 5);
          nystrom.forward({.q = y.q, .k = y.k, .v = y.v, .mask = mask}, out, context);
          for (Index i = 0; i < 64; ++i) {
            const auto at = static_cast<std::size_t>(i);
            out.row(i) = saved.scale[at] * out.row(i) + saved.shift[at] * y.v.row(i);
          }
          return out;
        };
        Matrix<double> out(64, 5);
        method.forward(in, out, context);
        EXPECT_LE(test::relative_error(shifted(x), out), 1e-12);
        EXPECT_GT(*std::max_element(saved.shift.begin(), saved.shift.end()), 0.01) << "no shift tests nothing";
        expect_gradients([&](const Tokens<double>& y) { return sum_of_products(dout, shifted(y)); }, x, gradients);
      }
    }
  }
}

/// kappa = exp(scale q.k), rows raw: a weight may be any positive number.
struct RawKernel {
  double scale(Index) const { return 1 / std::numbers::log2e; }
  double bias(Index) const { return 0; }
  Rows rows() const { return Rows::raw; }
};

template <class T>
class BackwardOf : public ::testing::Test {};
TYPED_TEST_SUITE(BackwardOf, test::Scalars);

/// For one query, one key and dout = 1, dv is the weight itself.
TYPED_TEST(BackwardOf, RawWeightsMayBeAsLargeAsNumbersAre) {
  using T = TypeParam;
  constexpr int kEnd = std::numeric_limits<T>::max_exponent;
  const Matrix<T> one = Matrix<T>::Ones(1, 1), zero = Matrix<T>::Zero(1, 1);
  for (const double exponent :
       {0.5, 100.0, kEnd - 1.0, kEnd - 0.6, kEnd - 0.4, kEnd - 0.1, kEnd + 0.1, kEnd + 1.5, 2.0 * kEnd, 1e6}) {
    const Matrix<T> k = Matrix<T>::Constant(1, 1, static_cast<T>(exponent));
    Matrix<T> dq(1, 1), dk(1, 1), dv(1, 1);
    Context context;
    attn::kernel_matmul_backward(RawKernel{}, Inputs<T>{.q = one, .k = k, .v = zero}, zero, {}, one, {dq, dk, dv},
                                 context);
    if (exponent > kEnd) {
      EXPECT_EQ(dv(0, 0), test::kInf<T>) << exponent;
    } else {
      const T expected = std::exp2(static_cast<T>(exponent));
      EXPECT_NEAR(dv(0, 0) / expected, 1, (4 + exponent) * std::numeric_limits<T>::epsilon()) << exponent;
    }
  }
}

}  // namespace
