// error: write {{.num_landmarks = 64}}
#include <attn/skyformer.hpp>

attn::Skyformer<float> method{64};
