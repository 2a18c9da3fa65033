// The forward of a recurrent layer on a CPU: weights packed, then one parallel region in which each
// thread scans its rows or its units to the end.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>

#include "../dispatch.h"
#include "huge_pages.h"
#include "layer.h"
#include "row_order.h"

namespace rnnattn {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// [blocks][vectors][lanes]: what is added to the input product. GRU's b_hn is not, it stands inside r * q.
template <typename F>
Tensor input_bias(const DirectionWeights& w, Mode mode, int64_t H) {
  Tensor bias = w.b_ih + w.b_hh;
  if (mode == Mode::kGru) bias.narrow(0, 2 * H, H).copy_(w.b_ih.narrow(0, 2 * H, H));
  const PackedMatrix<F> packed({bias.const_data_ptr<F>(), 0, 1, 1, H, weight_gates(mode), unit_vectors(mode)}, bias.options());
  packed.pack(0, 1);
  return packed.panels;
}

template <typename F>
PackedMatrix<F> packed_gates(const Tensor& w, Mode mode, int64_t H, bool pack) {
  return {{w.const_data_ptr<F>(), 1, w.size(1), w.size(1), H, weight_gates(mode), unit_vectors(mode)}, w.options(), pack};
}

constexpr int64_t kFewRows = 4;  // steps times rows that do not pay for packing the weights

// Scan steps whose input product a member computes at once: as many as leave its cache to the weights.
int64_t chunk_steps(double rows, int64_t columns, int64_t element, int64_t T) {
  const double rows_at_once = static_cast<double>(private_cache()) / 8 / static_cast<double>(columns * element);
  return std::clamp<int64_t>(static_cast<int64_t>(rows_at_once / std::max(1.0, rows)), 1, T);
}

template <typename F>
Outputs forward(const Tensor& x_given, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                const OptionalTensor& lengths, bool has_biases, std::string_view direction, Mode mode, bool save) {
  const auto reverses = parse_direction(direction);
  const auto acc = c10::CppTypeToScalarType<F>::value;
  const Stored stored = stored_as(x_given.scalar_type());
  const Tensor x = x_given.stride(2) == 1 || x_given.size(2) == 1 ? x_given : x_given.contiguous();
  const int64_t T = x.size(0), B = x.size(1), I = x.size(2), K = h0.size(0), R = h0.size(2);
  const int64_t gates = weight_gates(mode), columns = gate_columns(mode), H = weights[0].size(0) / gates;
  const bool lstm = mode == Mode::kLstm, saves_gates = save && columns > 1;
  const auto options = x.options(), full = options.dtype(acc);
  const auto none = [](const at::TensorOptions& o) { return at::empty({0}, o); };

  const auto parts = split_weights(weights, has_biases, K, acc);
  const bool projected = parts[0].w_hr.defined();
  const Tensor y = in_huge_pages(at::empty({T, B, K * R}, options));
  const Tensor gates_out = saves_gates ? in_huge_pages(at::empty({K, T, B, columns * H}, options)) : none(options);
  const Tensor cells = save && lstm ? in_huge_pages(at::empty({K, T, B, H}, full)) : none(full);
  const Tensor h0_full = h0.to(acc).contiguous();
  const Tensor c0_full = lstm ? c0->to(acc).contiguous() : none(full), c = c0_full.clone();
  const Tensor h = stored == Stored::kFull ? Tensor() : at::empty({K, 2, B, R}, full);
  const Tensor h_raw = projected ? at::empty({K, B, H}, full) : Tensor();

  const bool pack = T * B > kFewRows;
  std::vector<PackedMatrix<F>> matrices;  // per direction: w_ih, w_hh, (w_hr)
  std::vector<Tensor> biases;
  for (const auto& w : parts) {
    matrices.push_back(packed_gates<F>(w.w_ih, mode, H, pack));
    matrices.push_back(packed_gates<F>(w.w_hh, mode, H, pack));
    if (projected) matrices.push_back(packed_columns<F>(w.w_hr, true));
    if (has_biases) biases.push_back(input_bias<F>(w, mode, H));
  }
  const size_t each = matrices.size() / K;
  const int64_t lanes = kernels<F>().lanes, blocks = matrices[0].blocks, block = gates * unit_vectors(mode) * lanes;
  const int64_t projected_blocks = projected ? matrices[2].blocks : 0;

  const double rows = mean_rows(lengths, T, B);
  const Plan plan = plan_layer({mode, B, I, H, R, static_cast<int>(K), rows, sizeof(F), lanes, false}, team_size());
  const RowOrder order(lengths, T, B, plan.groups);
  const int64_t group_rows = (B + plan.groups - 1) / plan.groups;

  run_layer(plan, static_cast<int>(K), matrices, [&](int k, int group, int index, int members, int, Barrier* barrier) {
    const auto share = [&](int64_t n, int m) { return n * m / members; };
    const int64_t first = share(blocks, index), last = share(blocks, index + 1);
    // All members of a group take the same steps at once, whatever their own share is.
    const int64_t chunk = chunk_steps(rows / plan.groups, (blocks + members - 1) / members * block, sizeof(F), T);
    const int64_t chunk_rows = chunk * group_rows;
    const int64_t gates_x = (chunk > 1 ? last - first : 1) * chunk_rows * block, x_full = stored == Stored::kFull ? 0 : chunk_rows * I;
    const auto memory = c10::GetAllocator(c10::kCPU)->allocate((gates_x + x_full) * sizeof(F));
    F* scratch = static_cast<F*>(memory.get());
    std::vector<const F*> pointers(chunk_rows + 2 * group_rows);
    const Member<F> member{index, first, last, share(projected_blocks, index), share(projected_blocks, index + 1),
                           scratch, scratch + gates_x, pointers.data()};
    const auto pointer = [&](const Tensor& t, int64_t stride) { return t.defined() && t.numel() ? t.data_ptr<F>() + k * stride : nullptr; };
    const auto at_bytes = [&](const Tensor& t, int64_t index) -> void* {
      return t.numel() ? static_cast<char*>(t.data_ptr()) + index * t.element_size() : nullptr;
    };
    const F* bias_q = mode == Mode::kGru && has_biases ? parts[k].b_hh.template const_data_ptr<F>() + 2 * H : nullptr;
    const ForwardScan<F> scan{mode, stored, T, B, I, H, R, order.group(group, reverses[k]), barrier,
                              x.const_data_ptr(), x.stride(0), x.stride(1),
                              matrices[k * each].packing, matrices[k * each + 1].packing, matrices[k * each].data(), matrices[k * each + 1].data(),
                              has_biases ? biases[k].const_data_ptr<F>() : nullptr, bias_q,
                              projected ? matrices[k * each + 2].data() : nullptr, h0_full.const_data_ptr<F>() + k * B * R,
                              pointer(h, 2 * B * R), pointer(h_raw, B * H), pointer(c, B * H), at_bytes(y, k * R), K * R,
                              at_bytes(gates_out, k * T * B * columns * H), pointer(cells, T * B * H), chunk};
    kernels<F>().forward_scan(scan, member);
  });

  // The last states, and what stands behind a row's length.
  const Tensor h0_rows = h0.contiguous(), h_n = at::empty_like(h0_rows);
  const auto bytes = [](const Tensor& t, int64_t index) { return static_cast<char*>(t.data_ptr()) + index * t.element_size(); };
  const int64_t element = x.element_size();
  for (int64_t k = 0; k < K; ++k)
    order.for_rows([&](int64_t b, int64_t length, int64_t) {
      const int64_t last = ((reverses[k] ? 0 : length - 1) * B + b) * K * R + k * R;
      std::memcpy(bytes(h_n, (k * B + b) * R), length ? bytes(y, last) : bytes(h0_rows, (k * B + b) * R), R * element);
      for (int64_t t = length; t < T; ++t) {
        std::memset(bytes(y, (t * B + b) * K * R + k * R), 0, R * element);
        const int64_t at = (k * T + t) * B + b;
        if (saves_gates) std::memset(bytes(gates_out, at * columns * H), 0, columns * H * element);
        if (save && lstm) {
          const Tensor& carried = reverses[k] ? c0_full : c;
          std::copy_n(carried.const_data_ptr<F>() + (k * B + b) * H, H, cells.data_ptr<F>() + at * H);
        }
      }
    });
  return {y, h_n, lstm ? c.to(x.scalar_type()) : none(options), gates_out, cells};
}

Outputs recurrent_layer_forward(const Tensor& x, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                const OptionalTensor& lengths, bool has_biases, std::string_view direction,
                                std::string_view mode, bool save) {
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    return forward<decltype(zero)>(x, h0, c0, weights, contiguous(lengths), has_biases, direction, parse_mode(mode), save);
  });
}

TORCH_LIBRARY_IMPL(rnnattn_native, CPU, m) {
  watch_forks();
  m.impl("recurrent_layer_forward", &recurrent_layer_forward);
}

}  // namespace
}  // namespace rnnattn
