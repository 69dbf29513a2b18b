#include "options.hpp"

#include "common/option_checks.hpp"
#include "common/parse_options.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>

namespace {

using attn::Index;

/// "WxH" with positive numbers of at most six digits.
std::optional<Size> parse_size(std::string_view text) {
  const auto number = [](std::string_view digits) -> Index {
    Index n = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), n);
    return error == std::errc{} && end == digits.data() + digits.size() && n < 1'000'000 ? n : 0;
  };
  const std::size_t x = text.find('x');
  if (x == std::string_view::npos) return std::nullopt;
  const Size size{number(text.substr(0, x)), number(text.substr(x + 1))};
  return size.width > 0 && size.height > 0 ? std::optional(size) : std::nullopt;
}

std::string check_size(const std::string& text) {
  return text == "full" || text == "half" || parse_size(text) ? "" : "must be full, half or WIDTHxHEIGHT, not " + text;
}

void add_options(CLI::App& app, Options& options) {
  app.add_option("--input", options.input,
                 "PNG to filter; without it, the photo of a raccoon that comes with this program");
  app.add_option("--size", options.size, "size the photo is scaled down to fit: full, half or WIDTHxHEIGHT")
      ->check(check_size)
      ->capture_default_str();
  app.add_option("--s", options.s, "reach in pixels; without it, a sixteenth of the longer side")
      ->check(check_positive);
  app.add_option("--t", options.t, "reach in colour, whose range is 1")->check(check_positive)->capture_default_str();
  app.add_option("--noise", options.noise, "standard deviation of the noise added to the photo")
      ->check(check_not_negative)
      ->capture_default_str();
  app.add_option("--seed", options.seed, "seed of the noise and of the landmarks")->capture_default_str();
  app.add_option("--landmarks", options.landmarks,
                 "numbers of landmarks to try, such as 256,512; multipole has a 16th as many near clusters")
      ->delimiter(',')
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--methods", options.methods,
                 "methods to run, such as gaussian,skyformer; without it, all of" + list_of_methods())
      ->delimiter(',')
      ->check(check_method);
  app.add_option("--gamma", options.gamma, "ridge of skyformer and lifted-softmax")
      ->check(check_not_negative)
      ->capture_default_str();
  app.add_option("--threads", options.threads, "OpenMP threads; 0: as many as OpenMP would use")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_flag("--no-exact", options.no_exact, "leave the exact methods out");
  app.add_option("--output", options.output, "folder for the images, made if it is missing")->capture_default_str();
}

}  // namespace

Options read_options(int argc, char** argv) {
  return parse_options(
      "Removes noise from a photo by exact attention and by every approximation of it, and compares them.", add_options,
      argc, argv);
}

Size wanted_size(const Options& options, Size photo) {
  if (options.size == "full") return photo;
  if (options.size == "half") return {std::max(Index{1}, photo.width / 2), std::max(Index{1}, photo.height / 2)};
  return parse_size(options.size).value();
}
