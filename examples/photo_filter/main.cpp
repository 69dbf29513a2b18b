/// Removes noise from a photo by attention: exactly, then by every approximation with several numbers of landmarks, and
/// shows what each costs and how good it is. The filter itself is described in filter.hpp.
#include "common/make_context.hpp"
#include "common/number.hpp"
#include "common/run_program.hpp"
#include "common/table.hpp"
#include "contact_sheet.hpp"
#include "filter.hpp"
#include "measure.hpp"
#include "methods.hpp"
#include "noise.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "quality.hpp"
#include "resize.hpp"
#include "softmax_features.hpp"

#include <attn/attn.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace {

/// The photo at the size to be filtered.
Image read_photo(const Options& options) {
  const Image photo = read_png(options.input.value_or(PHOTO_FILTER_DATA "/raccoon.png"));
  const Size size = wanted_size(options, {photo.width, photo.height});
  return fit_within(photo, size.width, size.height);
}

/// How far a pixel looks for others, in pixels.
double reach(const Options& options, const Image& image) {
  return options.s.value_or(static_cast<double>(std::max(image.width, image.height)) / 16.0);
}

/// What is computed, and every option that is not a method's default.
void print_settings(const Options& options, const Image& image, int threads) {
  std::printf("%td x %td pixels, %td tokens, %d thread%s\n\n", image.width, image.height, image.rgb.rows(), threads,
              threads == 1 ? "" : "s");
  std::printf(
      "Every pixel becomes a mean of all, weighted by exp(-|place - place'|^2 / (2 s^2) - |colour - colour'|^2 /\n"
      "(2 t^2)): s = %g pixels is how far it looks, t = %g how different a colour may be, of a range of 1.\n"
      "The photo has noise of standard deviation %g, and seed %llu draws that and the landmarks.\n"
      "Options that are no defaults: softmax of scale 1, Gaussian kernel of bandwidth 1 with normalized rows;\n"
      "skyformer and lifted-softmax with gamma = %g; multipole with a 16th as many near clusters as landmarks.\n\n",
      reach(options, image), options.t, options.noise, static_cast<unsigned long long>(options.seed), options.gamma);
}

/// Every chosen method's result, the exact ones first, then the others for one number of landmarks after the other.
std::vector<Result> run_all(const Options& options, const Image& noisy, attn::Context& context) {
  const attn::Matrix<float> features = pixel_features(noisy, reach(options, noisy), options.t);
  const SoftmaxFeatures augmented = softmax_features(features);
  const attn::Inputs<float> plain{.q = features, .k = features, .v = noisy.rgb};
  const attn::Inputs<float> for_softmax{.q = augmented.q, .k = augmented.k, .v = noisy.rgb};
  const auto inputs = [&](std::string_view name) -> const auto& { return is_gaussian(name) ? plain : for_softmax; };

  const std::vector<std::string_view> names = chosen_methods(options);
  std::vector<Result> results;
  for (const std::string_view name : names) {
    if (!is_exact(name)) continue;
    results.push_back(measure(WithProgress(filter_method(name, 1, options)), name, 0, inputs(name), context));
  }
  for (const attn::Index m : options.landmarks) {
    for (const std::string_view name : names) {
      if (is_exact(name)) continue;
      results.push_back(measure(filter_method(name, m, options), name, m, inputs(name), context));
    }
  }
  return results;
}

/// The relative error of a result, empty without a reference.
std::string error_against(const attn::Matrix<float>& rgb, const Result* reference) {
  return reference == nullptr ? "" : error_text(attn::relative_frobenius_error(rgb, reference->rgb));
}

/// All that is reported about one image.
struct Report {
  Picture picture;
  std::string file;
  std::vector<std::string> cells;
};

/// The result of that exact method, or null where it was not wanted.
const Result* find_exact(const std::vector<Result>& results, std::string_view method) {
  const auto found = std::ranges::find(results, method, &Result::method);
  return found == results.end() ? nullptr : &*found;
}

/// target: exact attention of the method's own kernel, which its time is compared with; reference: the exact Gaussian
/// filter, which its colours are; null where not wanted.
Report report(const Result& result, const Result* target, const Result* reference, const Image& clean) {
  const std::string m = result.num_landmarks > 0 ? std::to_string(result.num_landmarks) : "";
  const std::string ms = milliseconds_text(result.milliseconds);
  const std::string decibels = number("%.2f", psnr(result.rgb, clean.rgb));
  const std::string speedup = target == nullptr ? "" : number("%.1f", target->milliseconds / result.milliseconds);
  const std::string name = m.empty() ? "exact (" + result.method + ")" : result.method;
  const std::string file = !m.empty()                   ? result.method + "-" + m
                           : is_gaussian(result.method) ? "exact"
                                                        : "exact-" + result.method;
  return {{Image(clean.width, clean.height, result.rgb), m.empty() ? name : name + ", " + m,
           decibels + " dB, " + ms + " ms"},
          file,
          {name, m, ms, speedup, decibels, error_against(result.rgb, reference)}};
}

void make_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw std::runtime_error("cannot make folder " + folder.string() + ": " + error.message());
}

/// The reports' pictures in rows: first those without landmarks, then a row for each number of them, with a column for
/// each method. A single method's go on a row of three.
std::vector<std::vector<Picture>> rows_of(const std::vector<Report>& reports, std::size_t without,
                                          std::size_t methods) {
  const std::size_t across = methods > 1 ? methods : 3;
  std::vector<std::vector<Picture>> rows;
  for (std::size_t i = 0; i < reports.size(); ++i) {
    const std::size_t column = i < without ? i % across : (i - without) % across;
    if (column == 0) rows.emplace_back();
    rows.back().push_back(reports[i].picture);
  }
  return rows;
}

void run(const Options& options) {
  attn::Context context = make_context(options.threads);
  const Image clean = read_photo(options);
  make_folder(options.output);
  const Image noisy(clean.width, clean.height, with_noise(clean.rgb, options.noise, options.seed));
  print_settings(options, clean, context.workers());
  const std::vector<Result> results = run_all(options, noisy, context);
  const Result* const gaussian = find_exact(results, attn::GaussianAttention<float>::kName);
  const Result* const softmax = find_exact(results, attn::SoftmaxAttention<float>::kName);
  const std::string decibels = number("%.2f", psnr(noisy.rgb, clean.rgb));
  std::vector<Report> reports{{{clean, "clean", ""}, "clean", {}},
                              {{noisy, "noisy", decibels + " dB"},
                               "noisy",
                               {"noisy", "", "", "", decibels, error_against(noisy.rgb, gaussian)}}};
  for (const Result& result : results)
    reports.push_back(report(result, is_gaussian(result.method) ? gaussian : softmax, gaussian, clean));

  std::vector<std::vector<std::string>> lines{{"method", "landmarks", "ms", "speed-up", "PSNR dB", "relative error"}};
  for (std::size_t i = 1; i < reports.size(); ++i) lines.push_back(reports[i].cells);
  std::fputs(table(lines).c_str(), stdout);
  std::fputs(
      "\nspeed-up: over exact attention of the method's own kernel; relative error: to exact Gaussian attention\n",
      stdout);

  const std::filesystem::path folder = options.output;
  for (const Report& each : reports) write_png(folder / (each.file + ".png"), each.picture.image);
  const auto exact = static_cast<std::size_t>(std::ranges::count_if(results, is_exact, &Result::method));
  const std::size_t methods = (results.size() - exact) / options.landmarks.size();
  write_png(folder / "contact_sheet.png", contact_sheet(rows_of(reports, 2 + exact, methods)));
  std::printf("\nImages: %s\n", (folder / "contact_sheet.png").c_str());
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("photo_filter", run, read_options(argc, argv));
}
