#include "kernels.h"

namespace snnkern::SNN_ISA {

void recurrent_forward(const LIFSpec&, const LIFShape&, const LIFForward&, const Recurrence&, int) {}
void recurrent_backward(const LIFSpec&, const LIFShape&, const LIFBackward&, const Recurrence&, int) {}

}  // namespace snnkern::SNN_ISA
