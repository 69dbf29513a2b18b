# cmake -D include=DIR -D folder=DIR -P check_macros.cmake -- COMPILER FLAGS...     Fails if <attn/attn.hpp> defines or
# undefines a macro whose name does not start with ATTN_. The macros of the other headers that it includes do not count.
cmake_minimum_required(VERSION 3.21)

include(${CMAKE_CURRENT_LIST_DIR}/../common/command.cmake)

# macros_of(name text): the names of all macros that are defined after text, into the variable name.
function(macros_of name text)
  file(WRITE ${folder}/${name}.cpp "${text}")
  execute_process(
    COMMAND ${command} -dM -E ${folder}/${name}.cpp OUTPUT_VARIABLE definitions COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE "#define ([A-Za-z0-9_]+)[^\n]*\n" "\\1;" names "${definitions}")
  set(${name} ${names} PARENT_SCOPE)
endfunction()

file(GLOB_RECURSE headers ${include}/*.hpp)
set(others "")
foreach(header IN LISTS headers)
  file(STRINGS ${header} lines REGEX "^#include <")
  list(FILTER lines EXCLUDE REGEX "<(attn/.*|omp\\.h|mpi\\.h|the_error_above_says_why)>")
  list(APPEND others ${lines})
endforeach()
list(REMOVE_DUPLICATES others)
list(JOIN others "\n" others)
macros_of(without "${others}\n")
macros_of(with "${others}\n#include <attn/attn.hpp>\n")

set(added ${with})
list(REMOVE_ITEM added ${without})
if(NOT "ATTN_VERSION_MAJOR" IN_LIST added)
  message(FATAL_ERROR "ATTN_VERSION_MAJOR is not found, so nothing else would be")
endif()
list(FILTER added EXCLUDE REGEX "^ATTN_")
set(removed ${without})
list(REMOVE_ITEM removed ${with})
if(added OR removed)
  message(FATAL_ERROR "attn/attn.hpp defines the macros \"${added}\" and undefines \"${removed}\"")
endif()
