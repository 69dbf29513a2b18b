/// What the study of trained models' tokens compares: the library's methods, and baselines that it does not have.
#pragma once

#include "accuracy/tokens.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace accuracy {

inline constexpr std::string_view kMean = "mean(v)", kSample = "sampled keys", kWildCat = "wildcat",
                                  kBinnedWildCat = "wildcat, 8 bins";

/// A method by its name, in the library or here, and the number of its landmarks, sampled keys or near clusters; 0
/// stands for exact methods, the mean, and multipole's own counts.
struct Contender {
  std::string method;
  Index m = 0;

  /// The exact method that it approximates.
  std::string_view target() const { return method == "skyformer" || method == "gaussian" ? "gaussian" : "softmax"; }
};

/// out <- a contender's result, with whatever scratch memory it keeps from call to call.
using Forward = std::function<void(const attn::Inputs<float>& in, Matrix<float>& out)>;

/// The contender, with that seed where it draws; empty where it does not take these inputs.
Forward make_forward(const Contender& contender, std::uint64_t seed, const attn::Inputs<float>& in);

/// Exact methods, in front of all others, then approximations with several numbers m each.
std::vector<Contender> all_contenders();

}  // namespace accuracy
