// One step of the leaky integrate-and-fire neuron and its adjoint, shared by the CPU and the CUDA kernels.
//
//   current  x = i = synapse_decay*i + x      if there is one
//   charge   h = decay*v + x                  Leak::decay      (leak = decay)
//            h = v + (x - (v - rest)) / tau   Leak::tau_input  (leak = tau)
//            h = v - (v - rest) / tau + x     Leak::tau        (leak = tau)
//   bound    h = max(h, v_min)                if there is one
//   fire     s = [h > fire_above]
//            s = [h > fire_above] - [-h > fire_above]           ternary
//            s = round(clamp(h / threshold, 0, levels))         integer, ties to even
//   reset    v = s ? reset : h                hard
//            v = h - threshold * s            soft
//   adapt    a = threshold_decay*a + s        if there is adaptation: then threshold above is threshold + jump*a,
//                                             and firing at it is h >= threshold, as no float below it is known
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

// Of a neuron: what kernels may know when they are compiled.
struct Kind {
  bool hard, ternary, integer, bounded, detached, synaptic, adaptive, at_threshold;
  SNN_HOST_DEVICE bool plain() const { return !(ternary || integer || bounded || synaptic || adaptive); }
};

SNN_HOST_DEVICE constexpr bool of_input(Leak form) {
  return form == Leak::tau_input || form == Leak::tau_input_inverse;
}
SNN_HOST_DEVICE constexpr bool divides(Leak form) { return form == Leak::tau_input || form == Leak::tau; }

#ifndef __CUDACC_RTC__
template <class S>
Leak form_of(Leak form, S leak) {
  int exponent;
  if (!divides(form)) return form;
  if (std::frexp(leak, &exponent) != S(0.5) || !std::isnormal(S(1) / leak)) return form;
  return form == Leak::tau ? Leak::tau_inverse : Leak::tau_input_inverse;
}
#endif

// dh/dx and dh/dv[t-1].
template <class L>
SNN_HD L gain_of_input(Leak form, L leak) {
  return form == Leak::tau_input ? 1 / leak : form == Leak::tau_input_inverse ? leak : leak * 0 + 1;
}
template <class L>
SNN_HD L gain_of_state(Leak form, L leak) {
  if (form == Leak::decay) return leak;
  return divides(form) ? 1 - 1 / leak : 1 - leak;
}

template <class S>
struct Neuron {
  Leak form;
  bool hard, ternary, bounded, detached, synaptic, adaptive, at_threshold;  // see kind()
  Surrogate surrogate;
  S leak, rest, threshold, fire_above, reset, v_start, v_min;
  // Adjoint: dv/dh = (s ? kept : 1) + (pull - push*h) * surrogate'; dx/dh = input_gain, dv[t-1]/dh = state_gain.
  S kept, pull, push, input_gain, state_gain;
  S synapse_decay, threshold_decay, jump;
  Constants<S> k;

  SNN_HOST_DEVICE Kind kind() const {
    return {hard, ternary, surrogate == Surrogate::Integer, bounded, detached, synaptic, adaptive, at_threshold};
  }
  SNN_HOST_DEVICE int states() const { return 1 + synaptic + adaptive; }

#ifndef __CUDACC_RTC__  // made on the host
  explicit Neuron(const LIFSpec& p, const void* table = nullptr)
      : form(form_of(p.form, S(p.leak))),
        hard(p.hard),
        ternary(p.ternary),
        bounded(p.bounded),
        detached(p.detach_reset),
        synaptic(p.synaptic),
        adaptive(p.adaptive),
        at_threshold(p.fire_at_threshold),
        surrogate(p.surrogate),
        leak(form == p.form ? S(p.leak) : S(1) / S(p.leak)),
        rest(S(p.hard ? p.reset : 0)),
        threshold(S(p.threshold)),
        fire_above(p.fire_at_threshold ? std::nextafter(S(p.threshold), -std::numeric_limits<S>::infinity())
                                       : S(p.threshold)),
        reset(S(p.reset)),
        v_start(S(p.v_start)),
        v_min(S(p.v_min)),
        kept(p.hard ? S(0) : S(1)),
        pull(p.detach_reset ? S(0) : S(p.hard ? p.reset : -p.threshold)),
        push(p.detach_reset || !p.hard ? S(0) : S(1)),
        input_gain(gain_of_input(p.form, p.leak)),
        state_gain(gain_of_state(p.form, p.leak)),
        synapse_decay(S(p.synapse_decay)),
        threshold_decay(S(p.threshold_decay)),
        jump(S(p.threshold_jump)),
        k{S(p.constants[0]), S(p.constants[1]), S(p.constants[2]), static_cast<const S*>(table)} {}
#endif
};

template <class V, class S, class L>
SNN_HD V charge(Leak form, const Neuron<S>& n, L leak, V v, V x) {
  if (form == Leak::decay) return leak * v + x;
  const V above_rest = v - n.rest, drive = of_input(form) ? x - above_rest : above_rest;
  const V change = divides(form) ? drive / leak : drive * leak;
  return of_input(form) ? v + change : v - change + x;
}
template <class V, class S>
SNN_HD V charge(Leak form, const Neuron<S>& n, V v, V x) {
  return charge(form, n, n.leak, v, x);
}

template <class V, class S>
SNN_HD V reset(bool hard, const Neuron<S>& n, V h) {
  if (hard) return h > n.fire_above ? n.reset : h;
  return h > n.fire_above ? h - n.threshold : h;
}

// --- of any kind, and with a threshold P that is n's or each lane's ---

// The synaptic current, which the membrane receives for x; its adjoint, from dL/dx of the step and dL/di of the next,
// is dL/dx + synapse_decay * dL/di, and dL/dx of whoever made x.
template <class V, class S>
SNN_HD V current(const Neuron<S>& n, V i, V x) {
  return n.synapse_decay * i + x;
}

// The threshold of a step, from the adaptation before it, and the adaptation behind it. With dL/da of the latter added
// to dL/ds, dL/da of the former is threshold_decay * dL/da + jump * dL/dthreshold.
template <class V, class S, class P>
SNN_HD V raised(const Neuron<S>& n, P threshold, V a) {
  return threshold + n.jump * a;
}
template <class V, class S>
SNN_HD V adapted(const Neuron<S>& n, V a, V s) {
  return n.threshold_decay * a + s;
}

template <class V, class S>
SNN_HD V bound(const Neuron<S>& n, V h) {
  return h <= n.v_min ? n.v_min + V{} : h;
}

template <class V, class S, class P>
SNN_HD V spike(Kind kind, const Neuron<S>& n, P threshold, P fire_above, V h) {
  if (kind.integer) {
    const S to_integer = sizeof(S) == 4 ? S(12582912) : S(6755399441055744);  // 1.5 * 2^23 or 2^52: rounds when added
    const V u = h / threshold, from = u > S(0) ? u : V{};                     // a NaN does not fire
    return ((from < n.k.a ? from : n.k.a + V{}) + to_integer) - to_integer;
  }
  const auto fired = [&](V u) {
    if (kind.adaptive && kind.at_threshold) return u >= threshold ? S(1) + V{} : V{};
    return u > (kind.adaptive ? threshold : fire_above) ? S(1) + V{} : V{};
  };
  return kind.ternary ? fired(h) - fired(-h) : fired(h);
}

template <class V, class S, class P>
SNN_HD V reset(Kind kind, const Neuron<S>& n, P threshold, V h, V s) {
  if (kind.hard) return s != S(0) ? n.reset + V{} : h;
  const V lowered = kind.ternary || kind.integer ? h - threshold * s : h - threshold;
  return s != S(0) ? lowered : h;
}

// dh/dleak; where charge divides, times -leak^2, which is for whoever adds it up over time.
template <class V, class S>
SNN_HD V drive(Leak form, const Neuron<S>& n, V v, V x) {
  if (form == Leak::decay) return v;
  const V above_rest = v - n.rest;
  return of_input(form) ? x - above_rest : -above_rest;
}

// What comes back through a step to h, before its bound, and to the threshold, from dL/ds and dL/dv. Curve is of h -
// threshold and, of ternary spikes, of -h - threshold; of integer ones, of h / threshold.
//
//   dL/dx = dL/dh * dh/dx, dL/dv[t-1] = dL/dh * dh/dv; see gain_of_...
//   dL/dleak = the sum over time of dL/dh * drive
template <class V>
struct Pulled {
  V h, threshold;
};
template <class Curve, class V, class S, class P>
SNN_HD Pulled<V> pulled(Kind kind, const Neuron<S>& n, P threshold, P fire_above, V h, V grad_s, V grad_v) {
  const V s = spike(kind, n, threshold, fire_above, h);
  V rise, fall{}, by_threshold;  // ds/dh at either threshold; -ds/dthreshold
  if (kind.integer) {
    const V u = h / threshold;
    rise = Curve::grad(u, n.k) / threshold;
    by_threshold = rise != S(0) ? rise * u : V{};
  } else {
    rise = Curve::grad(h - threshold, n.k);
    if (kind.ternary) fall = Curve::grad(-h - threshold, n.k);
    by_threshold = rise - fall;
  }
  // An infinite h has slope 0; the selects keep inf * 0 out.
  const V event = kind.hard ? rise - fall : rise + fall;  // of what resets: |s|, s
  const V event_by = kind.hard && kind.ternary ? rise + fall : by_threshold;
  const V change = kind.hard ? n.reset - h : V{} - threshold;  // of v, at an event
  V through = kind.hard ? (s != S(0) ? V{} : S(1) + V{}) : S(1) + V{};
  V to_threshold = kind.hard ? V{} : -s;
  if (!kind.detached) {
    through = through + (event != S(0) ? change * event : V{});
    to_threshold = to_threshold - (event_by != S(0) ? change * event_by : V{});
  }
  Pulled<V> to{grad_s * (rise + fall) + grad_v * through, grad_v * to_threshold - grad_s * by_threshold};
  if (kind.bounded) to.h = h <= n.v_min ? V{} : to.h;
  return to;
}

#ifndef __CUDACC_RTC__  // cuda/lif.cuh has its own, of what is known when it is compiled
// The potential and, of neurons that have them, the current and the adaptation; or dL/d of them.
template <class V>
struct States {
  V v{}, i{}, a{};
};

// A step of neurons of any kind, which takes the states with it. What the membrane received, the potentials before and
// behind, not reset, the threshold of the step, the spikes.
template <class V>
struct Stepped {
  V x, before, h, threshold, s;
};
template <class V, class S, class P>
SNN_HD Stepped<V> advance(Kind kind, const Neuron<S>& n, P leak, P threshold, P fire_above, States<V>& at, V x) {
  if (kind.synaptic) x = at.i = current(n, at.i, x);
  if (kind.adaptive) threshold = raised(n, threshold, at.a);
  V h = charge(n.form, n, leak, at.v, x);
  if (kind.bounded) h = bound(n, h);
  const Stepped<V> to{x, at.v, h, threshold, spike(kind, n, threshold, fire_above, h)};
  at.v = reset(kind, n, threshold, h, to.s);
  if (kind.adaptive) at.a = adapted(n, at.a, to.s);
  return to;
}

// Its adjoint: takes dL/d of the states behind the step to those before it. dL/dx, and what sums over time are made of.
template <class V>
struct Retreated {
  V x, h, threshold;
};
template <class Curve, class V, class S, class P>
SNN_HD Retreated<V> retreat(Kind kind, const Neuron<S>& n, P threshold, P fire_above, P input_gain, P state_gain, V h,
                            V grad_s, States<V>& grad) {
  if (kind.adaptive) grad_s = grad_s + grad.a;
  const Pulled<V> to = pulled<Curve>(kind, n, threshold, fire_above, h, grad_s, grad.v);
  grad.v = to.h * state_gain;
  if (kind.adaptive) grad.a = n.threshold_decay * grad.a + n.jump * to.threshold;
  V grad_x = to.h * input_gain;
  if (kind.synaptic) {
    grad_x = grad_x + grad.i;
    grad.i = n.synapse_decay * grad_x;
  }
  return {grad_x, to.h, to.threshold};
}

// dL/dleak of a step, to be summed. Nothing comes back from an infinite potential; the select keeps 0 * inf out.
template <class V>
SNN_HD V by_drive(V grad_h, V driven) {
  return grad_h != V{} ? grad_h * driven : V{};
}

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
