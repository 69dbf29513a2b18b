#include "world.hpp"

#include <cstdlib>
#include <new>

namespace {

std::size_t sent = 0;
bool fails = false;

void count_elements(int elements, MPI_Datatype type) {
  int size = 0;
  MPI_Type_size(type, &size);
  sent += static_cast<std::size_t>(elements) * static_cast<std::size_t>(size);
}

}  // namespace

std::size_t world::bytes_sent() {
  return sent;
}
void world::reset_bytes() {
  sent = 0;
}

world::FailingMemory::FailingMemory() {
  fails = true;
}
world::FailingMemory::~FailingMemory() {
  fails = false;
}

void* operator new(std::size_t size, std::align_val_t alignment) {
  const auto to = static_cast<std::size_t>(alignment);
  void* const memory = fails ? nullptr : std::aligned_alloc(to, (size + to - 1) / to * to);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

// MPI's profiling interface: what attn calls, counted. Of a broadcast only the root's payload counts.
extern "C" {

int MPI_Isend(const void* from, int n, MPI_Datatype type, int to, int tag, MPI_Comm all, MPI_Request* request) {
  count_elements(n, type);
  return PMPI_Isend(from, n, type, to, tag, all, request);
}

int MPI_Send(const void* from, int n, MPI_Datatype type, int to, int tag, MPI_Comm all) {
  count_elements(n, type);
  return PMPI_Send(from, n, type, to, tag, all);
}

int MPI_Allreduce(const void* from, void* to, int n, MPI_Datatype type, MPI_Op op, MPI_Comm all) {
  count_elements(n, type);
  return PMPI_Allreduce(from, to, n, type, op, all);
}

int MPI_Allgather(const void* from, int n, MPI_Datatype type, void* to, int n_to, MPI_Datatype type_to, MPI_Comm all) {
  count_elements(n, type);
  return PMPI_Allgather(from, n, type, to, n_to, type_to, all);
}

int MPI_Bcast(void* data, int n, MPI_Datatype type, int root, MPI_Comm all) {
  if (root == world::rank()) count_elements(n, type);
  return PMPI_Bcast(data, n, type, root, all);
}

}  // extern "C"

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  ::testing::InitGoogleTest(&argc, argv);
  if (world::rank() != 0) GTEST_FLAG_SET(brief, true);
  const int failed = RUN_ALL_TESTS();
  int any = 0;
  MPI_Allreduce(&failed, &any, 1, MPI_INT, MPI_MAX, world::kAll);
  MPI_Finalize();
  return any;
}
