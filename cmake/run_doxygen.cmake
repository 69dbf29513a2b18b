# cmake -D doxygen=PROGRAM -D folder=DIR -P run_doxygen.cmake     Runs doxygen on DIR/Doxyfile. Fails if a name in
# namespace attn has no doc comment. Members need none: the comment on their class tells what they are.
file(MAKE_DIRECTORY ${folder}/docs)
execute_process(COMMAND ${doxygen} ${folder}/Doxyfile COMMAND_ERROR_IS_FATAL ANY)
file(STRINGS ${folder}/docs/warnings.txt undocumented REGEX "(of namespace attn|Compound [^ ]+) is not documented")
if(undocumented)
  list(JOIN undocumented "\n" lines)
  message(FATAL_ERROR "undocumented:\n${lines}")
endif()
