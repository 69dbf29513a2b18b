// error: write {{.num_landmarks = 64}}
#include <attn/nystrom.hpp>

attn::Nystrom<float> method{.num_landmarks = 64};
