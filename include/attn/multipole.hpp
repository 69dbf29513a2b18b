/// Multipole attention: near keys exactly, far keys by clusters.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/far_field.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <string_view>

namespace attn {

template <class T, ScoreKernel Kernel = SoftmaxKernel>
class Multipole {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "multipole";

  Index num_clusters = 128, num_groups = 64, num_near = 16;
  Kernel kernel{};

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context);
  }

 private:
  void run(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context) const {
    using namespace detail;
    Scratch scratch = context.scratch();
    const Product<T> product = make_product(kernel, in, Maximum::running, context.workers(), scratch);
    const KeyClusters<T> keys = KeyClusters<T>::make(in, product.kernel, num_clusters, context, scratch);
    const QueryGroups<T> groups = QueryGroups<T>::make(in, product.kernel, num_groups, context, scratch);
    if (groups.groups.count() < 1 || static_cast<Index>(groups.groups.rows.size()) < out.rows()) out.set_zero();
    const Index wave = std::min(kTileWidth<T>, groups.groups.count()), workers = context.workers();
    Summaries<T> summaries = Summaries<T>::make(wave, keys, scratch);
    auto* const clusters = scratch.make<ClusterRunner<T>>(workers, in, keys, scratch);
    auto* const fields = scratch.make<FieldRunner<T>>(workers, product, keys, groups, num_near, scratch);
    for (Index first = 0; first < groups.groups.count(); first += wave) {
      const Range some{first, std::min(first + wave, groups.groups.count())};
      summaries.look_from(groups, some, product.kernel.scale);
      context.for_each(keys.clusters.count(), [&](Index c, int worker) { clusters[worker].summarize(c, summaries); });
      context.for_each(some.last - some.first, [&](Index lane, int worker) {
        const Range range = groups.groups.range(some.first + lane);
        const Index blocks = (range.last - range.first + kTileWidth<T> - 1) / kTileWidth<T>;
        for (Index b = 0; b < blocks; ++b) {
          const Range part = nth_part(range.last - range.first, blocks, b);
          fields[worker].attend({{range.first + part.first, range.first + part.last}, some.first + lane, lane},
                                summaries, out);
        }
      });
    }
  }
};

}  // namespace attn
