# cmake -DINCLUDE=FOLDER -P old_standard.cmake -- COMPILER FLAGS...     Every public header of that folder says in C++17 that it
# needs C++20, and nothing else.
include(${CMAKE_CURRENT_LIST_DIR}/../common/command.cmake)

file(GLOB headers RELATIVE ${INCLUDE} ${INCLUDE}/attn/*.hpp)
list(REMOVE_ITEM headers attn/version.hpp)
foreach(header IN LISTS headers)
  execute_process(COMMAND ${command} -std=c++17 -x c++ -include ${header} /dev/null RESULT_VARIABLE result ERROR_VARIABLE output)
  string(REGEX MATCHALL " error: [^\n]*" errors "${output}")
  list(LENGTH errors count)
  if(result EQUAL 0 OR NOT count EQUAL 2 OR NOT errors MATCHES "^ error: [^;]*attn needs C\\+\\+20: compile with -std=c\\+\\+20")
    message(FATAL_ERROR "${header} does not say that it needs C++20, or says more:\n${output}")
  endif()
endforeach()
