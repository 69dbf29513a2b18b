#include "world.hpp"

#include <attn/exact.hpp>
#include <attn/multipole.hpp>

namespace {

using namespace world;
using attn::Clusters;
using attn::GaussianKernel;
using attn::Multipole;
using attn::Rows;
using test::Family;

/// The relative error of a method over all ranks, by another method in one process.
template <class Method, class Exact>
double error_of_rows(const Method& method, const Exact& exact, const Inputs<float>& in, Cut of_queries, Cut of_keys) {
  const Share queries = cut(in.q.rows(), of_queries, rank()), keys = cut(in.k.rows(), of_keys, rank());
  attn::Context context;
  Matrix<float> whole(in.q.rows(), in.v.cols()), out = unset<float>(queries.count, in.v.cols());
  exact.forward(in, whole, context);
  attn::distributed_forward(method, share_of(in, queries, keys), out, kAll, context);
  double squares = 0;
  for (Index i = 0; i < queries.count; ++i)
    squares += (out.row(i) - whole.row(queries.first + i)).cast<double>().squaredNorm();
  double all = 0;
  MPI_Allreduce(&squares, &all, 1, MPI_DOUBLE, MPI_SUM, kAll);
  return std::sqrt(all / whole.cast<double>().squaredNorm());
}

/// Where all clusters are near, and so all keys, it is exact attention: with masks, biases, raw and divided rows.
TEST(DistributedMultipole, IsExactWhereAllIsNear) {
  const auto x = test::make_tokens<float>(Family::unit, {90, 110, 8, 5}, 3);
  const auto keep_key = test::random_keep(110, 0.7, 4), keep_query = test::random_keep(90, 0.8, 5);
  const auto bias = test::random_key_bias<float>(110, 0.1, 6);
  const Inputs<float> in{
      .q = x.q, .k = x.k, .v = x.v, .mask = {.keep_key = keep_key, .keep_query = keep_query}, .key_bias = bias};
  const Clusters clusters{.num_clusters = 10, .num_groups = 4, .num_near = 10};
  for (const Cut keys : {Cut::even, Cut::last}) {
    EXPECT_LE(error_of_rows(Multipole<float>{clusters}, attn::SoftmaxAttention<float>{}, in, Cut::uneven, keys), 2e-6);
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      const GaussianKernel kernel{.rows = rows};
      EXPECT_LE(error_of_rows(Multipole<float, GaussianKernel>{clusters, kernel},
                              attn::GaussianAttention<float>{kernel}, in, Cut::even, keys),
                5e-6);
    }
  }
}

/// Far keys are clustered on each rank, with an error of a single process's size.
TEST(DistributedMultipole, ErrorIsThatOfClusters) {
  const auto x = test::make_tokens<float>(Family::smooth, {400, 400, 16, 8}, 3);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  const Clusters clusters{.num_clusters = 24, .num_groups = 16, .num_near = 4};
  Matrix<float> single(400, 8), exact(400, 8);
  attn::Context context;
  Multipole<float>{clusters}.forward(in, single, context);
  attn::SoftmaxAttention<float>{}.forward(in, exact, context);
  const double one = (single - exact).norm() / exact.norm();
  const double error =
      error_of_rows(Multipole<float>{clusters}, attn::SoftmaxAttention<float>{}, in, Cut::even, Cut::even);
  EXPECT_GT(one, 1e-4);
  EXPECT_LE(error, 1.2 * one);
}

/// There is no backward pass of it over MPI, which the concept of such methods says.
static_assert(attn::DistributedMethod<Multipole<float>> && !attn::DistributedTraining<Multipole<float>>);
static_assert(attn::DistributedTraining<attn::SoftmaxAttention<float>>);

}  // namespace
