/// What attn needs of the compiler and its flags: the first include of every public header, so that where something is
/// missing one sentence says so, and nothing else does. #error alone would go on into errors by the thousand; a header
/// that does not exist ends the compilation.
#pragma once

#if __cplusplus < 202002L
#error "attn needs C++20: compile with -std=c++20 (CMake: link attn::attn), by GCC 12, Clang 14 or later"
#include <the_error_above_says_why>
#endif
#if !defined(__cpp_exceptions)
#error "attn reports wrong arguments and a lack of memory by throwing, and so cannot be compiled with -fno-exceptions"
#include <the_error_above_says_why>
#endif
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "attn knows NaN and infinity, which -ffinite-math-only (part of -ffast-math) does not: add -fno-finite-math-only"
#include <the_error_above_says_why>
#endif
