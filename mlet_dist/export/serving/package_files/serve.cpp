// Answers the package's example request in C++ and compares the result with the answer in the file.
//
//   SITE=$(python -c 'import site; print(site.getsitepackages()[0])')
//   g++ -std=c++20 -O1 serve.cpp -o serve -I$SITE/torch/include -I$SITE/torch/include/torch/csrc/api/include \
//       -L$SITE/torch/lib -Wl,-rpath,$SITE/torch/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
//   ./serve . $SITE/fbgemm_gpu
//
// The model calls fbgemm's operators, which its shared libraries register when they are loaded.

#include <dlfcn.h>
#include <torch/script.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

// In the order of their dependencies.
static const char* kLibraries[] = {
    "asmjit.so", "fbgemm.so", "fbgemm_gpu_config.so", "fbgemm_gpu_sparse_async_cumsum.so", "fbgemm_gpu_py.so",
    "fbgemm_gpu_tbe_common.so", "fbgemm_gpu_tbe_cache.so", "fbgemm_gpu_tbe_utils.so",
    "fbgemm_gpu_embedding_inplace_ops.so", "fbgemm_gpu_tbe_inference.so"};

// Returns the numbers of one array of the request in order, whatever its nesting. A real server uses a JSON library.
static std::vector<double> numbers(const std::string& json, const std::string& key) {
  std::vector<double> found;
  size_t at = json.find("\"" + key + "\"");
  TORCH_CHECK(at != std::string::npos, "the request has no ", key);
  at = json.find('[', at);
  int depth = 0;
  do {
    const char c = json.at(at);
    depth += c == '[' ? 1 : c == ']' ? -1 : 0;
    if (c == '-' || (c >= '0' && c <= '9')) {
      size_t length = 0;
      found.push_back(std::stod(json.substr(at, 32), &length));
      at += length;
    } else {
      ++at;
    }
  } while (depth > 0);
  return found;
}

static at::Tensor tensor(const std::string& json, const std::string& key, at::ScalarType type) {
  return torch::tensor(numbers(json, key), at::kDouble).to(type);
}

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fprintf(stderr, "usage: serve PACKAGE FBGEMM_GPU\n");
    return 2;
  }
  const std::string package = argv[1], libraries = argv[2];
  for (const char* name : kLibraries) {
    TORCH_CHECK(dlopen((libraries + "/" + name).c_str(), RTLD_NOW | RTLD_GLOBAL), dlerror());
  }
  auto model = torch::jit::load(package + "/model.pt");

  std::ifstream file(package + "/example_request.json");
  const std::string json{std::istreambuf_iterator<char>(file), {}};
  const auto expected = tensor(json, "probability", at::kFloat);
  const int64_t rows = expected.size(0);
  std::vector<c10::IValue> request{
      tensor(json, "dense", at::kFloat).view({rows, -1}),
      tensor(json, "ids", at::kLong),
      tensor(json, "lengths", at::kLong).view({-1, rows})};
  if (json.find("\"weights\"") != std::string::npos) {
    request.push_back(tensor(json, "weights", at::kFloat));
  }

  c10::InferenceMode guard;
  const auto found = model.forward(request).toTensor();
  for (int64_t row = 0; row < rows; ++row) {
    std::printf("%.9g\n", found[row].item<float>());
  }
  const float difference = (found - expected).abs().max().item<float>();
  std::fprintf(stderr, "largest difference from the example's answer: %.1e\n", difference);
  return difference <= 1e-6 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
