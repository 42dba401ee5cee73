// Decode attention from C++, without Python: opens a pack, calls its decode kernel, checks the result.
//
//   c++ -O2 -std=c++17 decode.cc $(tvm-ffi-config --cxxflags --ldflags --libs) -Wl,-rpath,$(tvm-ffi-config --libdir) -o decode
//   ./decode PACK
//
// A pack is a folder: manifest.json says which library serves which spec, and a library has one function, named after
// its operator. Tensors are DLPack descriptors of memory that the caller owns; nothing is copied. This example takes a
// CPU pack with float32 queries and cache. On a GPU the same calls take device pointers, kDLCUDA, and the stream that
// TVMFFIEnvSetStream sets (CUDA's default stream otherwise).
//
// A pack is trusted code, as any library is. pagedgen.load, and `pagedgen verify`, compare files with the manifest's
// SHA-256 first; this example does not.

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

// A decode kernel of a pack: its shape, and where its library is.
struct Kernel {
  int64_t head_dim, num_q_heads, num_kv_heads, block_size;
  bool token_inner;  // K is stored [num_kv_heads, head_dim, block_size] in a block, not [block_size, ...]
  std::string library;
};

Kernel find_decode(const std::string& pack) {
  std::ifstream file(pack + "/manifest.json");
  if (!file) throw std::runtime_error(pack + " holds no manifest.json");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  for (const auto& item : json::Parse(text).cast<json::Object>()["kernels"].cast<json::Array>()) {
    const auto kernel = item.cast<json::Object>();
    const auto spec = kernel["spec"].cast<json::Object>();
    const auto word = [&spec](const char* field) { return std::string(spec[field].cast<ffi::String>()); };
    const auto number = [&spec](const char* field) { return spec[field].cast<int64_t>(); };
    if (word("op") != "decode" || word("q_dtype") != "f32" || word("kv_dtype") != "f32") continue;
    if (spec["return_lse"].cast<bool>() || spec["sinks"].cast<bool>() || spec["window"] != nullptr ||
        spec["logits_soft_cap"] != nullptr) {
      continue;
    }
    return {number("head_dim"),      number("num_q_heads"),        number("num_kv_heads"),
            number("block_size"),    word("k_inner") == "token",
            pack + "/" + std::string(kernel["library"].cast<ffi::String>())};
  }
  throw std::runtime_error(pack + " has no decode kernel of float32 without masks");
}

// Memory of the caller as a tensor; strides are in elements.
struct Tensor {
  std::vector<int64_t> shape, strides;
  DLTensor view;

  Tensor(void* data, DLDataType type, std::vector<int64_t> shape_, std::vector<int64_t> strides_ = {})
      : shape(std::move(shape_)), strides(std::move(strides_)) {
    if (strides.empty()) {
      strides.assign(shape.size(), 1);
      for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
    }
    view = {data, {kDLCPU, 0}, static_cast<int32_t>(shape.size()), type, shape.data(), strides.data(), 0};
  }
};

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: decode PACK");
  const Kernel kernel = find_decode(argv[1]);
  const int64_t dim = kernel.head_dim, q_heads = kernel.num_q_heads, kv_heads = kernel.num_kv_heads,
                size = kernel.block_size;

  // Three sequences; their blocks lie in the pool from its end backwards. The fourth row is padding.
  const std::vector<int32_t> lens = {1, static_cast<int32_t>(size) + 1, 70, 0};
  const int64_t num_seqs = lens.size(), max_blocks = (70 + size - 1) / size + 1;
  std::vector<int32_t> table(num_seqs * max_blocks, 0);
  int64_t num_blocks = 0;
  for (int32_t len : lens) num_blocks += (len + size - 1) / size;
  int32_t next = static_cast<int32_t>(num_blocks);
  for (int64_t s = 0; s < num_seqs; ++s) {
    for (int64_t b = 0; b * size < lens[s]; ++b) table[s * max_blocks + b] = --next;
  }

  std::vector<float> q(num_seqs * q_heads * dim), k(num_blocks * size * kv_heads * dim), v(k.size()), out(q.size(), -1.0f);
  uint32_t state = 1;
  const auto draw = [&state] {  // xorshift, in -1 to 1
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
  };
  for (auto* values : {&q, &k, &v}) std::generate(values->begin(), values->end(), draw);

  // Both in logical order [num_blocks, block_size, num_kv_heads, head_dim]; only the strides know how K lies.
  const std::vector<int64_t> pool = {num_blocks, size, kv_heads, dim};
  const std::vector<int64_t> by_token = {size * kv_heads * dim, kv_heads * dim, dim, 1};
  const std::vector<int64_t> k_strides =
      kernel.token_inner ? std::vector<int64_t>{size * kv_heads * dim, 1, dim * size, size} : by_token;
  const DLDataType f32 = {kDLFloat, 32, 1}, i32 = {kDLInt, 32, 1}, u8 = {kDLUInt, 8, 1};

  const ffi::Module library = ffi::Module::LoadFromFile(kernel.library);
  const ffi::Function decode = library->GetFunction("decode").value();
  std::vector<uint8_t> memory(library->GetFunction("workspace_bytes").value()(num_seqs).cast<int64_t>() + 63, 0);
  // Zeroed once, when it is made, and aligned to 64 bytes; it serves one library, one call at a time.
  uint8_t* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;

  Tensor q_t(q.data(), f32, {num_seqs, q_heads, dim}), out_t(out.data(), f32, {num_seqs, q_heads, dim});
  Tensor k_t(k.data(), f32, pool, k_strides), v_t(v.data(), f32, pool, by_token);
  Tensor table_t(table.data(), i32, {num_seqs, max_blocks});
  Tensor lens_t(const_cast<int32_t*>(lens.data()), i32, {num_seqs});
  Tensor workspace_t(aligned, u8, {static_cast<int64_t>(memory.size()) - 63});
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  const int64_t max_seq_len = max_blocks * size;  // a bound that the host knows: it picks the kernel
  const auto call = [&](int64_t bound) {
    decode(&q_t.view, &k_t.view, &v_t.view, &table_t.view, &lens_t.view, &out_t.view, /*lse=*/nullptr, scale,
           /*k_scale=*/nullptr, /*v_scale=*/nullptr, &workspace_t.view, bound, /*variant=*/-1);
  };
  call(max_seq_len);

  double worst = 0;
  for (int64_t s = 0; s < num_seqs; ++s) {
    for (int64_t h = 0; h < q_heads; ++h) {
      const int64_t head = h / (q_heads / kv_heads);
      std::vector<double> sum(dim, 0.0), score(lens[s]);
      const auto row = [&](int32_t t, const std::vector<int64_t>& strides) {
        return table[s * max_blocks + t / size] * strides[0] + t % size * strides[1] + head * strides[2];
      };
      double total = 0;
      for (int32_t t = 0; t < lens[s]; ++t) {
        for (int64_t d = 0; d < dim; ++d) score[t] += double(q[(s * q_heads + h) * dim + d]) * k[row(t, k_strides) + d * k_strides[3]];
        total += score[t] = std::exp(score[t] * scale);
        for (int64_t d = 0; d < dim; ++d) sum[d] += score[t] * v[row(t, by_token) + d];
      }
      for (int64_t d = 0; d < dim; ++d) {
        const double want = lens[s] ? sum[d] / total : -1.0;  // padding rows are left as they were
        worst = std::max(worst, std::fabs(out[(s * q_heads + h) * dim + d] - want));
      }
    }
  }
  std::printf("%s: largest error %.1e\n", kernel.library.c_str(), worst);

  try {  // Arguments are checked before anything runs, and an error names the one that is wrong.
    call(-1);
    throw std::runtime_error("a negative max_seq_len was taken");
  } catch (const ffi::Error& error) {
    std::printf("%s: %s\n", std::string(error.kind()).c_str(), std::string(error.message()).c_str());
  }
  return worst < 1e-5 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
