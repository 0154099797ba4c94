// Answers the package's example request in C++ and compares the result with the answer in the file.
//
//   SITE=$(python -c 'import site; print(site.getsitepackages()[0])')
//   g++ -std=c++20 -O1 serve.cpp -o serve -I$SITE/torch/include -I$SITE/torch/include/torch/csrc/api/include \
//       -L$SITE/torch/lib -Wl,-rpath,$SITE/torch/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
//   ./serve . $SITE/fbgemm_gpu
//   ./serve . $SITE/fbgemm_gpu rows.tsv   # answers raw rows: tab-separated, the first line names the columns
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

#if __has_include("../preprocessing/raw_rows.h")
#include "../preprocessing/raw_rows.h"
#endif

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

// Returns the arguments of the model for a file of raw rows.
static std::vector<c10::IValue> raw_request(const std::string& preprocessing, const std::string& path) {
#if __has_include("../preprocessing/raw_rows.h")
  const auto cells = [](const std::string& line) {
    std::vector<std::string> found(1);
    for (const char c : line) {
      if (c == '\t') found.emplace_back();
      else found.back() += c;
    }
    return found;
  };
  std::ifstream file(path);
  std::string line;
  TORCH_CHECK(std::getline(file, line), path, " is empty or cannot be read");
  const auto columns = cells(line);
  std::vector<mlet::Row> rows;
  while (std::getline(file, line)) {
    const auto values = cells(line);
    TORCH_CHECK(values.size() == columns.size(), path, ": row ", rows.size(), " has ", values.size(), " cells");
    rows.emplace_back();
    for (size_t i = 0; i < columns.size(); ++i) rows.back()[columns[i]] = values[i];
  }
  const mlet::RawRows encoder(preprocessing);  // a server keeps it
  const mlet::Request found = encoder.encode(rows);
  std::vector<c10::IValue> request{
      torch::tensor(found.dense).view({found.rows, -1}), torch::tensor(found.ids),
      torch::tensor(found.lengths).view({-1, found.rows})};
  if (encoder.weighted()) request.push_back(torch::tensor(found.weights));
  return request;
#else
  TORCH_CHECK(false, "the directory ", preprocessing, " was not there when this was compiled");
#endif
}

int main(int argc, char** argv) try {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: serve PACKAGE FBGEMM_GPU [ROWS]\n");
    return 2;
  }
  const std::string package = argv[1], libraries = argv[2];
  for (const char* name : kLibraries) {
    TORCH_CHECK(dlopen((libraries + "/" + name).c_str(), RTLD_NOW | RTLD_GLOBAL), dlerror());
  }
  auto model = torch::jit::load(package + "/model.pt");

  c10::InferenceMode guard;
  if (argc == 4) {
    const auto found = model.forward(raw_request(package + "/../preprocessing", argv[3])).toTensor();
    for (int64_t row = 0; row < found.size(0); ++row) std::printf("%.9g\n", found[row].item<float>());
    return 0;
  }
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
