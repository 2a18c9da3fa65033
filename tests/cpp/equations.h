// The equations of rnnattn/reference/recurrent.py in double with plain loops, a row after the other:
// what the scans are compared with.
#pragma once

#include "layer.h"

namespace rnnattn::test {

inline double logistic(double a) { return 1 / (1 + std::exp(-a)); }

struct Forward {
  std::vector<double> y, gates, cells, c_n;  // shapes of Layer's; NaN where no step is
};

template <typename F>
Forward forward_equations(const Layer<F>& p) {
  const Shape& s = p.s;
  const int64_t G = s.gates(), H = s.H, R = s.R, C = s.columns();
  const bool lstm = s.mode == Mode::kLstm, gru = s.mode == Mode::kGru;
  Forward out;
  out.y.assign(s.T * s.B * R, NAN), out.gates.assign(s.T * s.B * C * H, NAN), out.cells.assign(s.T * s.B * H, NAN);
  out.c_n.assign(p.c0.begin(), p.c0.end());
  for (int64_t b = 0; b < s.B; ++b) {
    std::vector<double> h(p.h0.begin() + b * R, p.h0.begin() + (b + 1) * R), raw(H);
    double* c = out.c_n.data() + b * H;
    for (int64_t step = 0; step < p.length[b]; ++step) {
      const int64_t at = p.time_of(b, step) * s.B + b;
      if (p.is_reset(b, step)) {
        std::copy_n(p.h_reset.begin() + b * R, R, h.begin());
        std::copy_n(p.c_reset.begin() + b * H, H, c);
      }
      std::vector<double> x(s.I);
      for (int64_t k = 0; k < s.I; ++k) x[k] = p.x[at * s.I + k];
      for (int64_t u = 0; u < H; ++u) {
        double in[4] = {}, hidden[4] = {}, saved[4] = {};
        for (int64_t g = 0; g < G; ++g) {
          const int64_t row = g * H + u;
          if (s.biased) in[g] = p.b_ih[row], hidden[g] = p.b_hh[row];
          for (int64_t k = 0; k < s.I; ++k) in[g] += p.w_ih[row * s.I + k] * x[k];
          for (int64_t k = 0; k < R; ++k) hidden[g] += p.w_hh[row * R + k] * h[k];
        }
        const auto sum = [&](int g) { return in[g] + hidden[g]; };
        if (lstm) {
          saved[0] = logistic(sum(0)), saved[1] = logistic(sum(1)), saved[2] = std::tanh(sum(2)), saved[3] = logistic(sum(3));
          c[u] = saved[1] * c[u] + saved[0] * saved[2];
          out.cells[at * H + u] = c[u];
          raw[u] = saved[3] * std::tanh(c[u]);
        } else if (gru) {
          const double r = logistic(sum(0)), z = logistic(sum(1)), n = std::tanh(in[2] + r * hidden[2]);
          saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = hidden[2];
          raw[u] = (1 - z) * n + z * h[u];
        } else {
          raw[u] = s.mode == Mode::kTanh ? std::tanh(sum(0)) : std::max(0.0, sum(0));
        }
        for (int64_t g = 0; C > 1 && g < C; ++g) out.gates[(at * C + g) * H + u] = rounded(s.stored, saved[g]);
        raw[u] = rounded(s.stored, raw[u]);
      }
      for (int64_t k = 0; k < R; ++k) {
        h[k] = s.projected() ? 0 : raw[k];
        for (int64_t u = 0; s.projected() && u < H; ++u) h[k] += p.w_hr[k * H + u] * raw[u];
        out.y[at * R + k] = h[k] = rounded(s.stored, h[k]);
      }
    }
  }
  return out;
}

struct Backward {
  std::vector<double> d_gates, dh_out, dh, dc, dh_reset, dc_reset;  // shapes of Layer's
};

// From the layer's own y, gates and cells, so that the scan's arithmetic alone makes a difference. Gradients of the gates
// that are stored in bfloat16 are what the step before takes.
template <typename F>
Backward backward_equations(const Layer<F>& p) {
  const Shape& s = p.s;
  const int64_t G = s.gates(), H = s.H, R = s.R, C = s.columns(), first = hidden_column(s.mode) * H;
  Backward out;
  out.d_gates.assign(p.slots * C * H, NAN), out.dh_out.assign(p.slots * R, NAN);
  out.dh.assign(p.dh_n.begin(), p.dh_n.end()), out.dc.assign(p.dc_n.begin(), p.dc_n.end());
  out.dh_reset.assign(p.dh_n.size(), 0), out.dc_reset.assign(p.dc_n.size(), 0);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t step = p.length[b] - 1; step >= 0; --step) {
      const int64_t t = p.time_of(b, step), at = t * s.B + b, before = step ? p.time_of(b, step - 1) * s.B + b : -1, slot = p.slot_of(b, t);
      const bool anew = p.is_reset(b, step);
      double *d = out.d_gates.data() + slot * C * H, *dh_row = out.dh.data() + b * R;
      std::vector<double> dh(dh_row, dh_row + R), carried(R, 0.0);
      for (int64_t k = 0; k < R; ++k) out.dh_out[slot * R + k] = dh[k] += p.dy[at * R + k];
      for (int64_t u = 0; u < H; ++u) {
        double du = s.projected() ? 0 : dh[u];
        for (int64_t k = 0; s.projected() && k < R; ++k) du += p.w_hr[k * H + u] * dh[k];
        const auto gate = [&](int64_t g) { return p.gates[(at * C + g) * H + u]; };
        if (s.mode == Mode::kLstm) {
          const double i = gate(0), f = gate(1), g = gate(2), o = gate(3), tanh_c = std::tanh(static_cast<double>(p.cells[at * H + u]));
          const double c_prev = anew ? p.c_reset[b * H + u] : step ? p.cells[before * H + u] : p.c0[b * H + u];
          const double dc = out.dc[b * H + u] + du * o * (1 - tanh_c * tanh_c);
          d[u] = dc * g * i * (1 - i), d[H + u] = dc * c_prev * f * (1 - f), d[2 * H + u] = dc * i * (1 - g * g);
          d[3 * H + u] = du * tanh_c * o * (1 - o), out.dc[b * H + u] = dc * f;
        } else if (s.mode == Mode::kGru) {
          const double r = gate(0), z = gate(1), n = gate(2), q = gate(3), h_prev = anew ? p.h_reset[b * R + u] : step ? p.y[before * R + u] : p.h0[b * R + u];
          const double dn = du * (1 - z) * (1 - n * n);
          d[u] = dn, d[H + u] = dn * q * r * (1 - r), d[2 * H + u] = du * (h_prev - n) * z * (1 - z), d[3 * H + u] = dn * r;
          carried[u] = du * z;
        } else {
          const double h = p.y[at * R + u];
          d[u] = s.mode == Mode::kTanh ? du * (1 - h * h) : h > 0 ? du : 0;
        }
      }
      for (int64_t k = 0; s.narrow() && k < C * H; ++k) d[k] = rounded(s.stored, d[k]);
      for (int64_t k = 0; k < R; ++k) {
        dh_row[k] = carried[k];
        for (int64_t row = 0; row < G * H; ++row) dh_row[k] += p.w_hh[row * R + k] * d[first + row];
      }
      // What a replaced state is worth goes to what took its place.
      const auto cut = [&](std::vector<double>& from, std::vector<double>& to, int64_t n) {
        for (int64_t i = b * n; i < (b + 1) * n; ++i) {
          if (s.to_initial) to[i] += from[i];
          from[i] = 0;
        }
      };
      if (anew) cut(out.dh, out.dh_reset, R), cut(out.dc, out.dc_reset, H);
    }
  return out;
}

}  // namespace rnnattn::test
