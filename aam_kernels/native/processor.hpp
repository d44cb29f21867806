// Which of the compiled kernels this processor runs, and which are used.

#pragma once

#include <string>
#include <vector>

#include "interface.hpp"

namespace aam {

// Every variant in this build, best first.
const std::vector<const Kernels*>& compiled();

// Those that this processor and its operating system can run.
const std::vector<const Kernels*>& runnable();

// The variant in use: the one that was selected, else AAM_KERNELS_CPU, else the best.
// Throws std::invalid_argument when AAM_KERNELS_CPU names none that can run.
const Kernels& selected();

// A variant by its name. Throws std::invalid_argument when it is unknown or cannot run here.
const Kernels& variant(const std::string& name);

// Uses a variant from now on; an empty name: as AAM_KERNELS_CPU says, else the best.
// Throws as `variant` does.
void select(const std::string& name);

}  // namespace aam
