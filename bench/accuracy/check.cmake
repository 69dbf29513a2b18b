# Runs bench_accuracy --quick and checks what must hold of its figures on every machine:
# cmake -D program=<bench_accuracy> -D json=<file to write> -P check.cmake
execute_process(COMMAND ${program} --quick --json ${json}
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "bench_accuracy exits with ${result}:\n${output}")
endif()
file(READ ${json} report)

# The pictures' matrices: a row for each token.
execute_process(COMMAND ${program} --matrices --json ${json} COMMAND_ERROR_IS_FATAL ANY)
file(READ ${json} matrices)
foreach(matrix IN ITEMS "softmax;S" "nystrom;N" "shifted-nystrom;R" "skyformer;product" "lifted-softmax;product")
  string(JSON rows LENGTH "${matrices}" ${matrix})
  if(NOT rows EQUAL 96)
    message(FATAL_ERROR "the matrix ${matrix} has ${rows} rows, should have 96")
  endif()
endforeach()

# The median of a figure in a row of a table.
function(get_median out table row figure)
  string(JSON value GET "${report}" tables ${table} rows ${row} "${figure}" median)
  set(${out} ${value} PARENT_SCOPE)
endfunction()

# The row of a method with that number m.
function(find_row out table method m)
  string(JSON rows GET "${report}" tables ${table} rows)
  string(JSON count LENGTH "${rows}")
  math(EXPR last "${count} - 1")
  foreach(row RANGE ${last})
    string(JSON found GET "${rows}" ${row} method)
    string(JSON number GET "${rows}" ${row} m)
    if(found STREQUAL method AND number EQUAL m)
      set(${out} ${row} PARENT_SCOPE)
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "${table}: no row of ${method} with m = ${m}")
endfunction()

# Figure small in row small_row is below figure large in row large_row.
function(expect_less table small_row small large_row large)
  get_median(a ${table} ${small_row} "${small}")
  get_median(b ${table} ${large_row} "${large}")
  if(NOT a LESS b)
    message(FATAL_ERROR "${table}: ${small} is ${a} in row ${small_row}, ${large} is ${b} in row ${large_row}, should be larger")
  endif()
endfunction()

# Errors, of smooth tokens in rows 0 and 1 and of init tokens in rows 2 and 3, with 16 and 64 landmarks each.
foreach(row 0 1 2 3)
  foreach(method nystrom shifted-nystrom lifted-softmax)
    expect_less(features ${row} "softmax best rank m" ${row} ${method})
  endforeach()
  expect_less(features ${row} "gaussian best rank m" ${row} skyformer)
  expect_less(features ${row} skyformer ${row} "gaussian mean(v)")
endforeach()
expect_less(features 1 skyformer 0 skyformer)
expect_less(features 3 skyformer 2 skyformer)
expect_less(features 1 nystrom 0 nystrom)

# Smooth tokens in row 0, noise in row 1.
foreach(row 0 1)
  expect_less(shift ${row} "best rank m" ${row} "best core")
  expect_less(shift ${row} "best core and shift" ${row} "best core")
  expect_less(shift ${row} "best core" ${row} nystrom)
endforeach()
expect_less(shift 1 row 1 nystrom)

# Exact attention takes longer than mean(v) and has no error.
expect_less(pareto 1 ms 0 ms)
expect_less(pareto 0 error 1 error)

# On a trained model's tokens.
find_row(mean tensors "mean(v)" 0)
find_row(nystrom tensors nystrom 128)
find_row(wildcat tensors wildcat 128)
find_row(multipole tensors multipole 16)
expect_less(tensors ${nystrom} error ${mean} error)
expect_less(tensors ${wildcat} error ${mean} error)
expect_less(tensors ${multipole} error ${nystrom} error)
expect_less(tensors ${multipole} error ${wildcat} error)
expect_less(tensor_summary ${multipole} "error 90 %" ${mean} "error 90 %")
expect_less(tensor_comparison 0 "its ms" 0 "multipole's ms")

# With all 512 keys, methods that choose some are exact attention; so is multipole by itself on so few tokens.
foreach(all "sampled keys;512" "wildcat, 8 bins;512" "wildcat, 8 bins;640" "multipole;0")
  list(GET all 0 method)
  list(GET all 1 m)
  find_row(row tensors "${method}" ${m})
  get_median(error tensors ${row} error)
  if(NOT error LESS 1e-5)
    message(FATAL_ERROR "tensors: ${method} with all keys has an error of ${error}")
  endif()
endforeach()
foreach(row 0 1 2 3 4 5)
  expect_less(tensor_growth ${row} error ${row} "of mean(v)")
endforeach()

# Smooth tokens' singular values fall; the draw of all tokens succeeds where that of two does not.
expect_less(spectra 3 softmax 1 softmax)
expect_less(spectra 3 gaussian 1 gaussian)
expect_less(loewner 0 "lambda .3" 5 "lambda .3")
