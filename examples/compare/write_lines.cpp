/// Writes every line of C++ that can be recommended, each as an entry for lines_test.cpp.
#include "compare/methods.hpp"

#include <attn/any_approximator.hpp>

#include <cstdlib>
#include <fstream>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) return EXIT_FAILURE;
  std::ofstream file(argv[1]);
  using attn::Causal;
  for (const auto& method : attn::methods<float>()) {
    for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
      for (const int keep : {0, 1, 2}) {
        const MaskUse mask{.causal = causal, .keep_key = keep > 0, .keep_query = keep > 1};
        const MethodFacts& facts = facts_of(method.name);
        for (const attn::Index size : facts.sized_by.empty()      ? std::vector<attn::Index>{0}
                                      : has_clusters(method.name) ? std::vector<attn::Index>{0, 4}
                                                                  : std::vector<attn::Index>{12}) {
          file << "check(\"" << method.name << "\", " << size << ", {attn::Causal(" << static_cast<int>(causal) << "), "
               << mask.keep_key << ", " << mask.keep_query << "}, [&] { " << line_of_cpp(facts, size, 3, mask)
               << " });\n";
        }
      }
    }
  }
  return file.flush() ? EXIT_SUCCESS : EXIT_FAILURE;
}
