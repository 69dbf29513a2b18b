// compiles
#include <attn/attn.hpp>

attn::SoftmaxAttention<float> softmax{{.scale = 0.5}};
attn::Multipole<float> near{{.num_near = 64}};
attn::Nystrom<float> of_options{{.num_landmarks = 64}, {.iterations = 8}}, of_defaults{{}, {}}, of_nothing{};
attn::ShiftedNystrom<float> of_values{attn::SegmentMeans{.num_landmarks = 64}, attn::SpectralShift{}};
attn::Skyformer<float> in_parentheses(attn::UniformSample{.num_landmarks = 64});
attn::LiftedSoftmax<float> lifted = attn::LiftedSoftmax<float>{{.num_landmarks = 64}};
