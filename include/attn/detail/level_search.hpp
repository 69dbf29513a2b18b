/// Which numbers of open branches and near clusters are the fewest that meet an error.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/multipole_fields.hpp>
#include <attn/detail/multipole_trials.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/error_estimate.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>
#include <attn/multipole.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

namespace attn::detail {

/// Counts of Multipole by how fine they are: open branches and near clusters are 2^level times the usual ones.
struct Levels {
  static constexpr double kLowest = -2, kHighest = 3;

  Index n_q, n_k;
  FieldCounts usual;

  Levels(Index queries, Index keys) : n_q(queries), n_k(keys), usual(FieldCounts::of({}, queries, keys)) {}

  FieldCounts at(double level) const {
    const auto times = [&](Index x) {
      return static_cast<Index>(std::lround(std::exp2(level) * static_cast<double>(x)));
    };
    FieldCounts counts = usual;
    counts.open = std::clamp<Index>(times(usual.open), 1, branches() - 1);
    counts.near = std::clamp<Index>(times(usual.near), 1, counts.open * usual.clusters_in_a_branch);
    return counts;
  }

  Index branches() const { return usual.clusters / usual.clusters_in_a_branch; }
  double cost(double level) const { return at(level).cost(n_q, n_k); }

  /// What is there before a group has been attended to.
  double fixed_cost() const {
    FieldCounts counts = usual;
    counts.open = counts.near = 0;
    return counts.cost(n_q, n_k) - FieldCounts::kFilled * static_cast<double>(counts.field());
  }

  /// log2 of the factor by which errors fall from level 0 to another, about, as measured on tokens of trained models.
  static double fall(double level) { return kFall * level + kBend * level * level; }

  /// The level at which errors are 2^-more times those of the given one.
  static double finer(double level, double more) {
    const double least = fall(kLowest), all = std::max(least, fall(level) + more);
    return (std::sqrt(kFall * kFall + 4 * kBend * all) - kFall) / (2 * kBend);
  }

 private:
  static constexpr double kFall = 0.8, kBend = 0.14;
};

/// Tries levels on some groups of queries until one meets the error with a margin, and computes all rows by it. What
/// the search takes, in the units of FieldCounts::cost, is bounded: kMost of exact attention.
template <class T, ScoreKernel Kernel>
class LevelSearch {
 public:
  LevelSearch(const Kernel& kernel, const Sources<T>& in, double max_error, std::uint64_t seed)
      : kernel_(kernel),
        in_(in),
        max_error_(max_error),
        seed_(seed),
        levels_(count_kept(in.q.rows(), kept_queries(in)), count_kept(in.k.rows(), kept_keys(in))) {}

  /// Whether it may pay: a first try that fails must not cost much beside exact attention.
  bool worthwhile() const {
    if (levels_.n_q == 0 || levels_.n_k == 0 || levels_.usual.all_open() || !(max_error_ > 0)) return false;
    if (levels_.usual.groups < kFewest || levels_.usual.near == 0) return false;
    return fixed_cost() + cost_of_rows(few()) + cost_of_groups(few(), first()) < kMostAtFirst * exact_cost();
  }

  /// rows <- those of the level found, the kept ones of which come from it; none if exact attention is the answer.
  /// all: whether rows beside those of the trials are wanted.
  std::optional<Clusters> run(const MatrixRef<T>& rows, bool all, Context& context) {
    Scratch scratch = context.scratch();
    const Product<T> product = field_product(kernel_, in_, scratch);
    MultipoleTrials<T> trials(product, levels_.usual, rows, context, scratch);
    TrialSample<T> sample(trials, product, most(), seed_, scratch);
    spent_ = fixed_cost();
    const std::optional<double> level = find(trials, sample, context);
    if (!level) return {};
    if (all) trials.attend_all(context);
    const FieldCounts counts = levels_.at(*level);
    return Clusters{.num_near = counts.near, .num_open = counts.open};
  }

  const ErrorEstimate& estimate() const { return estimate_; }
  int tries() const { return tries_; }

 private:
  static constexpr Index kFewest = 12, kMostGroups = 24;
  static constexpr int kMostTries = 6;
  static constexpr double kMostAtFirst = 0.13, kMost = 0.15, kWorthwhile = 0.95, kMostAtLast = 0.17, kBeyond = 0.15,
                          kStep = 0.3, kTight = 1.15, kSaving = 0.08, kPromising = 0.95;

  double exact_cost() const { return static_cast<double>(levels_.n_k); }
  Index most() const { return std::clamp(levels_.usual.groups / 4, kFewest, kMostGroups); }
  Index few() const { return most() / 3 + 1; }

  /// Of exact rows of so many groups.
  double cost_of_rows(Index groups) const {
    constexpr double kFew = 1.5;  // beside rows of many queries
    return kFew * static_cast<double>(groups * TrialSample<T>::kOfGroup) * exact_cost() /
           static_cast<double>(levels_.n_q);
  }

  double cost_of_groups(Index groups, double level) const {
    return static_cast<double>(groups) / static_cast<double>(levels_.usual.groups) *
           (levels_.cost(level) - levels_.fixed_cost());
  }

  /// Heads of trained models have errors of up to about 0.1 at level 0.
  double first() const { return std::clamp(Levels::finer(0, std::log2(0.1 / max_error_)), -1.5, 1.5); }

  /// With what clustering takes beyond what FieldCounts::cost says, which is in keys of 64 features: it hardly depends
  /// on their number.
  double fixed_cost() const {
    const double pair = static_cast<double>(in_.k.cols() + in_.v.cols()) + 11, usual = 128 + 11;
    return levels_.fixed_cost() +
           FieldCounts::kOverhead * (usual / pair - 1) * (1 + exact_cost() / static_cast<double>(levels_.n_q));
  }

  /// Whether a level takes less time than exact attention would from here on.
  bool pays(double level) const {
    return level <= Levels::kHighest && levels_.cost(level) - levels_.fixed_cost() < kWorthwhile * exact_cost() &&
           levels_.at(level).open < levels_.branches() - 1;
  }

  /// Whether a try by few groups stays within what a search may take.
  bool affords(double level) const {
    const double rows = cost_of_rows(std::max<Index>(0, few() - computed_));
    return spent_ + rows + cost_of_groups(few(), level) < kMost * exact_cost();
  }

  /// Of the sample as many groups as a search may take where they are computed in vain after all.
  Index enough(double level) const {
    Index groups = most();
    const auto cost = [&] { return spent_ + cost_of_rows(groups - computed_) + cost_of_groups(groups - few(), level); };
    while (groups > few() + few() / 2 && cost() > kMostAtLast * exact_cost()) --groups;
    return groups;
  }

  /// How much finer the given level should be, in levels, by an estimate of so many groups; not positive if it meets
  /// the error with a margin that is wider where estimates vary more.
  double wanted(double level, Index groups, MultipoleTrials<T>& trials, TrialSample<T>& sample, Context& context) {
    const FieldCounts counts = levels_.at(level);
    trials.start({counts.open, counts.near});
    sample.attend(kernel_, in_, groups, context);
    trials.attend(sample.groups(groups), context);
    estimate_ = sample.estimate(groups, trials.rows());
    ++tries_;
    spent_ += cost_of_groups(groups, level) + cost_of_rows(std::max<Index>(0, groups - computed_));
    computed_ = std::max(computed_, groups);
    const double safe = std::sqrt(estimate_.error * std::sqrt(estimate_.error * estimate_.upper));
    if (is_nan(safe)) return std::numeric_limits<double>::infinity();
    const double more = std::log2((safe <= max_error_ ? safe : kTight * estimate_.error) / max_error_),
                 fallen = Levels::fall(level) - Levels::fall(level_before_);
    if (tries_ > 1 && std::abs(fallen) > 0.1) pace_ = std::clamp((more_before_ - more) / fallen, 0.5, 2.0);
    level_before_ = level;
    more_before_ = more;
    const double step = Levels::finer(level, more / pace_) - level;
    return safe <= max_error_ ? step : std::max(step, kStep);
  }

  /// By few groups first, then by all of the sample, whose rows are not computed in vain if they pass.
  std::optional<double> find(MultipoleTrials<T>& trials, TrialSample<T>& sample, Context& context) {
    double level = first(), fails = -std::numeric_limits<double>::infinity();
    Index groups = few();
    while (tries_ < kMostTries && pays(level) && (groups > few() || affords(level))) {
      const double step = wanted(level, groups, trials, sample, context);
      if (step > 0 && groups == few() && estimate_.error < kPromising * max_error_) {
        groups = enough(level);
        continue;
      }
      if (step > 0) {
        fails = level;
        level += step + kBeyond;
        groups = few();
        continue;
      }
      if (groups > few()) return level;
      const double lower = std::max({Levels::kLowest, level + step + kBeyond, fails + kStep});
      if (levels_.cost(level) - levels_.cost(lower) > kSaving * exact_cost() && affords(lower)) {
        level = lower;
      } else {
        groups = enough(level);
      }
    }
    return {};
  }

  const Kernel& kernel_;
  const Sources<T>& in_;
  double max_error_;
  std::uint64_t seed_;
  Levels levels_;
  ErrorEstimate estimate_{};
  int tries_ = 0;
  Index computed_ = 0;  ///< groups whose exact rows are there
  double spent_ = 0;
  double level_before_ = 0, more_before_ = 0;  ///< of the last try, more: log2 by how much its error was too large
  double pace_ = 1;                            ///< at which errors fall, relative to Levels::fall
};

}  // namespace attn::detail
