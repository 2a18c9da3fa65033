// Softmax attention pooling on a CPU, in one pass over x. Rows are cut into pieces that threads share;
// a piece goes tile by tile, a tile being a few kept steps that stay in cache: scores, running softmax
// and weighted sum forward; scores, their gradients and dx backward. Additive scores are a GEMM per
// tile, so that the [B, T, A] activations never exist.
#include "../attention_pool.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "../optional_tensor.h"
#include "huge_pages.h"
#include "isa.h"
#include "pool_tiles.h"
#include "team.h"

namespace rnnattn {
namespace {

using at::Tensor;

template <typename F>
Tensor as_matrix(const F* data, int64_t rows, int64_t columns, int64_t stride) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<F>::value);
  return at::from_blob(const_cast<F*>(data), {rows, columns}, {stride, 1}, options);
}

// The score function with its parameters in the accumulation type.
template <typename F>
struct Score {
  Tensor v, w, b;  // [D] or [A], [A, D] or undefined, [A] or undefined
  Tensor w_t;      // [D, A] contiguous: products with it run twice as fast as with a transposed view

  Score(const Tensor& v_in, const OptionalTensor& w_in, const OptionalTensor& b_in) {
    const auto acc = c10::CppTypeToScalarType<F>::value;
    v = v_in.to(acc).contiguous();
    if (w_in) {
      w = w_in->to(acc).contiguous();
      w_t = w.t().contiguous();
    }
    if (b_in) b = b_in->to(acc).contiguous();
  }
  bool additive() const { return w.defined(); }
  int64_t A() const { return additive() ? w.size(0) : 0; }
  const F* v_data() const { return v.const_data_ptr<F>(); }
  const F* b_data() const { return b.defined() ? b.const_data_ptr<F>() : nullptr; }

  // A linear tile fits the first cache, an additive one feeds a GEMM from the second.
  int64_t tile_steps(int64_t D) const { return additive() ? 128 : std::clamp<int64_t>(4096 / D, 1, 64); }

  // s[r] for a tile; u [steps, A] is left with tanh(W x + b).
  void operator()(const PoolTile<F>& tile, F* u, F* s) const {
    if (!additive()) return kernels<F>().pool_dot(tile, v_data(), s);
    Tensor product = as_matrix(u, tile.steps, A(), A());
    at::mm_out(product, as_matrix(tile.x, tile.steps, tile.D, tile.x_stride), w_t);
    kernels<F>().additive_scores({tile.steps, A(), u, b_data(), v_data(), s});
  }
};

// pooled [B, D], lse [B] and, where scores is defined, the scores [B, T] of the kept steps, in F.
template <typename F, typename S>
std::tuple<Tensor, Tensor> pool(const Tensor& x, const Score<F>& score, const OptionalTensor& lengths,
                                const OptionalTensor& mask, const Tensor& scores) {
  const int64_t B = x.size(0), D = x.size(2), tile_steps = score.tile_steps(D);
  const auto options = x.options().dtype(c10::CppTypeToScalarType<F>::value);
  constexpr F kNone = -std::numeric_limits<F>::infinity();
  const auto pieces = cut(x, lengths, tile_steps);
  const int64_t count = pieces.empty() ? 0 : pieces.back().first + pieces.back().rows;
  const Tensor acc = at::zeros({count, D}, options);
  std::vector<PoolState<F>> states(count);  // of the rows of all pieces, one after the other
  std::vector<int64_t> owner(count);        // the row of x that a state belongs to
  for (const Piece& piece : pieces)
    for (int64_t row = 0; row < piece.rows; ++row) {
      states[piece.first + row] = {kNone, F(0), acc.data_ptr<F>() + (piece.first + row) * D};
      owner[piece.first + row] = piece.b + row;
    }
  F* scores_data = scores.defined() ? scores.data_ptr<F>() : nullptr;
  at::parallel_for(0, pieces.size(), 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    Tiles<F, S> tiles(x, mask, tile_steps);
    std::vector<F> u(tile_steps * score.A()), s(tile_steps), p(tile_steps);
    for (int64_t n = first; n < last; ++n) {
      tiles.walk(pieces[n], [&](const PoolTile<F>& tile, const int64_t* kept) {
        score(tile, u.data(), s.data());
        tiles.for_rows(tile, kept, [&](int64_t row, int64_t r, const PoolTile<F>& part) {
          kernels<F>().pool_softmax(part, s.data() + r, p.data(), states[pieces[n].first + row]);
        });
        if (!scores_data) return;
        for (int64_t r = 0; r < tile.steps; ++r) scores_data[pieces[n].b * x.size(1) + kept[r]] = s[r];
      });
    }
  });
  const Tensor pooled = at::zeros({B, D}, options), lse = at::full({B}, kNone, options);
  for (int64_t n = 0; n < count;) {  // the states of a row follow one another
    const int64_t b = owner[n], begin = n;
    F max = kNone, sum = 0;
    for (; n < count && owner[n] == b; ++n)
      if (states[n].sum > 0 || std::isnan(states[n].sum)) max = states[n].max > max || std::isnan(states[n].max) ? states[n].max : max;
    F* out = pooled.data_ptr<F>() + b * D;
    for (int64_t m = begin; m < n; ++m) {
      if (states[m].sum == 0) continue;
      const F scale = std::exp(states[m].max - max);
      sum += states[m].sum * scale;
      kernels<F>().pool_add({1, D, states[m].acc, D}, &scale, out);
    }
    if (sum == 0) continue;
    for (int64_t d = 0; d < D; ++d) out[d] /= sum;
    lse.data_ptr<F>()[b] = max + std::log(sum);
  }
  return {pooled, lse};
}

// exp(scores - lse), zero in rows that keep nothing; scores are -inf at steps left out.
Tensor softmax_weights(const Tensor& scores, const Tensor& lse) {
  const Tensor column = lse.unsqueeze(1);
  return at::where(column == -std::numeric_limits<double>::infinity(), 0, (scores - column).exp());
}

template <typename F>
Tensor no_scores(const Tensor& x) {
  return at::full({x.size(0), x.size(1)}, -std::numeric_limits<F>::infinity(), x.options().dtype(c10::CppTypeToScalarType<F>::value));
}

template <typename F, typename S>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& v, const OptionalTensor& w, const OptionalTensor& b,
                                           const OptionalTensor& lengths, const OptionalTensor& mask, bool need_weights) {
  const Tensor scores = need_weights ? no_scores<F>(x) : Tensor();
  const auto [pooled, lse] = pool<F, S>(x, Score<F>(v, w, b), lengths, mask, scores);
  const Tensor weights = need_weights ? softmax_weights(scores, lse) : at::empty({0}, x.options());
  return {pooled, weights.to(x.scalar_type()), lse};
}

template <typename F, typename S>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& d_pooled, const OptionalTensor& d_weights, const Tensor& x, const Tensor& v_in,
    const OptionalTensor& w_in, const OptionalTensor& b_in, const OptionalTensor& lengths, const OptionalTensor& mask,
    const Tensor& pooled, const Tensor& lse) {
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  const Score<F> score(v_in, w_in, b_in);
  const int64_t A = score.A(), tile_steps = score.tile_steps(D);
  const auto acc = c10::CppTypeToScalarType<F>::value;
  const auto options = x.options().dtype(acc);

  // ds_t = p_t (x_t . g + dp_t - delta) with g = d_pooled, dp = d_weights, delta = sum_t p_t (x_t . g + dp_t)
  const Tensor g = d_pooled ? d_pooled->to(acc).contiguous() : at::zeros({B, D}, options);
  Tensor dp, delta = (g * pooled.to(acc)).sum(1);
  if (d_weights) {
    const Tensor scores = no_scores<F>(x);
    pool<F, S>(x, score, lengths, mask, scores);
    const Tensor p = softmax_weights(scores, lse);
    dp = at::where(p > 0, d_weights->to(acc), 0);
    delta = delta + (p * dp).sum(1);
  }
  const F *lse_data = lse.const_data_ptr<F>(), *delta_data = delta.const_data_ptr<F>(), *g_data = g.const_data_ptr<F>();
  const F* dp_data = dp.defined() ? dp.const_data_ptr<F>() : nullptr;

  const auto pieces = cut(x, lengths, tile_steps);
  const bool whole = !lengths && !mask;  // every element of dx is written below
  const Tensor dx = in_huge_pages(at::empty({B, T, D}, x.options()));
  if (!whole) dx.zero_();
  // Each thread sums its own share of the parameters' gradients: [v | b | w].
  const int64_t n_v = score.v.numel(), n_b = A, n_w = A * D;
  const Tensor shares = at::zeros({at::get_num_threads(), n_v + n_b + n_w}, options);
  at::parallel_for(0, pieces.size(), 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    Tiles<F, S> tiles(x, mask, tile_steps);
    std::vector<F> u(tile_steps * A), s(tile_steps), p(tile_steps), ds(tile_steps);
    std::vector<F> dx_scratch(tiles.gathers() ? tile_steps * D : 0);
    F* dv = shares.data_ptr<F>() + at::get_thread_num() * shares.stride(0);
    F *db = dv + n_v, *dw = db + n_b;
    for (int64_t n = first; n < last; ++n) {
      const int64_t b = pieces[n].b;
      S* dx_piece = dx.data_ptr<S>() + b * T * D;
      tiles.walk(pieces[n], [&](const PoolTile<F>& tile, const int64_t* kept) {
        score(tile, u.data(), s.data());
        F* out = dx_scratch.data();
        if constexpr (std::is_same_v<F, S>)
          if (!tiles.gathers()) out = dx_piece + kept[0] * D;
        tiles.for_rows(tile, kept, [&](int64_t row, int64_t first_r, const PoolTile<F>& part) {
          const F* g_row = d_pooled ? g_data + (b + row) * D : nullptr;
          F *s_r = s.data() + first_r, *p_r = p.data() + first_r, *ds_r = ds.data() + first_r;
          kernels<F>().pool_exp(part.steps, s_r, lse_data[b + row], p_r);
          if (g_row) kernels<F>().pool_dot(part, g_row, s_r);
          else std::fill_n(s_r, part.steps, F(0));
          for (int64_t r = 0; r < part.steps; ++r) {
            const F dp_direct = dp_data ? dp_data[b * T + kept[first_r + r]] : F(0);
            ds_r[r] = p_r[r] * (s_r[r] + dp_direct - delta_data[b + row]);
          }
          const F* v = score.additive() ? nullptr : score.v_data();
          kernels<F>().pool_outer(part, p_r, g_row, ds_r, v, out + first_r * D, D);
        });
        if (score.additive()) {
          kernels<F>().additive_gradient({tile.steps, A, u.data(), score.v_data(), ds.data(), dv, db});
          const Tensor du = as_matrix(u.data(), tile.steps, A, A);
          as_matrix(out, tile.steps, D, D).addmm_(du, score.w);
          as_matrix(dw, A, D, D).addmm_(du.t(), as_matrix(tile.x, tile.steps, D, tile.x_stride));
        } else {
          kernels<F>().pool_add(tile, ds.data(), dv);
        }
        if (!tiles.gathers()) return;
        for (int64_t r = 0; r < tile.steps; ++r)
          std::transform(out + r * D, out + (r + 1) * D, dx_piece + kept[r] * D, [](F value) { return static_cast<S>(value); });
      });
    }
  });
  const Tensor sum = shares.sum(0).to(x.scalar_type());
  const auto part = [&](int64_t begin, int64_t size) { return sum.narrow(0, begin, size).clone(); };
  return {dx, part(0, n_v), score.additive() ? part(n_v + n_b, n_w).view({A, D}) : at::empty({0}, x.options()),
          part(n_v, b_in ? n_b : 0)};
}

// Calls run(F{}, S{}) with the accumulation and the storage type of x.
template <typename Run>
auto dispatch(const Tensor& x, const Run& run) {
  return dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    using F = decltype(zero);
    if constexpr (std::is_same_v<F, float>) {
      if (x.scalar_type() == at::kBFloat16) return run(zero, at::BFloat16{});
      if (x.scalar_type() == at::kHalf) return run(zero, at::Half{});
    }
    return run(zero, zero);
  });
}

// Rows of features must be contiguous; batch and time may have any stride.
Tensor with_contiguous_rows(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

std::tuple<Tensor, Tensor, Tensor> attention_pool_forward(const Tensor& x, const Tensor& v, const OptionalTensor& w,
                                                          const OptionalTensor& b, const OptionalTensor& lengths,
                                                          const OptionalTensor& mask, bool need_weights) {
  adapt_to_fork();
  return dispatch(x, [&](auto zero, auto stored) {
    return forward<decltype(zero), decltype(stored)>(with_contiguous_rows(x), v, w, b, contiguous(lengths),
                                                     contiguous(mask), need_weights);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_backward(
    const OptionalTensor& d_pooled, const OptionalTensor& d_weights, const Tensor& x, const Tensor& v,
    const OptionalTensor& w, const OptionalTensor& b, const OptionalTensor& lengths, const OptionalTensor& mask,
    const Tensor& pooled, const Tensor& lse) {
  adapt_to_fork();
  return dispatch(x, [&](auto zero, auto stored) {
    return backward<decltype(zero), decltype(stored)>(d_pooled, d_weights, with_contiguous_rows(x), v, w, b,
                                                      contiguous(lengths), contiguous(mask), pooled, lse);
  });
}

TORCH_LIBRARY_IMPL(rnnattn_native, CPU, m) {
  m.impl("attention_pool_forward", &attention_pool_forward);
  m.impl("attention_pool_backward", &attention_pool_backward);
}

}  // namespace
}  // namespace rnnattn
