// The mode of a recurrent operator as a number, and the cell that it names.
#pragma once

#include "launch.h"
//
#include "cell_math.cuh"

namespace rnnattn::cuda {

// The order of rnnattn/backends/cuda.py. Not by name: torch's stable interface does not free the strings it hands over.
inline constexpr const char* kModes[] = {"LSTM", "GRU", "RNN_TANH", "RNN_RELU"};

// Calls f with a value of the cell that a mode names.
template <typename F>
void with_cell(const char* operation, int64_t mode, F f) {
  if (mode == 0) {
    f(Lstm{});
  } else if (mode == 1) {
    f(Gru{});
  } else if (mode == 2) {
    f(Rnn<false>{});
  } else {
    STD_TORCH_CHECK(mode == 3, "rnnattn ", operation,
                    ": mode: expected 0 to 3 (LSTM, GRU, RNN_TANH, RNN_RELU), got ", mode);
    f(Rnn<true>{});
  }
}

// What a cell reads or writes must be there.
inline void require(const char* operation, int64_t mode, const char* argument, bool needed, const OptionalTensor& a) {
  STD_TORCH_CHECK(!needed || a, "rnnattn ", operation, ": ", argument, ": expected a tensor for ", kModes[mode],
                  ", got None");
}

}  // namespace rnnattn::cuda
