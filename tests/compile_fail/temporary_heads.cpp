// error: LastingRows
#include <attn/heads.hpp>

attn::HeadsView<float> heads() {
  return attn::heads_of(attn::Matrix<float>(10, 12), 4);
}
