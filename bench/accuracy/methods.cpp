#include "accuracy/methods.hpp"

#include "common/frozen_shift.hpp"

namespace accuracy {
namespace {

template <attn::ForwardOperator Operator>
Matrix<float> matrix_of(const Operator& op, attn::Context& context) {
  const Matrix<float> identity = Matrix<float>::Identity(op.cols(), op.cols());
  Matrix<float> a(op.rows(), op.cols());
  op.apply(identity, a, context);
  return a;
}

}  // namespace

attn::AnyApproximator<float> make_method(std::string_view name, Index m, std::uint64_t seed) {
  return attn::find_method<float>(name).make({.num_landmarks = m, .num_near = m, .seed = seed});
}

Matrix<float> method_matrix(std::string_view name, Index num_landmarks, std::uint64_t seed,
                            const Tokens<float>& tokens) {
  if (name == attn::ShiftedNystrom<float>::kName) return shifted_matrix(attn::ShiftMode::row, num_landmarks, tokens);
  attn::Context context;
  const auto method = make_method(name, num_landmarks, seed);
  return matrix_of(attn::ApproximatorOperator(method, tokens.q, tokens.k), context);
}

Matrix<float> shifted_matrix(attn::ShiftMode mode, Index num_landmarks, const Tokens<float>& tokens) {
  attn::Context context;
  const attn::SegmentMeans landmarks{.num_landmarks = num_landmarks};
  if (mode == attn::ShiftMode::row) {
    const attn::Inputs<float> in{tokens.q, tokens.k, tokens.v};
    return matrix_of(FrozenShift<float>(landmarks, in, context), context);
  }
  const attn::ShiftedNystrom<float> method(landmarks, {.mode = mode});
  return matrix_of(attn::ApproximatorOperator(method, tokens.q, tokens.k), context);
}

}  // namespace accuracy
