// error: CoreOfAnyMatrix
#include <attn/nystrom.hpp>

attn::Nystrom<float, attn::SegmentMeans, attn::RidgeInverse> method;
