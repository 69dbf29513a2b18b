# cmake -D doxygen=PROGRAM -D folder=DIR -P run_doxygen.cmake     Runs doxygen on DIR/Doxyfile. Fails if it warns of
# anything, such as a public name without a doc comment.
file(MAKE_DIRECTORY ${folder}/docs)
execute_process(COMMAND ${doxygen} ${folder}/Doxyfile COMMAND_ERROR_IS_FATAL ANY)
file(READ ${folder}/docs/warnings.txt warnings)
if(warnings)
  message(FATAL_ERROR "doxygen warns:\n${warnings}")
endif()
