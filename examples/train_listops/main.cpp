/// Trains a small transformer with any of attn's methods on ListOps of Long Range Arena, made as it goes.
#include "train_listops/options.hpp"
#include "train_listops/train.hpp"

#include <cstdio>
#include <exception>

int main(int argc, char** argv) {
  const Options options = read_options(argc, argv);
  try {
    train(options);
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "train_listops: %s\n", failure.what());
    return 1;
  }
}
