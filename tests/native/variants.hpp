// The variants under test, and the tests.

#pragma once

#include <vector>

#include "inside.hpp"
#include "interface.hpp"

struct Variant {
    const aam::Kernels* kernels;
    const aam::Inside* inside;
};

// Those that this processor can run, best first.
const std::vector<Variant>& variants();

void test_functions();
void test_dropout();
void test_products();
void test_attention();
void test_pooling();
void test_layer();
