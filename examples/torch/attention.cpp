#include "torch/attention.hpp"

#include <attn/any_approximator.hpp>

#include <attn/context.hpp>
#include <attn/mask.hpp>
#include <attn/multi_head.hpp>

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

namespace attn_torch {
namespace {

using attn::AnyApproximator;
using attn::Index;
using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "attn_torch: ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

/// attn's parallel parts on torch's threads.
struct TorchThreads {
  int workers() const { return at::get_num_threads(); }

  template <class Task>
  void run(Index n, const Task& task) const {
    at::parallel_for(0, n, 1, [&](Index first, Index last) {
      for (Index item = first; item < last; ++item) task(item, at::get_thread_num());
    });
  }
};

/// One for each thread that calls: autograd may come back on another.
attn::Context& context() {
  thread_local attn::Context of_this_thread{TorchThreads{}};
  return of_this_thread;
}

/// Whether attn can read x (batch, heads, n, d) where it lies. The stride of a dimension of one entry says nothing.
bool has_rows(const Tensor& x) {
  const bool side_by_side = x.size(3) == 1 || x.stride(3) == 1;
  return side_by_side && (x.size(2) == 1 || x.stride(2) >= x.size(3));
}

template <class T>
void check(const char* name, const Tensor& x) {
  if (!x.defined()) refuse(name, " is undefined");
  if (!x.device().is_cpu()) refuse(name, " is on ", x.device(), ", should be on cpu");
  if (x.scalar_type() != c10::CppTypeToScalarType<T>::value) {
    refuse(name, " has elements of type ", x.scalar_type(), ", should be ", c10::CppTypeToScalarType<T>::value);
  }
  if (x.dim() != 4) refuse(name, " has ", x.dim(), " dimensions, should have 4 (batch, heads, tokens, features)");
  if (!has_rows(x))
    refuse(name, " has strides ", x.strides(), ", should have features side by side: use .contiguous()");
}

/// x (batch, heads, n, d) in its own memory.
template <class T>
attn::HeadsView<T> view(const Tensor& x) {
  return {x.data_ptr<std::remove_const_t<T>>(),    x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1),
          x.size(2) == 1 ? x.size(3) : x.stride(2)};
}

void check_keep(const char* name, const Tensor& keep, Index batch, Index n) {
  if (!keep.defined()) return;
  if (keep.scalar_type() != torch::kBool || !keep.device().is_cpu() || !keep.is_contiguous()) {
    refuse(name, " should be a contiguous boolean tensor on cpu");
  }
  if (keep.dim() != 2 || keep.size(0) != batch || keep.size(1) != n) {
    refuse(name, " is ", keep.sizes(), ", should be [", batch, ", ", n, "]");
  }
}

std::span<const std::uint8_t> row(const Tensor& keep, Index b) {
  if (!keep.defined()) return {};
  const auto n = static_cast<std::size_t>(keep.size(1));
  return {static_cast<const std::uint8_t*>(keep.data_ptr()) + static_cast<std::size_t>(b) * n, n};
}

/// One for each batch item, or none at all.
std::vector<attn::Mask> masks(const Keep& keep, Index batch) {
  std::vector<attn::Mask> all;
  if (!keep.key.defined() && !keep.query.defined()) return all;
  for (Index b = 0; b < batch; ++b) all.push_back({.keep_key = row(keep.key, b), .keep_query = row(keep.query, b)});
  return all;
}

/// What is no tensor of the graph.
template <class T>
struct Call {
  const AnyApproximator<T>& method;
  const Keep& keep;
};

/// A step's method and what it saves, kept in the graph.
template <class T>
struct Step : torch::CustomClassHolder {
  explicit Step(AnyApproximator<T> m) : method(std::move(m)) {}
  AnyApproximator<T> method;
  std::vector<typename AnyApproximator<T>::Saved> saved;
};

/// (batch, n_q, H_q, d_v) in memory, seen as (batch, H_q, n_q, d_v).
Tensor result_of(const Tensor& q, const Tensor& v) {
  return torch::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options().requires_grad(false)).transpose(1, 2);
}

template <class T>
struct Attend : torch::autograd::Function<Attend<T>> {
  static Tensor forward(AutogradContext* graph, const Call<T>& call, const Tensor& q, const Tensor& k,
                        const Tensor& v) {
    Tensor out = result_of(q, v);
    auto step = c10::make_intrusive<Step<T>>(call.method);
    attn::multi_head(call.method, view<const T>(q), view<const T>(k), view<const T>(v), view<T>(out),
                     masks(call.keep, q.size(0)), context(), step->saved);
    graph->save_for_backward({q, k, v, out, call.keep.key, call.keep.query});
    graph->saved_data["step"] = torch::IValue::make_capsule(step);
    return out;
  }

  static tensor_list backward(AutogradContext* graph, const tensor_list& gradients) {
    if (torch::GradMode::is_enabled()) refuse("gradients have no gradients: call backward without create_graph");
    const tensor_list kept = graph->get_saved_variables();
    const Tensor &q = kept[0], &k = kept[1], &v = kept[2], &out = kept[3];
    const auto step = c10::static_intrusive_pointer_cast<Step<T>>(graph->saved_data["step"].toCapsule());
    const Tensor dout =
        has_rows(gradients[0]) ? gradients[0] : gradients[0].contiguous();  // a sum's gradient is one number
    Tensor dq = torch::empty_like(q), dk = torch::empty_like(k), dv = torch::empty_like(v);
    attn::multi_head_backward(step->method, view<const T>(q), view<const T>(k), view<const T>(v), view<const T>(out),
                              view<const T>(dout), masks({kept[4], kept[5]}, q.size(0)), step->saved,
                              {view<T>(dq), view<T>(dk), view<T>(dv)}, context());
    return {Tensor(), dq, dk, dv};
  }
};

template <class T>
Tensor attend_any(const AnyApproximator<T>& method, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Keep& keep) {
  check<T>("q", q);
  check<T>("k", k);
  check<T>("v", v);
  check_keep("keep.key", keep.key, k.size(0), k.size(2));
  check_keep("keep.query", keep.query, q.size(0), q.size(2));
  const bool wants_gradient = q.requires_grad() || k.requires_grad() || v.requires_grad();
  if (torch::GradMode::is_enabled() && wants_gradient) return Attend<T>::apply(Call<T>{method, keep}, q, k, v);
  Tensor out = result_of(q, v);
  attn::multi_head(method, view<const T>(q), view<const T>(k), view<const T>(v), view<T>(out), masks(keep, q.size(0)),
                   context());
  return out;
}

}  // namespace

Tensor attend(const AnyApproximator<float>& method, const Tensor& q, const Tensor& k, const Tensor& v,
              const Keep& keep) {
  return attend_any(method, q, k, v, keep);
}

Tensor attend(const AnyApproximator<double>& method, const Tensor& q, const Tensor& k, const Tensor& v,
              const Keep& keep) {
  return attend_any(method, q, k, v, keep);
}

AttentionImpl::AttentionImpl(std::string_view method, const attn::MethodOptions& options)
    : in_float_(attn::make_approximator<float>(method, options)),
      in_double_(attn::make_approximator<double>(method, options)) {}

Tensor AttentionImpl::forward(const Tensor& q, const Tensor& k, const Tensor& v, const Keep& keep) const {
  return q.defined() && q.scalar_type() == torch::kDouble ? attend(in_double_, q, k, v, keep)
                                                          : attend(in_float_, q, k, v, keep);
}

}  // namespace attn_torch
