// The Python module snnkern._C: raw addresses in, nothing allocated, no framework. What is checked are types, and the
// sizes of structures; what lies at an address is the caller's word.
#include "../cuda/driver.h"
#include "../lif.h"
#include "../linear.h"
#include "../neuron.h"
#include "../norm.h"
#include "../pack.h"
#include "../surrogate.h"
#include "../ttm.h"
#include "function.h"

namespace snnkern {

#define SNN_ITEM(name) +1
template <>
constexpr Enumeration kEnumeration<Surrogate>{"a surrogate", 0 SNN_SURROGATES(SNN_ITEM)};
#undef SNN_ITEM
template <>
constexpr Enumeration kEnumeration<Leak>{"a form of leak", int(Leak::tau_inverse) + 1};
template <>
constexpr Enumeration kEnumeration<DType>{"a dtype", int(DType::bf16) + 1};

namespace {

void at_least(int64_t least, const char* field, int64_t value) {
  if (value < least)
    throw std::invalid_argument(std::string(field) + " wants " + std::to_string(least) + " or more, got " +
                                std::to_string(value));
}

// ---------------------------------------------------------------- structures, of their fields in order

LIFSpec lif_spec(Leak form, double leak, double threshold, bool fire_at_threshold, bool hard, double reset,
                 double v_start, bool detach_reset, bool ternary, bool bounded, double v_min, Surrogate surrogate,
                 double a, double b, double c, bool synaptic, double synapse_decay, bool adaptive,
                 double threshold_decay, double threshold_jump) {
  return {
      form,    leak,  threshold, fire_at_threshold, hard,     reset,         v_start,  detach_reset,    ternary,
      bounded, v_min, surrogate, {a, b, c},         synaptic, synapse_decay, adaptive, threshold_decay, threshold_jump};
}

LIFShape lif_shape(DType dtype, int64_t outer, int64_t steps, int64_t inner, int64_t x_outer_stride,
                   int64_t x_step_stride, int64_t steps_out, int64_t segments, int64_t segment_steps, int64_t warmup) {
  at_least(0, "outer", outer);
  at_least(0, "steps", steps);
  at_least(0, "inner", inner);
  at_least(0, "x_outer_stride", x_outer_stride);
  at_least(0, "x_step_stride", x_step_stride);
  at_least(steps > 0, "steps_out", steps_out);
  at_least(1, "segments", segments);
  at_least(steps > 0, "segment_steps", segment_steps);
  at_least(0, "warmup", warmup);
  const bool whole = segments == 1 || (segment_steps % kChunk == 0 && warmup % kChunk == 0);
  if (!whole || segments != (steps ? (steps - 1) / segment_steps + 1 : 1))
    throw std::invalid_argument(std::to_string(steps) + " steps cannot be split into " + std::to_string(segments) +
                                " segments of " + std::to_string(segment_steps) + " steps after a warmup of " +
                                std::to_string(warmup));
  return {dtype, outer, steps, inner, x_outer_stride, x_step_stride, steps_out, segments, segment_steps, warmup};
}

void check_channels(int64_t channels, int64_t period) {  // 0: of no neurons
  at_least(0, "channels", channels);
  at_least(0, "period", period);
  if (period > 0 && channels > std::numeric_limits<int64_t>::max() / period)
    throw std::invalid_argument(std::to_string(channels) + " channels of " + std::to_string(period) +
                                " neurons are too many");
}
Norm norm(int64_t channels, int64_t period, const void* table, const void* residual) {
  check_channels(channels, period);
  return {channels, period, table, residual};
}

Parameter parameter(const void* data, int64_t channels, int64_t period) {
  check_channels(channels, period);
  return {data, channels, period};
}
More more(const void* leak, int64_t leak_channels, int64_t leak_period, const void* threshold,
          int64_t threshold_channels, int64_t threshold_period, const void* bias, int64_t bias_channels,
          int64_t bias_period, const void* fire_above, const void* table, void* v_seq, const void* grad_v_seq,
          void* grad_leak, void* grad_threshold, void* grad_bias) {
  return {parameter(leak, leak_channels, leak_period),
          parameter(threshold, threshold_channels, threshold_period),
          parameter(bias, bias_channels, bias_period),
          fire_above,
          table,
          v_seq,
          grad_v_seq,
          grad_leak,
          grad_threshold,
          grad_bias};
}

Recurrence recurrence(int64_t size, const void* weight, const void* outgoing, const void* s, const void* spikes,
                      void* grad_s) {
  at_least(1, "size", size);
  return {size, weight, outgoing, s, spikes, grad_s};
}

LIFForward lif_forward(const void* x, const void* v, void* spikes, void* v_last, void* saved, void* scratch,
                       const Norm& norm, const More& more) {
  return {x, v, spikes, v_last, saved, scratch, norm, more};
}

LIFBackward lif_backward(const void* x, const void* v, const void* saved, const void* grad_spikes,
                         const void* grad_v_last, void* grad_x, void* grad_v, void* scratch, const Norm& norm,
                         void* pull_push, void* grad_residual, const More& more) {
  return {x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, scratch, norm, pull_push, grad_residual, more};
}

NormPlan norm_plan(DType dtype, int64_t channels, int64_t parts, double count, double unbiased, double momentum,
                   double eps, double gain) {
  at_least(0, "channels", channels);
  at_least(0, "parts", parts);
  return {dtype, channels, parts, count, unbiased, momentum, eps, gain};
}

NormParameters norm_parameters(const void* weight, const void* bias, void* running_mean, void* running_var) {
  return {weight, bias, running_mean, running_var};
}

TTMShape ttm_shape(DType dtype, int64_t outer, int64_t steps_in, int64_t inner, int64_t x_outer_stride,
                   int64_t x_step_stride, int64_t steps_out) {
  at_least(0, "outer", outer);
  at_least(1, "steps_in", steps_in);
  at_least(0, "inner", inner);
  at_least(0, "x_outer_stride", x_outer_stride);
  at_least(0, "x_step_stride", x_step_stride);
  at_least(1, "steps_out", steps_out);
  return {dtype, outer, steps_in, inner, x_outer_stride, x_step_stride, steps_out};
}

LinearShape linear_shape(int64_t rows, int64_t inputs, int64_t outputs, bool biased) {
  at_least(0, "rows", rows);
  at_least(0, "inputs", inputs);
  at_least(0, "outputs", outputs);
  return {rows, inputs, outputs, biased};
}

// ---------------------------------------------------------------- functions

bool pack(DType dtype, int64_t n, const void* x, uint8_t* bits, int threads) {
  at_least(0, "n", n);
  return pack_cpu(dtype, n, x, bits, threads);
}
void unpack(DType dtype, int64_t n, const uint8_t* bits, void* x, int threads) {
  at_least(0, "n", n);
  unpack_cpu(dtype, n, bits, x, threads);
}

int64_t linear_count(const LinearShape& s, const float* spikes, int64_t rows) {
  at_least(1, "rows", rows);
  return linear_count_cpu(s, spikes, rows);
}
int64_t linear_stride(const LinearShape& s) { return s.stride(); }
int64_t linear_parts(const LinearShape& s) { return s.parts(); }

// ---------------------------------------------------------------- CUDA: see snnkern/backend/cuda/program.py

// A structure as the bytes that a kernel takes.
template <class T>
std::string as_bytes(const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
template <class T, class... Others>
std::string bytes_of(Argument given) {
  if (Py_TYPE(given.object) == type_of<T>) return as_bytes(value_of<T>(given.object));
  if constexpr (sizeof...(Others) > 0)
    return bytes_of<Others...>(given);
  else
    given.refuse("a structure that kernels take");
}
std::string neuron(const LIFSpec& spec) { return as_bytes(Neuron<float>(spec)); }

CudaKernel cuda_kernel(const std::string& image, const std::string& name, int device) { return {image, name, device}; }
CudaLaunch cuda_launch(const CudaKernel& kernel, unsigned across, unsigned down, unsigned threads, unsigned shared,
                       const std::vector<std::string>& constants) {
  return {kernel, across, down, threads, shared, constants};
}

// launch(stream, *words)
PyObject* launch(PyObject* self, PyObject* given, PyObject* named) {
  constexpr const char* name = "CudaLaunch";
  try {
    const Py_ssize_t n = PyTuple_Size(given);
    if (n < 1 || named) throw std::invalid_argument("a launch takes a stream and words, without names");
    if (n - 1 > kMostWords) throw std::invalid_argument("too many words for a launch");
    void* stream = from<void*>({name, 1, PyTuple_GetItem(given, 0)});
    int64_t words[kMostWords] = {};
    for (Py_ssize_t i = 1; i < n; ++i) words[i - 1] = from<int64_t>({name, i + 1, PyTuple_GetItem(given, i)});
    unlocked([&] { value_of<CudaLaunch>(self)(stream, words); });
    return Py_NewRef(Py_None);
  } catch (...) {
    return raise(name);
  }
}

// ---------------------------------------------------------------- the module

bool add_types() {
  return add_type<LIFSpec>("snnkern._C.LIFSpec") && add_type<LIFShape>("snnkern._C.LIFShape") &&
         add_type<Norm>("snnkern._C.Norm") && add_type<More>("snnkern._C.More") &&
         add_type<Recurrence>("snnkern._C.Recurrence") && add_type<LIFForward>("snnkern._C.LIFForward") &&
         add_type<LIFBackward>("snnkern._C.LIFBackward") && add_type<NormPlan>("snnkern._C.NormPlan") &&
         add_type<NormParameters>("snnkern._C.NormParameters") && add_type<TTMShape>("snnkern._C.TTMShape") &&
         add_type<LinearShape>("snnkern._C.LinearShape") && add_type<CudaKernel>("snnkern._C.CudaKernel") &&
         add_type<CudaLaunch>("snnkern._C.CudaLaunch", launch);
}

PyMethodDef functions[] = {
    function<cpu_isa>("cpu_isa"),
    function<lif_spec>("LIFSpec"),
    function<lif_shape>("LIFShape"),
    function<norm>("Norm"),
    function<more>("More"),
    function<lif_forward>("LIFForward"),
    function<lif_backward>("LIFBackward"),
    kernel<lif_forward_cpu>("lif_forward_cpu"),
    kernel<lif_backward_cpu>("lif_backward_cpu"),

    function<recurrence>("Recurrence"),
    kernel<recurrent_forward_cpu>("recurrent_forward_cpu"),
    kernel<recurrent_backward_cpu>("recurrent_backward_cpu"),
    kernel<recurrent_weight_cpu>("recurrent_weight_cpu"),

    function<norm_plan>("NormPlan"),
    function<norm_parameters>("NormParameters"),
    function<norm_parts_cpu>("norm_parts_cpu"),
    kernel<moments_cpu>("moments_cpu"),
    function<prepare_cpu>("prepare_cpu"),
    kernel<sums_cpu>("sums_cpu"),
    function<gradients_cpu>("gradients_cpu"),
    kernel<norm_kept_cpu>("norm_kept_cpu"),
    kernel<norm_backward_cpu>("norm_backward_cpu"),

    function<ttm_shape>("TTMShape"),
    kernel<ttm_cpu>("ttm_cpu"),
    kernel<pack>("pack_cpu"),
    kernel<unpack>("unpack_cpu"),

    function<linear_shape>("LinearShape"),
    function<linear_stride>("linear_stride"),
    function<linear_parts>("linear_parts"),
    function<linear_count>("linear_count_cpu"),
    kernel<linear_forward_cpu>("linear_forward_cpu"),
    kernel<linear_backward_cpu>("linear_backward_cpu"),

    function<neuron>("neuron"),
    function<bytes_of<LIFShape, Recurrence, TTMShape, NormPlan>>("bytes_of"),
    function<cuda_kernel>("CudaKernel"),
    function<cuda_launch>("CudaLaunch"),
    {},
};

PyObject* surrogates() {  // names, and the numbers by which LIFSpec takes them
  PyObject* made = checked(PyDict_New());
#define SNN_ITEM(name) PyDict_SetItemString(made, #name, Reference(PyLong_FromLong(long(Surrogate::name))).object);
  SNN_SURROGATES(SNN_ITEM)
#undef SNN_ITEM
  return made;
}

}  // namespace
}  // namespace snnkern

PyMODINIT_FUNC PyInit__C() {
  using namespace snnkern;
  try {
    PyObject* module = checked(add_types() ? make_module("_C", functions) : nullptr);
    PyModule_AddObjectRef(module, "surrogates", Reference(surrogates()).object);
    PyModule_AddIntConstant(module, "chunk", kChunk);
    PyModule_AddIntConstant(module, "bit_rows", LinearShape::kBitRows);
    PyModule_AddIntConstant(module, "most_inputs", LinearShape::kMostInputs);
    return module;
  } catch (...) {
    return raise("_C");
  }
}
