// error: attn reports wrong arguments .* by throwing, and so cannot be compiled with -fno-exceptions
// flags: -fno-exceptions
#include <attn/attn.hpp>
