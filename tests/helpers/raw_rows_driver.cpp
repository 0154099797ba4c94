// Encodes raw rows with the header that an export carries, for the tests: `driver PREPROCESSING ROWS` prints a line for each
// row, of the bits of dense columns, ids, lengths and the bits of weights; or `invalid`.
//
// ROWS is a JSON list of rows, whose values are [kind, content]: t text, i integer, d number, b boolean, n missing, l list.

#include "raw_rows.h"

#include <cinttypes>

static mlet::Value value_of(const mlet::detail::Json& json) {
  const char kind = json.list.at(0).text.value()[0];
  if (kind == 'n') return nullptr;
  const mlet::detail::Json& content = json.list.at(1);
  if (kind == 'l') {
    std::vector<mlet::Value> values;
    for (const auto& each : content.list) values.push_back(value_of(each));
    return mlet::Value::list(std::move(values));
  }
  if (kind == 'b') return content.flag.value();
  const std::string text = content.text.value();
  if (kind == 't') return text;
  if (kind == 'i') return std::stoll(text);
  return std::strtod(text.c_str(), nullptr);
}

static void print_bits(const std::vector<float>& values) {
  for (const float value : values) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, 4);
    std::printf(" %" PRIu32, bits);
  }
}

int main(int, char** arguments) try {
  const mlet::RawRows encoder(arguments[1]);
  std::ifstream file(arguments[2]);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  for (const auto& json : mlet::detail::JsonParser(text).parse().list) {
    mlet::Row row;
    for (const auto& [column, each] : json.object) row.emplace(column, value_of(each));
    try {
      const mlet::Request found = encoder.encode({row});
      std::printf("dense");
      print_bits(found.dense);
      std::printf(" ids");
      for (const int64_t id : found.ids) std::printf(" %" PRId64, id);
      std::printf(" lengths");
      for (const int64_t length : found.lengths) std::printf(" %" PRId64, length);
      std::printf(" weights");
      print_bits(found.weights);
      std::printf("\n");
    } catch (const std::invalid_argument&) {
      std::printf("invalid\n");
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
