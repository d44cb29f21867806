// The whole encoder layer.
#pragma once
#include "attention.hpp"
namespace {
static void layer_forward(const aam::LayerForward& call) {}
static void layer_backward(const aam::LayerBackward& call) {}
}  // namespace
