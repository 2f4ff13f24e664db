// One step of the leaky integrate-and-fire neuron and its adjoint, shared by the CPU and the CUDA kernels.
//
//   charge   h = decay*v + x                  Leak::decay      (leak = decay)
//            h = v + (x - (v - rest)) / tau   Leak::tau_input  (leak = tau)
//            h = v - (v - rest) / tau + x     Leak::tau        (leak = tau)
//   fire     s = [h > fire_above]
//   reset    v = s ? reset : h                hard
//            v = s ? h - threshold : h        soft
//
// The order of operations is part of the contract: with contraction off, spikes equal those of the plain loop bit for
// bit. Dividing by a power of two, tau = 2 above all, is multiplying by its inverse, as both round the same number
// once: then the form becomes Leak::tau_input_inverse or Leak::tau_inverse, and leak the inverse. h >= threshold is
// written h > fire_above, fire_above being the next float below the threshold. A fired potential is selected away,
// never multiplied by zero, so that an infinite input leaves no NaN behind.
#pragma once
#include "lif.h"
#include "surrogate.h"

namespace snnkern {
namespace {  // every object file its own copy: the CPU kernels are compiled for several instruction sets

#ifndef __CUDACC_RTC__
template <class S>
Leak form_of(Leak form, S leak) {
  int exponent;
  if (form == Leak::decay || std::frexp(leak, &exponent) != S(0.5) || !std::isnormal(S(1) / leak)) return form;
  return form == Leak::tau ? Leak::tau_inverse : Leak::tau_input_inverse;
}
#endif

template <class S>
struct Neuron {
  Leak form;
  bool hard;
  Surrogate surrogate;
  S leak, rest, threshold, fire_above, reset, v_start;
  // Adjoint: dv/dh = (s ? kept : 1) + (pull - push*h) * surrogate'; dx/dh = input_gain, dv[t-1]/dh = state_gain.
  S kept, pull, push, input_gain, state_gain;
  Constants<S> k;

#ifndef __CUDACC_RTC__  // made on the host
  explicit Neuron(const LIFSpec& p)
      : form(form_of(p.form, S(p.leak))),
        hard(p.hard),
        surrogate(p.surrogate),
        leak(form == p.form ? S(p.leak) : S(1) / S(p.leak)),
        rest(S(p.hard ? p.reset : 0)),
        threshold(S(p.threshold)),
        fire_above(p.fire_at_threshold ? std::nextafter(S(p.threshold), -std::numeric_limits<S>::infinity())
                                       : S(p.threshold)),
        reset(S(p.reset)),
        v_start(S(p.v_start)),
        kept(p.hard ? S(0) : S(1)),
        pull(p.detach_reset ? S(0) : S(p.hard ? p.reset : -p.threshold)),
        push(p.detach_reset || !p.hard ? S(0) : S(1)),
        input_gain(p.form == Leak::tau_input ? S(1 / p.leak) : S(1)),
        state_gain(p.form == Leak::decay ? S(p.leak) : S(1 - 1 / p.leak)),
        k{S(p.constants[0]), S(p.constants[1]), S(p.constants[2])} {}
#endif
};

template <class V, class S>
SNN_HD V charge(Leak form, const Neuron<S>& n, V v, V x) {
  if (form == Leak::decay) return n.leak * v + x;
  const V above_rest = v - n.rest;
  const bool of_input = form == Leak::tau_input || form == Leak::tau_input_inverse;
  const V drive = of_input ? x - above_rest : above_rest;
  const V change = form == Leak::tau_input || form == Leak::tau ? drive / n.leak : drive * n.leak;
  return of_input ? v + change : v - change + x;
}

template <class V, class S>
SNN_HD V reset(bool hard, const Neuron<S>& n, V h) {
  if (hard) return h > n.fire_above ? n.reset : h;
  return h > n.fire_above ? h - n.threshold : h;
}

#ifndef __CUDACC_RTC__  // cuda/lif.cuh has its own, of what is known when it is compiled
// dL/dh from dL/ds and dL/dv. An infinite h has surrogate 0; the select keeps inf * 0 out.
template <class Curve, class V, class S>
SNN_HD V adjoint(const Neuron<S>& n, V h, V grad_s, V grad_v) {
  const V g = Curve::grad(h - n.threshold, n.k);
  const V keep = h > n.fire_above ? n.kept : S(1);
  const V through_reset = (n.pull - n.push * h) * g;
  return grad_s * g + grad_v * (keep + (g != S(0) ? through_reset : S(0)));
}
#endif

}  // namespace
}  // namespace snnkern
