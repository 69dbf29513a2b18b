# The peers of bench_peers: Eigen's products always, the others where they are installed.
set(missing)

# add_peer(name MACRO macro SOURCE file PACKAGE package HEADER header LIBRARIES library... [PATHS folder...]):
# takes it if its header and all its libraries are found, and defines ATTN_BENCH_macro.
function(add_peer name)
  cmake_parse_arguments(PARSE_ARGV 1 peer "" "SOURCE;MACRO;PACKAGE;HEADER" "LIBRARIES;PATHS")
  find_path(ATTN_${peer_MACRO}_INCLUDE ${peer_HEADER} PATH_SUFFIXES ${peer_PATHS})
  set(libraries)
  foreach(library IN LISTS peer_LIBRARIES)
    find_library(ATTN_${peer_MACRO}_${library} ${library} PATH_SUFFIXES ${peer_PATHS})
    list(APPEND libraries ${ATTN_${peer_MACRO}_${library}})
  endforeach()
  mark_as_advanced(ATTN_${peer_MACRO}_INCLUDE)
  if(ATTN_${peer_MACRO}_INCLUDE AND NOT libraries MATCHES "NOTFOUND")
    target_sources(bench_peers PRIVATE ${peer_SOURCE})
    target_include_directories(bench_peers SYSTEM PRIVATE ${ATTN_${peer_MACRO}_INCLUDE})
    target_compile_definitions(bench_peers PRIVATE ATTN_BENCH_${peer_MACRO})
    target_link_libraries(bench_peers PRIVATE ${libraries})
  else()
    message(STATUS "attn: bench_peers goes without ${name} (Debian package ${peer_PACKAGE})")
    set(missing ${missing} ${name} PARENT_SCOPE)
  endif()
endfunction()

add_peer(OpenBLAS MACRO OPENBLAS SOURCE peers/openblas_blocks.cpp PACKAGE libopenblas-dev HEADER openblas_config.h
         LIBRARIES openblas PATHS openblas-pthread openblas-serial openblas-openmp)
add_peer(oneDNN MACRO ONEDNN SOURCE peers/onednn_blocks.cpp PACKAGE libdnnl-dev HEADER dnnl.hpp LIBRARIES dnnl)
add_peer(libtorch MACRO LIBTORCH SOURCE peers/libtorch.cpp PACKAGE libtorch-dev HEADER ATen/ATen.h
         LIBRARIES torch_cpu c10)
list(JOIN missing ", " missing)
target_compile_definitions(bench_peers PRIVATE "ATTN_BENCH_MISSING=\"${missing}\"")
