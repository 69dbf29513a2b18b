/// What the studies found, as text and as JSON.
#pragma once

#include "accuracy/study.hpp"

#include <nlohmann/json_fwd.hpp>

#include <string>

namespace accuracy {

/// Medians over the seeds; the last column is the largest (maximum - minimum) / median of a line's figures, where there
/// are several samples.
std::string text_of(const Table& table);

/// {"title": ..., "rows": [{label: value, ..., figure: {"median": ..., "min": ..., "max": ...}, ...}, ...]}
nlohmann::ordered_json json_of(const Table& table);

}  // namespace accuracy
