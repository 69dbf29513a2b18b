// error: CoreOfAnyMatrix
#include <attn/nystrom.hpp>

attn::Nystrom<Eigen::half, attn::SegmentMeans, attn::PreconditionedPinv> method;
