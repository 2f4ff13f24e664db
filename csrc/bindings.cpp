// The Python module snnkern._C: raw addresses in, nothing allocated, no framework. The only file that knows pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cuda/driver.h"
#include "lif.h"
#include "linear.h"
#include "neuron.h"
#include "norm.h"
#include "pack.h"
#include "surrogate.h"
#include "ttm.h"

namespace py = pybind11;
using namespace py::literals;
using namespace snnkern;

namespace {

LIFSpec make_spec(int form, double leak, double threshold, bool fire_at_threshold, bool hard, double reset,
                  double v_start, bool detach_reset, bool ternary, bool bounded, double v_min, int surrogate, double a,
                  double b, double c, bool synaptic, double synapse_decay, bool adaptive, double threshold_decay,
                  double threshold_jump) {
  return {
      Leak(form),      leak,          threshold, fire_at_threshold,    hard,      reset,    v_start,       detach_reset,
      ternary,         bounded,       v_min,     Surrogate(surrogate), {a, b, c}, synaptic, synapse_decay, adaptive,
      threshold_decay, threshold_jump};
}

void* pointer(intptr_t address) { return reinterpret_cast<void*>(address); }
float* floats(intptr_t address) { return reinterpret_cast<float*>(address); }
uint32_t* words(intptr_t address) { return reinterpret_cast<uint32_t*>(address); }
double* numbers(intptr_t address) { return reinterpret_cast<double*>(address); }

// A structure as the bytes that a kernel takes.
template <class T>
py::bytes bytes_of(const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

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
  py::class_<More>(m, "More")
      .def(py::init([] { return More{}; }))
      .def(py::init([](intptr_t leak, int64_t leak_channels, int64_t leak_period, intptr_t threshold,
                       int64_t threshold_channels, int64_t threshold_period, intptr_t bias, int64_t bias_channels,
                       int64_t bias_period, intptr_t fire_above, intptr_t table, intptr_t v_seq, intptr_t grad_v_seq,
                       intptr_t grad_leak, intptr_t grad_threshold, intptr_t grad_bias) {
        return More{{pointer(leak), leak_channels, leak_period},
                    {pointer(threshold), threshold_channels, threshold_period},
                    {pointer(bias), bias_channels, bias_period},
                    pointer(fire_above),
                    pointer(table),
                    pointer(v_seq),
                    pointer(grad_v_seq),
                    pointer(grad_leak),
                    pointer(grad_threshold),
                    pointer(grad_bias)};
      }));
  py::class_<Recurrence>(m, "Recurrence")
      .def(py::init([](int64_t size, intptr_t weight, intptr_t outgoing, intptr_t s, intptr_t spikes, intptr_t grad_s) {
        return Recurrence{size, pointer(weight), pointer(outgoing), pointer(s), pointer(spikes), pointer(grad_s)};
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
                       const Norm& norm, const More& more) {
             return LIFForward{
                 pointer(x), pointer(v), pointer(spikes), pointer(v_last), pointer(saved), pointer(scratch),
                 norm,       more};
           }),
           "x"_a, "v"_a, "spikes"_a, "v_last"_a, "saved"_a, "scratch"_a, "norm"_a, "more"_a);
  py::class_<LIFBackward>(m, "LIFBackward")
      .def(py::init([](intptr_t x, intptr_t v, intptr_t saved, intptr_t grad_spikes, intptr_t grad_v_last,
                       intptr_t grad_x, intptr_t grad_v, intptr_t scratch, const Norm& norm, intptr_t pull_push,
                       intptr_t grad_residual, const More& more) {
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
                                pointer(grad_residual),
                                more};
           }),
           "x"_a, "v"_a, "saved"_a, "grad_spikes"_a, "grad_v_last"_a, "grad_x"_a, "grad_v"_a, "scratch"_a, "norm"_a,
           "pull_push"_a, "grad_residual"_a, "more"_a);

  m.def("lif_forward_cpu", &lif_forward_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("lif_backward_cpu", &lif_backward_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("recurrent_forward_cpu", &recurrent_forward_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("recurrent_backward_cpu", &recurrent_backward_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("recurrent_weight_cpu",
        [](const LIFSpec& p, const LIFShape& s, const Recurrence& r, intptr_t grad_x, intptr_t grad, int threads) {
          py::gil_scoped_release release;
          recurrent_weight_cpu(p, s, r, pointer(grad_x), pointer(grad), threads);
        });
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

  py::class_<LinearShape>(m, "LinearShape")
      .def(py::init([](int64_t rows, int64_t inputs, int64_t outputs, bool biased) {
        return LinearShape{rows, inputs, outputs, biased};
      }))
      .def_property_readonly("stride", &LinearShape::stride)
      .def_property_readonly("parts", &LinearShape::parts);
  m.attr("bit_rows") = LinearShape::kBitRows;
  m.attr("most_inputs") = LinearShape::kMostInputs;
  m.def("linear_count_cpu",
        [](const LinearShape& s, intptr_t spikes, int64_t rows) { return linear_count_cpu(s, floats(spikes), rows); });
  m.def("linear_forward_cpu",
        [](const LinearShape& s, intptr_t spikes, intptr_t weight_t, intptr_t y, intptr_t bits, int threads) {
          py::gil_scoped_release release;
          return linear_forward_cpu(s, floats(spikes), floats(weight_t), floats(y), words(bits), threads);
        });
  m.def("linear_backward_cpu",
        [](const LinearShape& s, intptr_t bits, intptr_t grad, intptr_t sums, intptr_t grad_t, int threads) {
          py::gil_scoped_release release;
          linear_backward_cpu(s, words(bits), floats(grad), floats(sums), floats(grad_t), threads);
        });

  // CUDA: see snnkern/backend/cuda/program.py.
  m.def("neuron", [](const LIFSpec& spec) { return bytes_of(Neuron<float>(spec)); });
  m.def("bytes_of", &bytes_of<LIFShape>);
  m.def("bytes_of", &bytes_of<Recurrence>);
  m.def("bytes_of", &bytes_of<TTMShape>);
  m.def("bytes_of", &bytes_of<NormPlan>);
  py::class_<CudaKernel>(m, "CudaKernel").def(py::init<const std::string&, const std::string&, int>());
  py::class_<CudaLaunch>(m, "CudaLaunch")
      .def(py::init<const CudaKernel&, unsigned, unsigned, unsigned, unsigned, std::vector<std::string>>())
      .def("__call__", [](const CudaLaunch& launch, intptr_t stream, const py::args& words) {
        int64_t given[kMostWords] = {};
        if (words.size() > kMostWords) throw std::invalid_argument("too many words for a launch");
        for (size_t i = 0; i < words.size(); ++i) given[i] = words[i].cast<int64_t>();
        py::gil_scoped_release release;
        launch(pointer(stream), given);
      });
}
