# attn_own: what attn's own tests, benchmarks and examples link: attn_own_settings, flags that never reach a consumer of
# attn::attn, and what is compiled once for all of them: attn's templates (attn/extern_templates.hpp, included without a
# word of theirs), which take longest, and attn_common, this folder: the oracle, tokens, files, options and tables.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)
find_package(OpenMP COMPONENTS CXX)

add_library(attn_own_settings INTERFACE)
target_link_libraries(attn_own_settings INTERFACE attn::attn)
if(OpenMP_CXX_FOUND)
  target_link_libraries(attn_own_settings INTERFACE OpenMP::OpenMP_CXX)
endif()
if(ATTN_NATIVE)
  check_cxx_compiler_flag(-march=native ATTN_HAS_MARCH_NATIVE)
  if(ATTN_NATIVE AND ATTN_HAS_MARCH_NATIVE)
    target_compile_options(attn_own_settings INTERFACE -march=native)
  endif()
endif()

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(attn_warnings -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
  target_compile_options(attn_own_settings INTERFACE ${attn_warnings})

  # GCC 12's AVX-512 intrinsics read a variable that they leave uninitialised on purpose (GCC bug 105593), so that there any
  # reduction or product of Eigen's warns. Only where that is so is the warning off; other flags may answer otherwise.
  if(NOT "${ATTN_EIGEN_CHECKED_WITH}" STREQUAL "${CMAKE_CXX_FLAGS}")
    unset(ATTN_EIGEN_COMPILES_WITHOUT_WARNING CACHE)
    set(ATTN_EIGEN_CHECKED_WITH "${CMAKE_CXX_FLAGS}" CACHE INTERNAL "")
  endif()
  set(CMAKE_REQUIRED_FLAGS "-O3 -Wall -Werror")
  if(ATTN_NATIVE AND ATTN_HAS_MARCH_NATIVE)
    string(APPEND CMAKE_REQUIRED_FLAGS " -march=native")
  endif()
  set(CMAKE_REQUIRED_LIBRARIES Eigen3::Eigen)
  set(CMAKE_REQUIRED_QUIET ON)  # a question, whose "Failed" is no failure
  check_cxx_source_compiles("
    #include <Eigen/Core>
    double sum(const Eigen::VectorXd& v) { return v.sum(); }
    int main() {}" ATTN_EIGEN_COMPILES_WITHOUT_WARNING)
  unset(CMAKE_REQUIRED_FLAGS)
  unset(CMAKE_REQUIRED_LIBRARIES)
  unset(CMAKE_REQUIRED_QUIET)
  if(NOT ATTN_EIGEN_COMPILES_WITHOUT_WARNING)
    target_compile_options(attn_own_settings INTERFACE -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
endif()

# For what need not be fast: less optimisation takes a third less of the compiler's time.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(attn_checking_flags $<$<CONFIG:Release>:-O1>)
endif()

add_library(attn_own_templates STATIC ${PROJECT_SOURCE_DIR}/cmake/extern_templates.cpp)
target_link_libraries(attn_own_templates PUBLIC attn_own_settings)
set(common ${PROJECT_SOURCE_DIR}/tests/common)
add_library(attn_common STATIC ${common}/families.cpp ${common}/reference.cpp ${common}/table.cpp)
target_include_directories(attn_common PUBLIC ${PROJECT_SOURCE_DIR}/tests)
target_link_libraries(attn_common PUBLIC attn_own_settings)
target_compile_options(attn_common PRIVATE ${attn_checking_flags})
add_library(attn_own INTERFACE)
target_link_libraries(attn_own INTERFACE attn_own_templates attn_common)
set(precompiled $<TARGET_PROPERTY:PRECOMPILE_HEADERS>$<TARGET_PROPERTY:PRECOMPILE_HEADERS_REUSE_FROM>)  # these have it
target_compile_options(attn_own INTERFACE "SHELL:$<$<STREQUAL:${precompiled},>:-include attn/extern_templates.hpp>")

# attn's headers, precompiled: attn_precompiled_headers(target...) lets targets that link attn_own take them.
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/own_headers.cpp CONTENT "")
add_library(attn_own_headers OBJECT EXCLUDE_FROM_ALL ${CMAKE_CURRENT_BINARY_DIR}/own_headers.cpp)
target_link_libraries(attn_own_headers PRIVATE attn_own_settings)
target_precompile_headers(attn_own_headers PRIVATE <attn/attn.hpp> <attn/extern_templates.hpp>)
function(attn_precompiled_headers)
  foreach(target IN LISTS ARGN)
    target_precompile_headers(${target} REUSE_FROM attn_own_headers)
  endforeach()
endfunction()

# attn_add_mpi_test(name ranks program argument...): a program on so many ranks of MPI, more than the machine has cores
# included, and by any user, which Open MPI refuses unless told.
set(attn_mpi_environment
  OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
  OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
  PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe)
function(attn_add_mpi_test name ranks program)
  add_test(NAME ${name} COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${ranks} ${MPIEXEC_PREFLAGS}
                                $<TARGET_FILE:${program}> ${MPIEXEC_POSTFLAGS} ${ARGN})
  set_tests_properties(${name} PROPERTIES ENVIRONMENT "${attn_mpi_environment}" PROCESSORS 2 TIMEOUT 120)
endfunction()
