# What doxygen reads of a header: its purpose, in the first line, is that of the file, and what a comment indents
# (formulas, lists) stays as it is laid out. Line numbers stay those of the header.
function is_indented(line) { return line ~ /^ *\/\/\/  +[^ ]/ }

NR == 1 {
  print "/// @file"
  held = $0
  next
}
/^#pragma once$/ { next }
{
  if (!is_indented(held) && is_indented($0)) held = held " <pre>"
  if (is_indented(held) && !is_indented($0)) held = held "</pre>"
  print held
  held = $0
}
END { print held }
