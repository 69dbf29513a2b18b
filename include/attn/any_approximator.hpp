/// Methods chosen at run time, by name.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/automatic.hpp>
#include <attn/exact.hpp>
#include <attn/lifted_softmax.hpp>
#include <attn/multipole.hpp>
#include <attn/nystrom.hpp>
#include <attn/skyformer.hpp>
#include <attn/spectral_shift.hpp>

#include <any>
#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn {

namespace detail {

/// What any method saves, by any type.
struct AnySaved {
  std::any of_method{};  ///< empty before the first forward pass
};

/// What stands for a method of float where there is no need of one.
struct NoMethod {};

}  // namespace detail

/// Any Approximator as one type, and an Approximator itself: a method by value, and one indirect call a forward.
template <class T>
class AnyApproximator {
 public:
  /// @{ As Approximator says.
  using Scalar = T;
  static constexpr std::string_view kName = "any";

  /// Holds a copy of the method.
  template <class A>
    requires(!std::same_as<A, AnyApproximator>) && Approximator<A> && std::copyable<typename A::Saved> &&
                std::same_as<typename A::Scalar, T>
  explicit AnyApproximator(A method) : wide_(wide_of(method)), method_(std::move(method)), calls_(&kCalls<A>) {}

  /// The name of the method inside.
  std::string_view name() const { return calls_->name; }
  bool supports(const Inputs<T>& in) const { return calls_->supports(method_, in); }

  /// Of a narrow T the method inside as one of float, which saves the same.
  const auto& wide() const
    requires NarrowScalar<T>
  {
    return wide_;
  }

  /// What the method inside saves.
  using Saved = detail::AnySaved;

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    calls_->forward(method_, in, out, context, nullptr);
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    calls_->forward(method_, in, out, context, &saved);
  }

  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    calls_->backward(method_, in, out, dout, saved, gradients, context);
  }
  /// @}

 private:
  /// What is called of a method, which is the first argument.
  struct Calls {
    std::string_view name;
    bool (*supports)(const std::any&, const Inputs<T>& in);
    void (*forward)(const std::any&, const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved* saved);
    void (*backward)(const std::any&, const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout,
                     const Saved& saved, const Gradients<T>& gradients, Context& context);
  };

  template <class A>
  static const A& method_in(const std::any& method) {
    return *std::any_cast<A>(&method);
  }

  template <class A>
  static bool supports_in(const std::any& method, const Inputs<T>& in) {
    return method_in<A>(method).supports(in);
  }

  template <class A>
  static void forward_in(const std::any& method, const Inputs<T>& in, MatrixRef<T> out, Context& context,
                         Saved* saved) {
    if (saved == nullptr) return method_in<A>(method).forward(in, out, context);
    auto* inner = std::any_cast<typename A::Saved>(&saved->of_method);
    if (inner == nullptr) inner = &saved->of_method.template emplace<typename A::Saved>();
    method_in<A>(method).forward(in, out, context, *inner);
  }

  template <class A>
  static void backward_in(const std::any& method, const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout,
                          const Saved& saved, const Gradients<T>& gradients, Context& context) {
    const auto* inner = std::any_cast<typename A::Saved>(&saved.of_method);
    if (inner == nullptr) detail::refuse(A::kName, "saved is not of a forward pass of this method");
    method_in<A>(method).backward(in, out, dout, *inner, gradients, context);
  }

  template <class A>
  static constexpr Calls kCalls{A::kName, &supports_in<A>, &forward_in<A>, &backward_in<A>};

  template <class A>
  static auto wide_of(const A& method) {
    if constexpr (NarrowScalar<T>) {
      return AnyApproximator<float>(detail::wide_method(method));
    } else {
      return detail::NoMethod{};
    }
  }

  [[no_unique_address]] std::conditional_t<NarrowScalar<T>, AnyApproximator<detail::Arithmetic<T>>, detail::NoMethod>
      wide_;
  std::any method_;
  const Calls* calls_;
};

/// Options of all methods. A method has some of them, with its own default where one is not set.
struct MethodOptions {
  std::optional<Index> num_landmarks{};   ///< of all approximations but multipole and automatic
  std::optional<Index> num_clusters{};    ///< of Clusters: multipole
  std::optional<Index> num_groups{};      ///< of Clusters
  std::optional<Index> num_near{};        ///< of Clusters
  std::optional<Index> num_branches{};    ///< of Clusters
  std::optional<Index> num_open{};        ///< of Clusters
  std::optional<int> iterations{};        ///< of the inverse: nystrom, shifted-nystrom
  std::optional<int> num_probes{};        ///< of SpectralShift
  std::optional<double> gamma{};          ///< of RidgeInverse: skyformer, lifted-softmax
  std::optional<double> max_error{};      ///< of Automatic
  std::optional<double> scale{};          ///< of SoftmaxKernel
  std::optional<double> bandwidth{};      ///< of GaussianKernel
  std::uint64_t seed = 0;                 ///< of UniformSample: skyformer, lifted-softmax; of Automatic
  Rows rows = Rows::raw;                  ///< of GaussianKernel
  ShiftMode mode = ShiftMode::row;        ///< of SpectralShift
  Products products = Products::fastest;  ///< of softmax and gaussian
};

/// A method that programs can choose: its name, a line for their help texts, and how it is made.
template <class T>
struct MethodEntry {
  std::string_view name;                             ///< as make_approximator takes it
  std::string_view description;                      ///< a line
  std::string_view options;                          ///< the names of those of MethodOptions that it has
  AnyApproximator<T> (*make)(const MethodOptions&);  ///< the method with these options; others are ignored

  /// Whether the method has that option.
  bool takes(std::string_view option) const { return options.find(option) != options.npos; }
};

namespace detail {

/// Throws where an option is set that is not among those named. No option's name is a part of another's.
inline void check_options(std::string_view method, std::string_view names, const MethodOptions& o) {
  const auto check = [&](std::string_view option, bool is_set) {
    if (!is_set || names.find(option) != names.npos) return;
    const auto length = [](std::string_view text) { return static_cast<int>(text.size()); };
    refuse("make_approximator", "%.*s has no option %.*s; it has %.*s", length(method), method.data(), length(option),
           option.data(), length(names), names.data());
  };
  constexpr MethodOptions kDefaults{};
  check("num_landmarks", o.num_landmarks.has_value());
  check("num_clusters", o.num_clusters.has_value());
  check("num_groups", o.num_groups.has_value());
  check("num_near", o.num_near.has_value());
  check("num_branches", o.num_branches.has_value());
  check("num_open", o.num_open.has_value());
  check("iterations", o.iterations.has_value());
  check("num_probes", o.num_probes.has_value());
  check("gamma", o.gamma.has_value());
  check("max_error", o.max_error.has_value());
  check("scale", o.scale.has_value());
  check("bandwidth", o.bandwidth.has_value());
  check("seed", o.seed != kDefaults.seed);
  check("rows", o.rows != kDefaults.rows);
  check("mode", o.mode != kDefaults.mode);
  check("products", o.products != kDefaults.products);
}

inline UniformSample uniform_sample(const MethodOptions& o) {
  return {.num_landmarks = o.num_landmarks.value_or(UniformSample{}.num_landmarks), .seed = o.seed};
}

inline SegmentMeans segment_means(const MethodOptions& o) {
  return {.num_landmarks = o.num_landmarks.value_or(SegmentMeans{}.num_landmarks)};
}

inline Clusters clusters(const MethodOptions& o) {
  return {.num_clusters = o.num_clusters,
          .num_groups = o.num_groups,
          .num_near = o.num_near,
          .num_branches = o.num_branches,
          .num_open = o.num_open};
}

template <class T>
inline constexpr MethodEntry<T> kMethods[] = {
    {"softmax", "exact softmax attention", "scale, products",
     [](const MethodOptions& o) {
       return AnyApproximator<T>(SoftmaxAttention<T>{o.products, SoftmaxKernel{.scale = o.scale}});
     }},
    {"gaussian", "exact Gaussian (kernelized) attention", "bandwidth, rows, products",
     [](const MethodOptions& o) {
       return AnyApproximator<T>(
           GaussianAttention<T>{o.products, GaussianKernel{.bandwidth = o.bandwidth, .rows = o.rows}});
     }},
    {"multipole", "softmax by near keys and by clusters of the others",
     "num_clusters, num_groups, num_near, num_branches, num_open, scale",
     [](const MethodOptions& o) {
       return AnyApproximator<T>(Multipole<T>{clusters(o), SoftmaxKernel{.scale = o.scale}});
     }},
    {"automatic", "softmax within an error, by multipole or exactly", "max_error, seed, scale",
     [](const MethodOptions& o) {
       return AnyApproximator<T>(Automatic<T>{.max_error = o.max_error.value_or(Automatic<T>{}.max_error),
                                              .kernel = SoftmaxKernel{.scale = o.scale},
                                              .seed = o.seed});
     }},
    {"nystrom", "softmax through segment means (Nystromformer)", "num_landmarks, iterations, scale",
     [](const MethodOptions& o) {
       return AnyApproximator<T>(Nystrom<T>{segment_means(o), IterativePinv{.iterations = o.iterations.value_or(6)},
                                            SoftmaxKernel{.scale = o.scale}});
     }},
    {"shifted-nystrom", "nystrom plus a shifted identity, for slowly decaying spectra",
     "num_landmarks, iterations, num_probes, mode, scale",
     [](const MethodOptions& o) {
       const SpectralShift shift{
           .mode = o.mode, .iterations = o.iterations.value_or(6), .num_probes = o.num_probes.value_or(32)};
       return AnyApproximator<T>(ShiftedNystrom<T>{segment_means(o), shift, SoftmaxKernel{.scale = o.scale}});
     }},
    {"skyformer", "Gaussian attention through sampled tokens (Skyformer)",
     "num_landmarks, seed, gamma, bandwidth, rows",
     [](const MethodOptions& o) {
       return AnyApproximator<T>(Skyformer<T>{uniform_sample(o), RidgeInverse{.gamma = o.gamma.value_or(0.1)},
                                              GaussianKernel{.bandwidth = o.bandwidth, .rows = o.rows}});
     }},
    {"lifted-softmax", "softmax through sampled tokens, lifted as Skyformer is", "num_landmarks, seed, gamma, scale",
     [](const MethodOptions& o) {
       return AnyApproximator<T>(LiftedSoftmax<T>{uniform_sample(o), RidgeInverse{.gamma = o.gamma.value_or(1e-3)},
                                                  SoftmaxKernel{.scale = o.scale}});
     }},
};

}  // namespace detail

/// All methods, in the order of the documentation.
template <class T>
std::span<const MethodEntry<T>> methods() {
  return detail::kMethods<T>;
}

/// The entry of the method of that name. Throws std::invalid_argument with the names that there are.
template <class T>
const MethodEntry<T>& find_method(std::string_view name) {
  std::string names;
  for (const MethodEntry<T>& method : methods<T>()) {
    if (method.name == name) return method;
    names.append(names.empty() ? "" : ", ").append(method.name);
  }
  detail::refuse("make_approximator", "no method is called \"%.*s\"; there are %s", static_cast<int>(name.size()),
                 name.data(), names.c_str());
}

/// The method of that name. Throws std::invalid_argument with the names that there are, or where an option is set that
/// the method does not have: find_method<T>(name).make(options) ignores it.
template <class T>
AnyApproximator<T> make_approximator(std::string_view name, const MethodOptions& options = {}) {
  const MethodEntry<T>& method = find_method<T>(name);
  detail::check_options(method.name, method.options, options);
  return method.make(options);
}

}  // namespace attn
