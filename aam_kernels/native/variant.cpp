// All kernels, compiled for one kind of processor: AAM_VARIANT and AAM_VARIANT_NAME say which.
//
// Nothing of the standard library is instantiated here (its inline functions would be shared by
// the linker with code for older processors).

#include "attention.hpp"
#include "layer_backward.hpp"
#include "layer_forward.hpp"
#include "peak.hpp"
#include "pooling.hpp"

namespace aam {

extern const Kernels AAM_VARIANT;
const Kernels AAM_VARIANT = {
    AAM_VARIANT_NAME, WIDTH,          attention_forward, attention_backward, pooling_forward,
    pooling_backward, layer_forward,  layer_backward,    multiply_adds,
};

}  // namespace aam
