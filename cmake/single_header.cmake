# cmake -D include=DIR -D output=FILE -P single_header.cmake     Writes attn/attn.hpp and all that it includes of attn
# into one file. Each header of attn comes once, before the first that needs it; other includes stay, those outside of
# conditionals once.
cmake_minimum_required(VERSION 3.21)

# Appends a header of attn, and before each of its parts what it includes there.
function(append_header name)
  get_property(seen GLOBAL PROPERTY seen_headers)
  if(name IN_LIST seen)
    return()
  endif()
  set_property(GLOBAL APPEND PROPERTY seen_headers ${name})
  file(READ ${include}/${name} text)
  string(REPLACE "#pragma once\n" "" text "${text}")
  while(text MATCHES "(^|\n)([ \t]*#[ \t]*(include|if|endif)[^\n]*\n)")
    set(line "${CMAKE_MATCH_2}")
    set(directive "${CMAKE_MATCH_3}")
    string(FIND "${text}" "${CMAKE_MATCH_0}" begin)
    string(LENGTH "${CMAKE_MATCH_0}" length)
    math(EXPR end "${begin} + ${length}")
    string(SUBSTRING "${text}" 0 ${begin} before)
    string(SUBSTRING "${text}" ${end} -1 text)
    file(APPEND ${output}.part "${before}${CMAKE_MATCH_1}")
    append_directive(${directive} "${line}")
  endwhile()
  file(APPEND ${output}.part "${text}\n")
endfunction()

# Appends one line that starts with #include, #if or #endif; in place of attn's own headers, these.
function(append_directive directive line)
  get_property(depth GLOBAL PROPERTY conditional_depth)
  get_property(seen GLOBAL PROPERTY seen_lines)
  string(STRIP "${line}" key)
  if(directive STREQUAL "if")
    math(EXPR depth "${depth} + 1")
  elseif(directive STREQUAL "endif")
    math(EXPR depth "${depth} - 1")
  elseif(line MATCHES "<(attn/[^>]+)>")
    append_header(${CMAKE_MATCH_1})
    return()
  elseif(key IN_LIST seen)
    return()
  elseif(depth EQUAL 0)
    set_property(GLOBAL APPEND PROPERTY seen_lines ${key})
  endif()
  set_property(GLOBAL PROPERTY conditional_depth ${depth})
  file(APPEND ${output}.part "${line}")
endfunction()

set_property(GLOBAL PROPERTY conditional_depth 0)
file(WRITE ${output}.part
  "/// attn in one file, made from its headers: to be included in place of <attn/attn.hpp>, not beside it.\n"
  "/// Apache License 2.0.\n"
  "#pragma once\n\n")
append_header(attn/attn.hpp)
file(READ ${output}.part text)
string(REGEX REPLACE "\n\n\n+" "\n\n" text "${text}")
file(WRITE ${output} "${text}")
file(REMOVE ${output}.part)
