# docs: the reference of the public headers by doxygen, where it is installed, in docs/html of the build folder.
find_package(Doxygen QUIET)
if(DOXYGEN_FOUND)
  configure_file(${PROJECT_SOURCE_DIR}/docs/Doxyfile.in ${PROJECT_BINARY_DIR}/Doxyfile @ONLY)
  add_custom_target(docs
    COMMAND ${CMAKE_COMMAND} -D doxygen=${DOXYGEN_EXECUTABLE} -D folder=${PROJECT_BINARY_DIR}
            -P ${PROJECT_SOURCE_DIR}/cmake/run_doxygen.cmake
    VERBATIM COMMENT "Writing the reference to ${PROJECT_BINARY_DIR}/docs/html")
endif()
