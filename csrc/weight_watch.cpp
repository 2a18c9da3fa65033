#include "weight_watch.h"

#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

namespace rnnattn {
namespace {

using at::Tensor;

// 64 bits of what memory holds, by the rounds of xxHash (Collet). A round is a bijection of the word and of the sum before:
// whatever is written to a single word is seen for certain.
uint64_t digest(const char* from, int64_t bytes) {
  constexpr uint64_t kFirst = 0x9E3779B185EBCA87, kSecond = 0xC2B2AE3D27D4EB4F;
  const auto round = [](uint64_t sum, uint64_t word) { return std::rotl(sum + word * kSecond, 31) * kFirst; };
  const auto word_at = [](const char* p, int64_t n) { uint64_t word = 0; std::memcpy(&word, p, n); return word; };
  uint64_t sums[4] = {1, 2, 3, 4};  // that do not wait for one another
  int64_t at = 0;
  for (; at + 32 <= bytes; at += 32)
    for (int64_t j = 0; j < 4; ++j) sums[j] = round(sums[j], word_at(from + at + 8 * j, 8));
  for (; at < bytes; at += 8) sums[0] = round(sums[0], word_at(from + at, std::min<int64_t>(8, bytes - at)));
  return round(round(round(sums[0], sums[1]), sums[2]), sums[3]);
}

// Bytes from the first element to the last.
int64_t extent(const Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * t.element_size();
}

class WeightWatch {
 public:
  WeightWatch(const std::vector<pybind11::str>& names, const std::vector<pybind11::handle>& parameters, int64_t parts) {
    TORCH_CHECK(names.size() == parameters.size() && parts > 0, "expected as many parameters as names, and at least one part");
    for (const auto& p : parameters) TORCH_CHECK(THPVariable_Check(p.ptr()), "parameters: expected tensors");
    int64_t bytes = 0;
    for (size_t n = 0; n < names.size(); ++n) {
      const Tensor& p = THPVariable_Unpack(parameters[n].ptr());
      counts_ &= !p.is_inference();
      watched_.push_back({names[n], p.const_data_ptr(), 0, p.sizes().vec(), p.strides().vec(), p.detach()});
      bytes += extent(p);
    }
    if (counts_)
      for (size_t n = 0; n < names.size(); ++n) watched_[n].version = THPVariable_Unpack(parameters[n].ptr())._version();
    cut(std::max<int64_t>(1, (bytes + parts - 1) / parts));
  }

  // Of the module's parameters by name: None, or (name, what has happened to it).
  pybind11::object check(const pybind11::dict& current) {
    const auto changed = [](const Watched& w, const char* how) { return pybind11::make_tuple(w.name, how); };
    tensors_.clear();
    for (const Watched& w : watched_) {
      PyObject* p = PyDict_GetItem(current.ptr(), w.name.ptr());
      if (!p || !THPVariable_Check(p)) return changed(w, "was replaced");
      tensors_.push_back(&THPVariable_Unpack(p));
    }
    for (size_t n = 0; n < watched_.size(); ++n)
      if (!tensors_[n]->is_cpu() || tensors_[n]->const_data_ptr() != watched_[n].address) return changed(watched_[n], "was replaced, or moved");
    for (size_t n = 0; counts_ && n < watched_.size(); ++n)
      if (tensors_[n]->is_inference() || tensors_[n]->_version() != watched_[n].version) return changed(watched_[n], "was written in place");
    const auto& part = parts_[next_];
    next_ = (next_ + 1) % parts_.size();
    for (const Piece& piece : part) {
      const Watched& w = watched_[piece.parameter];
      const Tensor& t = *tensors_[piece.parameter];
      if (t.sizes() != at::IntArrayRef(w.sizes) || t.strides() != at::IntArrayRef(w.strides)) return changed(w, "has another shape");
      if (digest(static_cast<const char*>(w.address) + piece.begin, piece.size) != piece.digest) return changed(w, "was written");
    }
    return pybind11::none();
  }

  size_t parts() const { return parts_.size(); }

 private:
  struct Watched {
    pybind11::str name;
    const void* address;
    int64_t version;
    std::vector<int64_t> sizes, strides;
    Tensor memory;  // kept, so that no other tensor can come to lie there
  };
  struct Piece {
    size_t parameter;
    int64_t begin, size;
    uint64_t digest;
  };

  // The bytes of all parameters, one behind the other, in parts of a length, in the order of the checks.
  void cut(int64_t length) {
    std::vector<std::vector<Piece>> parts(1);
    int64_t room = length;
    for (size_t n = 0; n < watched_.size(); ++n)
      for (int64_t begin = 0, size = extent(watched_[n].memory); begin < size;) {
        if (room == 0) parts.emplace_back(), room = length;
        const int64_t bytes = std::min(room, size - begin);
        parts.back().push_back({n, begin, bytes, digest(static_cast<const char*>(watched_[n].address) + begin, bytes)});
        begin += bytes, room -= bytes;
      }
    std::vector<size_t> order(parts.size());
    std::iota(order.begin(), order.end(), 0);
    const double golden = (std::sqrt(5) - 1) / 2;  // its multiples leave no large gap, wherever they stop
    const auto place = [&](size_t n) { return std::fmod(n * golden, 1); };
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return place(a) < place(b); });
    for (size_t n : order) parts_.push_back(std::move(parts[n]));
  }

  std::vector<Watched> watched_;
  std::vector<std::vector<Piece>> parts_;
  std::vector<const Tensor*> tensors_;  // of a check
  size_t next_ = 0;
  bool counts_ = true;  // whether torch counts writes
};

}  // namespace

void bind_weight_watch(pybind11::module_& m) {
  pybind11::class_<WeightWatch>(m, "WeightWatch", "Names and parameters, and into how many parts a full comparison is divided.")
      .def(pybind11::init<const std::vector<pybind11::str>&, const std::vector<pybind11::handle>&, int64_t>())
      .def_property_readonly("parts", &WeightWatch::parts)
      .def("check", &WeightWatch::check, "None, or (name, what has happened to it), of a module's parameters by name.");
}

}  // namespace rnnattn
