// Attention pooling.
#pragma once
#include "functions.hpp"
namespace {
static void pooling_forward(const aam::PoolingForward& call) {}
static void pooling_backward(const aam::PoolingBackward& call) {}
}  // namespace
