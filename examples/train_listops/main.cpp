/// Trains a small transformer with any of attn's methods on ListOps of Long Range Arena, made as it goes.
#include "common/run_program.hpp"
#include "train_listops/options.hpp"
#include "train_listops/train.hpp"

int main(int argc, char** argv) {
  return run_program("train_listops", train, read_options(argc, argv));
}
