// The Python module snnkern._C: raw addresses in, nothing allocated, no framework. The only file that knows pybind11.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "lif.h"
#include "norm.h"
#include "pack.h"
#include "surrogate.h"
#include "ttm.h"

namespace py = pybind11;
using namespace py::literals;
using namespace snnkern;

namespace {

LIFSpec make_spec(int form, double leak, double threshold, bool fire_at_threshold, bool hard, double reset,
                  double v_start, bool detach_reset, int surrogate, double a, double b, double c) {
  return {Leak(form), leak,    threshold,    fire_at_threshold,    hard,
          reset,      v_start, detach_reset, Surrogate(surrogate), {a, b, c}};
}

void* pointer(intptr_t address) { return reinterpret_cast<void*>(address); }
double* numbers(intptr_t address) { return reinterpret_cast<double*>(address); }

#ifdef SNN_CUDA
void check_cuda(int status, const char* call, const LIFShape& s) {
  if (status != 0)
    throw std::runtime_error(std::string(call) + " outer=" + std::to_string(s.outer) + " T=" + std::to_string(s.steps) +
                             " inner=" + std::to_string(s.inner) + ": " + cuda_error_string(status));
}
void check_cuda(int status, const char* call, const NormPlan& p) {
  if (status != 0)
    throw std::runtime_error(std::string(call) + " channels=" + std::to_string(p.channels) + ": " +
                             cuda_error_string(status));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<LIFSpec>(m, "LIFSpec").def(py::init(&make_spec));
  py::class_<LIFShape>(m, "LIFShape")
      .def(py::init([](int dtype, int64_t outer, int64_t steps, int64_t inner, int64_t x_outer, int64_t x_step,
                       int64_t steps_out, int64_t segments, int64_t segment_steps, int64_t warmup) {
        return LIFShape{DType(dtype), outer, steps, inner, x_outer, x_step, steps_out, segments, segment_steps, warmup};
      }));
  m.attr("chunk") = kChunk;

  py::dict surrogates;
#define SNN_ITEM(name) surrogates[#name] = int(Surrogate::name);
  SNN_SURROGATES(SNN_ITEM)
#undef SNN_ITEM
  m.attr("surrogates") = surrogates;
  m.def("cpu_isa", &cpu_isa);

  py::class_<Norm>(m, "Norm").def(py::init([](int64_t channels, int64_t period, intptr_t table, intptr_t residual) {
    return Norm{channels, period, pointer(table), pointer(residual)};
  }));
  py::class_<NormPlan>(m, "NormPlan")
      .def(py::init(
          [](int dtype, int64_t channels, int64_t parts, double count, double unbiased, double momentum, double eps,
             double gain) { return NormPlan{DType(dtype), channels, parts, count, unbiased, momentum, eps, gain}; }));
  py::class_<NormParameters>(m, "NormParameters")
      .def(py::init([](intptr_t weight, intptr_t bias, intptr_t running_mean, intptr_t running_var) {
        return NormParameters{pointer(weight), pointer(bias), pointer(running_mean), pointer(running_var)};
      }));
  py::class_<LIFForward>(m, "LIFForward")
      .def(py::init([](intptr_t x, intptr_t v, intptr_t spikes, intptr_t v_last, intptr_t saved, intptr_t scratch,
                       const Norm& norm) {
             return LIFForward{pointer(x),       pointer(v), pointer(spikes), pointer(v_last), pointer(saved),
                               pointer(scratch), norm};
           }),
           "x"_a, "v"_a, "spikes"_a, "v_last"_a, "saved"_a, "scratch"_a, "norm"_a);
  py::class_<LIFBackward>(m, "LIFBackward")
      .def(py::init([](intptr_t x, intptr_t v, intptr_t saved, intptr_t grad_spikes, intptr_t grad_v_last,
                       intptr_t grad_x, intptr_t grad_v, intptr_t scratch, const Norm& norm, intptr_t pull_push,
                       intptr_t grad_residual) {
             return LIFBackward{pointer(x),
                                pointer(v),
                                pointer(saved),
                                pointer(grad_spikes),
                                pointer(grad_v_last),
                                pointer(grad_x),
                                pointer(grad_v),
                                pointer(scratch),
                                norm,
                                pointer(pull_push),
                                pointer(grad_residual)};
           }),
           "x"_a, "v"_a, "saved"_a, "grad_spikes"_a, "grad_v_last"_a, "grad_x"_a, "grad_v"_a, "scratch"_a, "norm"_a,
           "pull_push"_a, "grad_residual"_a);

  m.def("lif_forward_cpu", &lif_forward_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("lif_backward_cpu", &lif_backward_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("norm_parts_cpu", &norm_parts_cpu);
  m.def("moments_cpu", [](const LIFShape& s, const Norm& n, intptr_t x, intptr_t moments, int threads) {
    py::gil_scoped_release release;
    moments_cpu(s, n, pointer(x), numbers(moments), threads);
  });
  m.def("prepare_cpu", [](const NormPlan& p, const NormParameters& of, intptr_t moments, intptr_t table) {
    prepare_cpu(p, numbers(moments), of, pointer(table));
  });
  m.def("sums_cpu", [](const LIFSpec& p, const LIFShape& s, const LIFBackward& a, intptr_t sums, int threads) {
    py::gil_scoped_release release;
    sums_cpu(p, s, a, numbers(sums), threads);
  });
  m.def("gradients_cpu",
        [](const NormPlan& p, intptr_t table, intptr_t sums, intptr_t all_sums, intptr_t affine, intptr_t pull_push) {
          gradients_cpu(p, pointer(table), numbers(sums), numbers(all_sums), pointer(affine), pointer(pull_push));
        });
  m.def("norm_kept_cpu", &norm_kept_cpu);
  m.def("norm_backward_cpu", [](const LIFSpec& p, const LIFShape& s, const LIFBackward& a, const NormPlan& plan,
                                intptr_t sums, intptr_t affine, int threads) {
    py::gil_scoped_release release;
    norm_backward_cpu(p, s, a, plan, numbers(sums), pointer(affine), threads);
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
  m.def("lif_forward_cuda", [](const LIFSpec& p, const LIFShape& s, const LIFForward& a, intptr_t stream) {
    check_cuda(lif_forward_cuda(p, s, a, pointer(stream)), "lif_forward_cuda", s);
  });
  m.def("lif_backward_cuda", [](const LIFSpec& p, const LIFShape& s, const LIFBackward& a, intptr_t stream) {
    check_cuda(lif_backward_cuda(p, s, a, pointer(stream)), "lif_backward_cuda", s);
  });
  m.def("norm_parts_cuda", &norm_parts_cuda);
  m.def("moments_cuda", [](const LIFShape& s, const Norm& n, intptr_t x, intptr_t moments, intptr_t stream) {
    check_cuda(moments_cuda(s, n, pointer(x), numbers(moments), pointer(stream)), "moments_cuda", s);
  });
  m.def("prepare_cuda",
        [](const NormPlan& p, const NormParameters& of, intptr_t moments, intptr_t table, intptr_t stream) {
          check_cuda(prepare_cuda(p, numbers(moments), of, pointer(table), pointer(stream)), "prepare_cuda", p);
        });
  m.def("sums_cuda", [](const LIFSpec& p, const LIFShape& s, const LIFBackward& a, intptr_t sums, intptr_t stream) {
    check_cuda(sums_cuda(p, s, a, numbers(sums), pointer(stream)), "sums_cuda", s);
  });
  m.def("gradients_cuda", [](const NormPlan& p, intptr_t table, intptr_t sums, intptr_t all_sums, intptr_t affine,
                             intptr_t pull_push, intptr_t stream) {
    check_cuda(gradients_cuda(p, pointer(table), numbers(sums), numbers(all_sums), pointer(affine), pointer(pull_push),
                              pointer(stream)),
               "gradients_cuda", p);
  });
#endif
}
