/// Removes noise from a photo by attention: exactly, then by Skyformer with several numbers of landmarks, and shows what each
/// costs and how good it is. The filter itself is described in filter.hpp.
#include "contact_sheet.hpp"
#include "filter.hpp"
#include "measure.hpp"
#include "noise.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "quality.hpp"
#include "resize.hpp"
#include "table.hpp"

#include <attn/attn.hpp>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace {

attn::Context make_context(int threads) {
#ifdef _OPENMP
  return attn::Context{attn::OpenMP{.threads = threads}};
#else
  if (threads > 1) throw std::invalid_argument("--threads: built without OpenMP, only 1 is possible");
  return attn::Context{};
#endif
}

/// The photo at the size to be filtered.
Image read_photo(const Options& options) {
  const Image photo = read_png(options.input.value_or(PHOTO_FILTER_DATA "/raccoon.png"));
  const Size size = wanted_size(options, {photo.width, photo.height});
  return fit_within(photo, size.width, size.height);
}

/// Every method's result, the exact one first. A further method is one line more.
std::vector<Result> run_all(const Options& options, const Image& noisy, attn::Context& context) {
  const double s = options.s.value_or(static_cast<double>(std::max(noisy.width, noisy.height)) / 16.0);
  const attn::Matrix<float> features = pixel_features(noisy, s, options.t);
  const auto run = [&](const auto& method, attn::Index m) { return measure(method, m, features, noisy.rgb, context); };

  std::vector<Result> results;
  if (!options.no_exact) results.push_back(run(WithProgress(attn::GaussianAttention<float>{kFilterKernel}), 0));
  for (const attn::Index m : options.landmarks) {
    const attn::UniformSample landmarks{.num_landmarks = m, .seed = options.seed};
    results.push_back(run(attn::Skyformer<float>{landmarks, attn::RidgeInverse{.gamma = options.gamma}, kFilterKernel}, m));
  }
  return results;
}

std::string number(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

/// All that is reported about one image.
struct Report {
  Picture picture;
  std::string file;
  std::vector<std::string> cells;
};

Report report(const Result& result, const Result* exact, const Image& clean) {
  const std::string m = result.num_landmarks > 0 ? std::to_string(result.num_landmarks) : "";
  const double t = result.milliseconds;
  const std::string ms = number(t < 10.0 ? "%.2f" : t < 100.0 ? "%.1f" : "%.0f", t);
  const std::string decibels = number("%.2f", psnr(result.rgb, clean.rgb));
  const std::string speedup = exact == nullptr ? "" : number("%.1f", exact->milliseconds / result.milliseconds);
  const std::string error = exact == nullptr ? "" : number("%.4f", relative_error(result.rgb, exact->rgb));
  const std::string title = m.empty() ? "exact" : result.method + ", m = " + m;
  return {{Image(clean.width, clean.height, result.rgb), title, decibels + " dB, " + ms + " ms"},
          m.empty() ? "exact" : result.method + "-" + m,
          {m.empty() ? "exact (" + result.method + ")" : result.method, m, ms, speedup, decibels, error}};
}

void make_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw std::runtime_error("cannot make folder " + folder.string() + ": " + error.message());
}

void save(const std::filesystem::path& folder, const std::vector<Report>& reports) {
  std::vector<Picture> pictures;
  for (const Report& each : reports) {
    write_png(folder / (each.file + ".png"), each.picture.image);
    pictures.push_back(each.picture);
  }
  write_png(folder / "contact_sheet.png", contact_sheet(pictures));
}

void run(const Options& options) {
  attn::Context context = make_context(options.threads);
  const Image clean = read_photo(options);
  make_folder(options.output);
  const Image noisy(clean.width, clean.height, with_noise(clean.rgb, options.noise, options.seed));
  const int threads = context.workers();
  std::printf("%td x %td pixels, %td tokens, %d thread%s\n\n", clean.width, clean.height, clean.rgb.rows(), threads,
              threads == 1 ? "" : "s");

  const std::vector<Result> results = run_all(options, noisy, context);
  const Result* exact = options.no_exact ? nullptr : &results.front();
  const std::string decibels = number("%.2f", psnr(noisy.rgb, clean.rgb));
  const std::string error = exact == nullptr ? "" : number("%.4f", relative_error(noisy.rgb, exact->rgb));
  std::vector<Report> reports{{{clean, "clean", ""}, "clean", {}},
                              {{noisy, "noisy", decibels + " dB"}, "noisy", {"noisy", "", "", "", decibels, error}}};
  for (const Result& result : results) reports.push_back(report(result, exact, clean));

  std::vector<std::vector<std::string>> lines{{"method", "landmarks", "ms", "speed-up", "PSNR dB", "relative error"}};
  for (std::size_t i = 1; i < reports.size(); ++i) lines.push_back(reports[i].cells);
  std::fputs(table(lines).c_str(), stdout);
  save(options.output, reports);
  std::printf("\nImages: %s\n", (std::filesystem::path(options.output) / "contact_sheet.png").c_str());
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Removes noise from a photo by exact Gaussian-kernel attention and by Skyformer, and compares the two.");
  add_options(app, options);
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "photo_filter: %s\n", failure.what());
    return 1;
  }
}
