# Makes Eigen3::Eigen: the caller's, if it has one; else an installed Eigen (3.4 or later, 5.x included: a version range in
# find_package would reject one of them); else, where none is installed, a download with a pinned hash.
if(NOT TARGET Eigen3::Eigen)
  find_package(Eigen3 QUIET CONFIG)
  if(Eigen3_FOUND AND Eigen3_VERSION VERSION_LESS 3.4)
    message(FATAL_ERROR "attn: Eigen ${Eigen3_VERSION} in ${Eigen3_DIR} is too old, 3.4 or later is needed")
  endif()
endif()

if(NOT TARGET Eigen3::Eigen)
  message(STATUS "attn: Eigen is not installed, fetching Eigen 3.4.0")
  include(FetchContent)
  if(POLICY CMP0135)
    cmake_policy(SET CMP0135 NEW)
  endif()
  # Only the headers are wanted: without a CMakeLists.txt in SOURCE_SUBDIR, Eigen's own build is not added.
  FetchContent_Declare(eigen
    URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.gz
    URL_HASH SHA256=8586084f71f9bde545ee7fa6d00288b264a2b7ac3607b974e54d13e7162c1c72
    SOURCE_SUBDIR Eigen)
  FetchContent_MakeAvailable(eigen)
  add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
  target_include_directories(Eigen3::Eigen INTERFACE ${eigen_SOURCE_DIR})
endif()
