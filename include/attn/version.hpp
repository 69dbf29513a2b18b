/// The version of attn, and nothing else: CMake reads these three numbers too.
#pragma once

/// @{ The numbers of Semantic Versioning.
#define ATTN_VERSION_MAJOR 0
#define ATTN_VERSION_MINOR 1
#define ATTN_VERSION_PATCH 0
/// @}
