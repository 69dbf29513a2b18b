/// Any bytes as a .npy file: they are read, or refused with std::runtime_error.
#include "common/npy.hpp"

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto path = std::filesystem::temp_directory_path() / ("attn_fuzz_" + std::to_string(getpid()) + ".npy");
  static const int removed_at_exit = std::atexit([] { std::filesystem::remove(path); });
  static_cast<void>(removed_at_exit);
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const auto array = npy::read<double>(path);
    attn::Index count = 1;
    for (const attn::Index n : array.shape) count *= n;
    if (static_cast<std::size_t>(count) != array.values.size()) std::abort();
  } catch (const std::runtime_error&) {
  }
  try {
    npy::read_matrix<float>(path);
  } catch (const std::runtime_error&) {
  }
  return 0;
}
