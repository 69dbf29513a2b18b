# Fails unless ${readme} contains ${example} word for word.
file(READ ${readme} text)
file(READ ${example} code)
string(FIND "${text}" "${code}" position)
if(position EQUAL -1)
  message(FATAL_ERROR "${readme} does not show ${example} as it is")
endif()
