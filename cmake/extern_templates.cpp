// What attn::compiled adds to a program: attn's templates, compiled once.
#define ATTN_INSTANTIATE_TEMPLATES
#include <attn/extern_templates.hpp>
