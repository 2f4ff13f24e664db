// The Python module snnkern._C: raw addresses in, nothing allocated, no framework. The only file that knows pybind11.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "lif.h"
#include "pack.h"
#include "surrogate.h"
#include "ttm.h"

namespace py = pybind11;
using namespace snnkern;

namespace {

LIFSpec make_spec(int form, double leak, double threshold, bool fire_at_threshold, bool hard, double reset,
                  double v_start, bool detach_reset, int surrogate, double a, double b, double c) {
  return {Leak(form), leak,    threshold,    fire_at_threshold,    hard,
          reset,      v_start, detach_reset, Surrogate(surrogate), {a, b, c}};
}

void* pointer(intptr_t address) { return reinterpret_cast<void*>(address); }

#ifdef SNN_CUDA
void check_cuda(int status, const char* call, const LIFShape& s) {
  if (status != 0)
    throw std::runtime_error(std::string(call) + " outer=" + std::to_string(s.outer) + " T=" + std::to_string(s.steps) +
                             " inner=" + std::to_string(s.inner) + ": " + cuda_error_string(status));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<LIFSpec>(m, "LIFSpec").def(py::init(&make_spec));
  py::class_<LIFShape>(m, "LIFShape")
      .def(py::init([](int dtype, int64_t outer, int64_t steps, int64_t inner, int64_t x_outer, int64_t x_step,
                       int64_t segments, int64_t segment_steps, int64_t warmup) {
        return LIFShape{DType(dtype), outer, steps, inner, x_outer, x_step, segments, segment_steps, warmup};
      }));
  m.attr("chunk") = kChunk;

  py::dict surrogates;
#define SNN_ITEM(name) surrogates[#name] = int(Surrogate::name);
  SNN_SURROGATES(SNN_ITEM)
#undef SNN_ITEM
  m.attr("surrogates") = surrogates;
  m.def("cpu_isa", &cpu_isa);

  m.def("lif_forward_cpu", [](const LIFSpec& p, const LIFShape& s, intptr_t x, intptr_t v, intptr_t spikes,
                              intptr_t v_last, intptr_t saved, intptr_t scratch, int threads) {
    py::gil_scoped_release release;
    lif_forward_cpu(p, s, {pointer(x), pointer(v), pointer(spikes), pointer(v_last), pointer(saved), pointer(scratch)},
                    threads);
  });
  m.def("lif_backward_cpu",
        [](const LIFSpec& p, const LIFShape& s, intptr_t x, intptr_t v, intptr_t saved, intptr_t grad_spikes,
           intptr_t grad_v_last, intptr_t grad_x, intptr_t grad_v, intptr_t scratch, int threads) {
          py::gil_scoped_release release;
          lif_backward_cpu(p, s,
                           {pointer(x), pointer(v), pointer(saved), pointer(grad_spikes), pointer(grad_v_last),
                            pointer(grad_x), pointer(grad_v), pointer(scratch)},
                           threads);
        });

  py::class_<TTMShape>(m, "TTMShape")
      .def(py::init([](int dtype, int64_t outer, int64_t steps_in, int64_t inner, int64_t x_outer, int64_t x_step,
                       int64_t steps_out) {
        return TTMShape{DType(dtype), outer, steps_in, inner, x_outer, x_step, steps_out};
      }));
  m.def("ttm_cpu", [](const TTMShape& s, intptr_t x, intptr_t y, int threads) {
    py::gil_scoped_release release;
    ttm_cpu(s, pointer(x), pointer(y), threads);
  });

  m.def("pack_cpu", [](int dtype, int64_t n, intptr_t x, intptr_t bits, int threads) {
    py::gil_scoped_release release;
    return pack_cpu(DType(dtype), n, pointer(x), static_cast<uint8_t*>(pointer(bits)), threads);
  });
  m.def("unpack_cpu", [](int dtype, int64_t n, intptr_t bits, intptr_t x, int threads) {
    py::gil_scoped_release release;
    unpack_cpu(DType(dtype), n, static_cast<uint8_t*>(pointer(bits)), pointer(x), threads);
  });

#ifdef SNN_CUDA
  m.def("pack_cuda", [](int dtype, int64_t n, intptr_t x, intptr_t bits, intptr_t other, intptr_t stream) {
    if (const int status = pack_cuda(DType(dtype), n, pointer(x), static_cast<uint8_t*>(pointer(bits)),
                                     static_cast<int32_t*>(pointer(other)), pointer(stream)))
      throw std::runtime_error(std::string("pack_cuda: ") + cuda_error_string(status));
  });
  m.def("unpack_cuda", [](int dtype, int64_t n, intptr_t bits, intptr_t x, intptr_t stream) {
    if (const int status =
            unpack_cuda(DType(dtype), n, static_cast<uint8_t*>(pointer(bits)), pointer(x), pointer(stream)))
      throw std::runtime_error(std::string("unpack_cuda: ") + cuda_error_string(status));
  });
  m.def("ttm_cuda", [](const TTMShape& s, intptr_t x, intptr_t y, intptr_t stream) {
    if (const int status = ttm_cuda(s, pointer(x), pointer(y), pointer(stream)))
      throw std::runtime_error(std::string("ttm_cuda: ") + cuda_error_string(status));
  });
  m.def("lif_forward_cuda", [](const LIFSpec& p, const LIFShape& s, intptr_t x, intptr_t v, intptr_t spikes,
                               intptr_t v_last, intptr_t saved, intptr_t scratch, intptr_t stream) {
    check_cuda(lif_forward_cuda(
                   p, s, {pointer(x), pointer(v), pointer(spikes), pointer(v_last), pointer(saved), pointer(scratch)},
                   pointer(stream)),
               "lif_forward_cuda", s);
  });
  m.def("lif_backward_cuda",
        [](const LIFSpec& p, const LIFShape& s, intptr_t x, intptr_t v, intptr_t saved, intptr_t grad_spikes,
           intptr_t grad_v_last, intptr_t grad_x, intptr_t grad_v, intptr_t scratch, intptr_t stream) {
          check_cuda(lif_backward_cuda(p, s,
                                       {pointer(x), pointer(v), pointer(saved), pointer(grad_spikes),
                                        pointer(grad_v_last), pointer(grad_x), pointer(grad_v), pointer(scratch)},
                                       pointer(stream)),
                     "lif_backward_cuda", s);
        });
#endif
}
