# attn_single: makes attn_single.hpp, all of attn in one file, in the build folder.
file(GLOB_RECURSE attn_headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/*.hpp)
set(ATTN_SINGLE_HEADER ${PROJECT_BINARY_DIR}/attn_single.hpp)
add_custom_command(
  OUTPUT ${ATTN_SINGLE_HEADER}
  COMMAND ${CMAKE_COMMAND} -D include=${PROJECT_SOURCE_DIR}/include -D output=${ATTN_SINGLE_HEADER}
          -P ${PROJECT_SOURCE_DIR}/cmake/single_header.cmake
  DEPENDS ${attn_headers} ${PROJECT_SOURCE_DIR}/cmake/single_header.cmake
  VERBATIM)
add_custom_target(attn_single DEPENDS ${ATTN_SINGLE_HEADER})
