# docs: the reference of the public headers by doxygen, where it is installed, in docs/html of the build folder. The test
# docs.doxygen writes it too, and fails where a public name has no doc comment.
find_package(Doxygen QUIET)
if(DOXYGEN_FOUND)
  configure_file(${PROJECT_SOURCE_DIR}/docs/Doxyfile.in ${PROJECT_BINARY_DIR}/Doxyfile @ONLY)
  set(write_docs ${CMAKE_COMMAND} -D doxygen=${DOXYGEN_EXECUTABLE} -D folder=${PROJECT_BINARY_DIR}
                 -P ${PROJECT_SOURCE_DIR}/docs/run_doxygen.cmake)
  add_custom_target(docs COMMAND ${write_docs}
                    VERBATIM COMMENT "Writing the reference to ${PROJECT_BINARY_DIR}/docs/html")
  if(ATTN_BUILD_TESTS)
    add_test(NAME docs.doxygen COMMAND ${write_docs})
  endif()
endif()
