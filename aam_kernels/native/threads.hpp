// What the Python module tells about threads.

#pragma once

#include <string>

namespace aam {

// Whose threads the kernels run on, in words.
std::string threads_of();

}  // namespace aam
