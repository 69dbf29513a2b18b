# attn_own: what attn's own tests, benchmarks and examples link. Its flags never reach a consumer of attn::attn.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)
find_package(OpenMP COMPONENTS CXX)

add_library(attn_own INTERFACE)
target_link_libraries(attn_own INTERFACE attn::attn)
if(OpenMP_CXX_FOUND)
  target_link_libraries(attn_own INTERFACE OpenMP::OpenMP_CXX)
endif()
if(ATTN_NATIVE)
  check_cxx_compiler_flag(-march=native ATTN_HAS_MARCH_NATIVE)
  if(ATTN_NATIVE AND ATTN_HAS_MARCH_NATIVE)
    target_compile_options(attn_own INTERFACE -march=native)
  endif()
endif()

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  target_compile_options(attn_own INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)

  # GCC 12's AVX-512 intrinsics read a variable that they leave uninitialised on purpose (GCC bug 105593), so that there any
  # reduction or product of Eigen's warns. Only where that is so is the warning off.
  if(ATTN_NATIVE AND ATTN_HAS_MARCH_NATIVE)
    set(CMAKE_REQUIRED_FLAGS "-O3 -march=native -Wall -Werror")
    set(CMAKE_REQUIRED_LIBRARIES Eigen3::Eigen)
    check_cxx_source_compiles("
      #include <Eigen/Core>
      double sum(const Eigen::VectorXd& v) { return v.sum(); }
      int main() {}" ATTN_EIGEN_COMPILES_WITHOUT_WARNING)
    unset(CMAKE_REQUIRED_FLAGS)
    unset(CMAKE_REQUIRED_LIBRARIES)
    if(NOT ATTN_EIGEN_COMPILES_WITHOUT_WARNING)
      target_compile_options(attn_own INTERFACE -Wno-maybe-uninitialized)
    endif()
  endif()
endif()

# All methods by name, instantiated once for the tests and the benchmarks.
add_library(every_method OBJECT EXCLUDE_FROM_ALL ${PROJECT_SOURCE_DIR}/tests/every_method.cpp)
target_include_directories(every_method INTERFACE ${PROJECT_SOURCE_DIR}/tests)
target_link_libraries(every_method PRIVATE attn_own)
