/// The OpenMP executor: Context{OpenMP{.threads = 2}}. Needs -fopenmp.
#pragma once

#include <attn/engine/requirements.hpp>

#ifndef _OPENMP
#error "attn/openmp.hpp needs OpenMP: compile with -fopenmp (CMake: link OpenMP::OpenMP_CXX)"
#include <the_error_above_says_why>
#endif

#include <attn/context.hpp>

#include <omp.h>

namespace attn {

/// Runs items on an OpenMP team, handing them out one by one. Inside a parallel region of the caller's, which has its
/// threads already, it runs on the calling thread.
struct OpenMP {
  int threads = 0;  ///< 0: as many as OpenMP would use

  /// @{ As Executor says.
  int workers() const { return threads > 0 ? threads : omp_get_max_threads(); }

  template <class Task>
  void run(Index n, const Task& task) const {
    if (workers() == 1 || omp_in_parallel() != 0) {  // libgomp allocates for a team of one
      for (Index item = 0; item < n; ++item) task(item, 0);
      return;
    }
#pragma omp parallel for num_threads(workers()) schedule(dynamic, 1)
    for (Index item = 0; item < n; ++item) task(item, omp_get_thread_num());
  }
  /// @}
};

static_assert(Executor<OpenMP>);

}  // namespace attn
