/// attn: attention and its approximations. Includes everything; openmp.hpp only where OpenMP is on,
/// extern_templates.hpp where a macro asks for it.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/any_approximator.hpp>
#include <attn/approximator.hpp>
#include <attn/attention_operator.hpp>
#include <attn/automatic.hpp>
#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/depthwise_conv.hpp>
#include <attn/error_estimate.hpp>
#include <attn/exact.hpp>
#include <attn/head_inputs.hpp>
#include <attn/heads.hpp>
#include <attn/kernel.hpp>
#include <attn/key_cache.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/lifted_softmax.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>
#include <attn/metrics.hpp>
#include <attn/multi_head.hpp>
#include <attn/multipole.hpp>
#include <attn/nystrom.hpp>
#include <attn/skyformer.hpp>
#include <attn/spectral_shift.hpp>
#include <attn/version.hpp>

#ifdef _OPENMP
#include <attn/openmp.hpp>
#endif

#if defined(ATTN_EXTERN_TEMPLATES) || defined(ATTN_INSTANTIATE_TEMPLATES)
#include <attn/extern_templates.hpp>
#endif
