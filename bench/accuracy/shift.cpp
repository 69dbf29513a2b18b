#include "accuracy/dense.hpp"
#include "accuracy/methods.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"

#include <attn/metrics.hpp>

#include <Eigen/QR>

#include <cmath>

namespace accuracy {
namespace {

/// An orthonormal basis of x's columns, as far as they are independent.
Matrix<double> column_basis(const Matrix<double>& x) {
  const Eigen::ColPivHouseholderQR<Eigen::MatrixXd> qr(x);
  return qr.householderQ() * Eigen::MatrixXd::Identity(x.rows(), qr.rank());
}

/// Least |S - F U B - delta I|_F over all cores U (m, m), with delta = 0 and with the best delta.
struct BestCores {
  double plain, shifted;
};

/// With P_F, P_B the projections on F's columns and B's rows: plain^2 = |S - P_F S P_B|_F^2, and
///   delta = (tr S - tr(P_F S P_B)) / (n - tr(P_F P_B))    shifted^2 = plain^2 - delta^2 (n - tr(P_F P_B))
BestCores best_cores(const Matrix<double>& s, const Matrix<double>& f, const Matrix<double>& b) {
  const Matrix<double> f_basis = column_basis(f), b_basis = column_basis(b.transpose());
  const Matrix<double> core = f_basis.transpose() * s * b_basis, overlap = f_basis.transpose() * b_basis;
  const double plain = (s - f_basis * core * b_basis.transpose()).squaredNorm();
  const double room = static_cast<double>(s.rows()) - overlap.squaredNorm();
  const double delta = (s.trace() - core.cwiseProduct(overlap).sum()) / room;
  return {std::sqrt(plain), std::sqrt(plain - delta * delta * room)};
}

void add_sample(Row& row, Index n, Index m, double share, std::uint64_t seed) {
  const Tokens<double> wide = mixed_tokens(n, share, seed);
  const Tokens<float> tokens{wide.q.cast<float>(), wide.k.cast<float>(), wide.v.cast<float>()};
  const Matrix<double> s = softmax_matrix(wide.q, wide.k);
  const double size = s.norm();
  const auto add = [&](std::string_view name, const Matrix<float>& a) {
    row.add(name, (a.cast<double>() - s).norm() / size);
  };
  row.add("best rank m", std::sqrt(eigenvalues(s.transpose() * s).head(n - m).cwiseMax(0).sum()) / size);
  add("nystrom", method_matrix("nystrom", m, seed, tokens));
  add("paper", shifted_matrix(attn::ShiftMode::paper, m, tokens));
  add("scalar", shifted_matrix(attn::ShiftMode::scalar, m, tokens));
  add("row", shifted_matrix(attn::ShiftMode::row, m, tokens));
  const BestCores best =
      best_cores(s, softmax_matrix(wide.q, segment_means(wide.k, m)), softmax_matrix(segment_means(wide.q, m), wide.k));
  row.add("best core", best.plain / size);
  row.add("best core and shift", best.shifted / size);
}

/// The row mode's gate learns from 32 evenly spaced rows, here n / 32 apart: on tokens of a period that divides their
/// distance they are alike, and speak for no other row.
Table gate_table(const Settings& settings) {
  constexpr Index m = 32;
  Table table{"gate", "Relative error |out - exact|_F / |exact|_F on words, whose shortest period is 64 tokens"};
  for (const Index n : settings.quick ? std::vector<Index>{256} : std::vector<Index>{4000, 4096}) {
    Row row{{{"n", n}, {"m", m}}};
    for (int i = 0; i < settings.seeds; ++i) {
      const auto seed = static_cast<std::uint64_t>(i);
      const Tokens<float> tokens = make_tokens<float>("words", n, seed);
      const auto result = [&](std::string_view method) {
        return attn::attention(make_method(method, m, seed), tokens.q, tokens.k, tokens.v);
      };
      const Matrix<float> exact = result("softmax");
      for (const std::string_view method : {"nystrom", "shifted-nystrom"})
        row.add(method, attn::relative_frobenius_error(result(method), exact));
    }
    table.rows.push_back(row);
  }
  return table;
}

}  // namespace

std::vector<Table> study_shift(const Settings& settings) {
  const Index n = settings.quick ? 256 : 1024, m = settings.quick ? 16 : 64;
  const std::vector<double> shares =
      settings.quick ? std::vector<double>{0, 1} : std::vector<double>{0, 0.1, 0.25, 0.5, 0.75, 0.9, 1};
  Table table{"shift", "Relative error |A~ - S|_F / |S|_F on q = k = smooth tokens with a share of noise, m landmarks"};
  for (const double share : shares) {
    Row row{{{"share", share}, {"n", n}, {"m", m}}};
    for (int seed = 0; seed < settings.seeds; ++seed) add_sample(row, n, m, share, static_cast<std::uint64_t>(seed));
    table.rows.push_back(row);
  }
  return {table, gate_table(settings)};
}

}  // namespace accuracy
