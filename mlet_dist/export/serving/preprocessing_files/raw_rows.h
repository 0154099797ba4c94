// Turns raw rows into the inputs of a model, in C++17 without dependencies: texts and numbers become ids and float32
// numbers, with the bits that `mlet prepare` gives the same values. raw_rows.py does the same in Python.
//
//   mlet::RawRows encoder("exports/criteo/preprocessing");
//   std::vector<mlet::Row> rows = {{{"I1", 3}, {"C1", "68fd1e64"}, {"C2", nullptr}}};
//   mlet::Request request = encoder.encode(rows);
//
// A row has a value for each of encoder.columns(): a text (UTF-8), a number, true or false, nullptr for a missing value, or
// a list of these (mlet::Value::list({...})). A row that has none for the model is a std::invalid_argument, and damaged files
// are a std::runtime_error. encode() may be called by several threads. Little-endian machines with mmap (POSIX) only.
//
// Numbers are read by strtod, so that LC_NUMERIC must be "C", as in every program that does not call setlocale.

#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mlet {

// A raw value.
struct Value {
  enum Kind { kMissing, kText, kInteger, kNumber, kBoolean, kList };
  Kind kind = kMissing;
  std::string text;
  int64_t integer = 0;  // of kBoolean, too
  double number = 0;
  std::vector<Value> elements;

  Value() = default;
  Value(std::nullptr_t) {}
  Value(const char* value) : kind(kText), text(value) {}
  Value(std::string value) : kind(kText), text(std::move(value)) {}
  Value(bool value) : kind(kBoolean), integer(value) {}
  Value(int value) : kind(kInteger), integer(value) {}
  Value(long value) : kind(kInteger), integer(value) {}
  Value(long long value) : kind(kInteger), integer(value) {}
  Value(double value) : kind(kNumber), number(value) {}
  static Value list(std::vector<Value> values) {
    Value found;
    found.kind = kList;
    found.elements = std::move(values);
    return found;
  }
};

using Row = std::unordered_map<std::string, Value>;

// The inputs of a model.
struct Request {
  int64_t rows = 0;
  std::vector<float> dense;      // (rows, dense columns)
  std::vector<int64_t> ids;      // of the first feature, row after row, then of the second, and so on
  std::vector<int64_t> lengths;  // (features, rows): the number of ids of each row
  std::vector<float> weights;    // one for each id; empty unless the model has a feature with weights
};

namespace detail {

inline bool is_digit(char c) { return c >= '0' && c <= '9'; }

inline bool is_gap(char c) { return c == '\t' || c == '\n' || c == '\f' || c == '\r' || c == ' '; }

// A JSON value. Numbers are doubles.
struct Json {
  std::optional<double> number;
  std::optional<std::string> text;
  std::optional<bool> flag;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  bool is_null() const { return !number && !text && !flag && list.empty() && object.empty(); }
  const Json& at(const std::string& key) const {
    const auto found = object.find(key);
    if (found == object.end()) throw std::runtime_error("preprocessing.json has no " + key);
    return found->second;
  }
  std::string str(const std::string& key) const { return at(key).text.value(); }
  std::string str_or_empty(const std::string& key) const { return at(key).text.value_or(""); }
  double num(const std::string& key) const { return at(key).number.value(); }
  bool yes(const std::string& key) const { return at(key).flag.value(); }
};

class JsonParser {
 public:
  explicit JsonParser(const std::string& text) : at_(text.c_str()), end_(at_ + text.size()) {}

  Json parse() {
    Json found;
    const char c = peek();
    if (c == '{') {
      ++at_;
      while (peek() != '}') {
        const std::string key = string();
        expect(':');
        found.object.emplace(key, parse());
        if (peek() == ',') ++at_;
      }
      ++at_;
    } else if (c == '[') {
      ++at_;
      while (peek() != ']') {
        found.list.push_back(parse());
        if (peek() == ',') ++at_;
      }
      ++at_;
    } else if (c == '"') {
      found.text = string();
    } else if (c == 't' || c == 'f') {
      found.flag = c == 't';
      at_ += c == 't' ? 4 : 5;
    } else if (c == 'n') {
      at_ += 4;
    } else {
      char* stop = nullptr;
      found.number = std::strtod(at_, &stop);
      if (stop == at_) fail();
      at_ = stop;
    }
    return found;
  }

 private:
  [[noreturn]] static void fail() { throw std::runtime_error("preprocessing.json is not valid JSON"); }

  char peek() {
    while (at_ < end_ && (is_gap(*at_))) ++at_;
    if (at_ >= end_) fail();
    return *at_;
  }

  void expect(char c) {
    if (peek() != c) fail();
    ++at_;
  }

  uint32_t hex() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      if (at_ >= end_ || !std::isxdigit(static_cast<unsigned char>(*at_))) fail();
      code = code * 16 + static_cast<uint32_t>(std::strtol(std::string(1, *at_).c_str(), nullptr, 16));
    }
    return code;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (at_ < end_ && *at_ != '"') {
      if (*at_ != '\\') {
        found += *at_++;
        continue;
      }
      const char c = *++at_;
      ++at_;
      if (c != 'u') {
        static const char kFrom[] = "bfnrt", kTo[] = "\b\f\n\r\t";
        const char* known = std::strchr(kFrom, c);
        found += known == nullptr ? c : kTo[known - kFrom];
        continue;
      }
      uint32_t code = hex();
      if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
        at_ += 2;
        code = 0x10000 + ((code - 0xD800) << 10) + (hex() - 0xDC00);
      }
      if (code < 0x80) {
        found += static_cast<char>(code);
      } else if (code < 0x800) {
        found += {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
      } else if (code < 0x10000) {
        found += {static_cast<char>(0xE0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 63)),
                  static_cast<char>(0x80 | (code & 63))};
      } else {
        found += {static_cast<char>(0xF0 | code >> 18), static_cast<char>(0x80 | (code >> 12 & 63)),
                  static_cast<char>(0x80 | (code >> 6 & 63)), static_cast<char>(0x80 | (code & 63))};
      }
    }
    expect('"');
    return found;
  }

  const char* at_;
  const char* end_;
};

inline uint64_t mix(uint64_t state) {
  state += 0x9E3779B97F4A7C15ull;
  state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9ull;
  state = (state ^ state >> 27) * 0x94D049BB133111EBull;
  return state ^ state >> 31;
}

// The number of bytes of the UTF-8 character at a place; 0 if there is none.
inline size_t utf8_length(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(at);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xC2 && first < 0xE0 ? 2 : first >= 0xE0 && first < 0xF0 ? 3 : first >= 0xF0 && first < 0xF5 ? 4 : 0;
  if (length == 0 || at + length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return 0;
  }
  const unsigned char second = byte(at + 1);
  const bool is_wrong = (first == 0xE0 && second < 0xA0) || (first == 0xED && second >= 0xA0) ||
                        (first == 0xF0 && second < 0x90) || (first == 0xF4 && second >= 0x90);
  return is_wrong ? 0 : length;
}

inline bool is_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const size_t length = utf8_length(text, at);
    if (length == 0) return false;
    at += length;
  }
  return true;
}

// Whether a UTF-8 character is white space in Unicode.
inline bool is_space(std::string_view c) {
  if (c.size() == 1) {
    const char byte = c[0];
    return (byte >= 9 && byte <= 13) || (byte >= 28 && byte <= 32);
  }
  if (c == "\u0085" || c == "\u00a0" || c == "\u1680" || c == "\u202f" || c == "\u205f" || c == "\u3000") return true;
  if (c.size() != 3 || c[0] != '\xe2' || c[1] != '\x80') return false;
  const unsigned char last = static_cast<unsigned char>(c[2]);
  return last <= 0x8A || last == 0xA8 || last == 0xA9;  // U+2000-200A, U+2028, U+2029
}

// Text that is UTF-8, without white space around it.
inline std::string_view trimmed(std::string_view text) {
  while (!text.empty()) {
    const size_t length = utf8_length(text, 0);
    if (length == 0 || !is_space(text.substr(0, length))) break;
    text.remove_prefix(length);
  }
  while (!text.empty()) {
    size_t start = text.size() - 1;
    while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
    if (!is_space(text.substr(start))) break;
    text = text.substr(0, start);
  }
  return text;
}

// ASCII letters in lower case, and the two other letters whose lower case is ASCII.
inline std::string lower(std::string_view text) {
  std::string found;
  for (size_t at = 0; at < text.size(); ++at) {
    if (text.compare(at, 2, "\u0130") == 0) {
      found += 'i';
      at += 1;
    } else if (text.compare(at, 3, "\u212a") == 0) {
      found += 'k';
      at += 2;
    } else {
      const char c = text[at];
      found += c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
    }
  }
  return found;
}

inline size_t skip_digits(std::string_view text, size_t at) {
  while (at < text.size() && is_digit(text[at])) ++at;
  return at;
}

inline size_t skip_sign(std::string_view text, size_t at) {
  return at < text.size() && (text[at] == '+' || text[at] == '-') ? at + 1 : at;
}

// [+-]?[0-9]+(\.0*)?
inline bool is_integer(std::string_view text) {
  const size_t start = skip_sign(text, 0);
  size_t at = skip_digits(text, start);
  if (at == start) return false;
  if (at == text.size()) return true;
  if (text[at++] != '.') return false;
  while (at < text.size() && text[at] == '0') ++at;
  return at == text.size();
}

// [+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?
inline bool is_number(std::string_view text) {
  const size_t start = skip_sign(text, 0);
  size_t at = skip_digits(text, start);
  size_t digits = at - start;
  if (at < text.size() && text[at] == '.') {
    const size_t stop = skip_digits(text, at + 1);
    digits += stop - at - 1;
    at = stop;
  }
  if (digits == 0) return false;
  if (at == text.size()) return true;
  if (text[at] != 'e' && text[at] != 'E') return false;
  const size_t first = skip_sign(text, at + 1), stop = skip_digits(text, first);
  return stop == text.size() && stop - first >= 1 && stop - first <= 3;
}

// A whole number without a plus sign, leading zeros and zeros after the point; other texts as they are.
inline std::string whole_number(std::string_view text) {
  if (!is_integer(text)) return std::string(text);
  const size_t start = skip_sign(text, 0);
  std::string_view digits = text.substr(start, skip_digits(text, start) - start);
  while (digits.size() > 1 && digits[0] == '0') digits.remove_prefix(1);
  return (text[0] == '-' && digits != "0" ? "-" : "") + std::string(digits);
}

// The shortest text that reads as the same number, as Python writes it.
inline std::string shortest(double value) {
  if (!std::isfinite(value)) return std::isnan(value) ? "nan" : value < 0 ? "-inf" : "inf";
  char buffer[32];
  for (int precision = 0; precision < 17; ++precision) {
    std::snprintf(buffer, sizeof buffer, "%.*e", precision, value);
    if (std::strtod(buffer, nullptr) == value) break;
  }
  std::string text(buffer);
  const size_t e = text.find('e');
  const int exponent = std::atoi(text.c_str() + e + 1);
  const bool negative = text[0] == '-';
  std::string digits;
  for (size_t i = negative; i < e; ++i) {
    if (is_digit(text[i])) digits += text[i];
  }
  const int count = static_cast<int>(digits.size());
  std::string found;
  if (exponent < -4 || exponent >= 16) {
    found = digits.substr(0, 1) + (count > 1 ? "." + digits.substr(1) : "");
    std::snprintf(buffer, sizeof buffer, "e%c%02d", exponent < 0 ? '-' : '+', std::abs(exponent));
    found += buffer;
  } else if (exponent < 0) {
    found = "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  } else if (count <= exponent + 1) {
    found = digits + std::string(static_cast<size_t>(exponent + 1 - count), '0') + ".0";
  } else {
    found = digits.substr(0, static_cast<size_t>(exponent) + 1) + "." + digits.substr(static_cast<size_t>(exponent) + 1);
  }
  return (negative ? "-" : "") + found;
}

constexpr double kFloat32Max = 3.4028234663852886e38;
constexpr double kExact = 9007199254740992.0;  // up to here, a double holds every whole number

// log(1 + max(number, 0)), rounded to the nearest float32 number. The last bits of a double depend on the machine.
inline float log1p_float32(double number) {
  number = number > 0 ? number : 0.0;
  const double found = std::log1p(number), error = 0x1p-50;
  const float low = static_cast<float>(found * (1 - error)), high = static_cast<float>(found * (1 + error));
  if (low == high) return low;
  const long double exact = std::log1p(static_cast<long double>(number));
  return exact < (static_cast<long double>(low) + static_cast<long double>(high)) / 2 ? low : high;
}

inline std::string shown(const Value& value) {
  switch (value.kind) {
    case Value::kMissing: return "missing";
    case Value::kText: return "'" + value.text.substr(0, 60) + "'";
    case Value::kInteger: return std::to_string(value.integer);
    case Value::kNumber: return shortest(value.number);
    case Value::kBoolean: return value.integer ? "true" : "false";
    default: return "a list of " + std::to_string(value.elements.size()) + " elements";
  }
}

// The spellings of missing values of a column.
struct Missing {
  std::vector<std::string> texts;
  std::vector<double> numbers;
  bool ignore_case = false;

  Missing() = default;
  Missing(const Json& rules, const char* key) {
    for (const Json& each : rules.at(key).list) texts.push_back(each.text.value());
  }
  bool has(const std::string& text) const { return std::find(texts.begin(), texts.end(), text) != texts.end(); }
};

struct Number {
  std::optional<double> value;
  bool is_missing = false;
};

inline Number number_of(const Value& value, const Missing& missing, bool integer) {
  double found = 0;
  switch (value.kind) {
    case Value::kMissing: return {std::nullopt, true};
    case Value::kList: return {};
    case Value::kText: {
      if (!is_utf8(value.text)) return {};
      const std::string text(trimmed(value.text));
      if (text.empty() || skip_digits(text, 0) != text.size()) {
        if (missing.has(missing.ignore_case ? lower(text) : text)) return {std::nullopt, true};
        if (!(integer ? is_integer(text) : is_number(text))) return {};
      }
      found = std::strtod(text.c_str(), nullptr);
      break;
    }
    case Value::kNumber:
      if (std::isnan(value.number)) return {std::nullopt, true};
      found = value.number;
      break;
    default: found = static_cast<double>(value.integer);
  }
  if (std::find(missing.numbers.begin(), missing.numbers.end(), found) != missing.numbers.end()) return {std::nullopt, true};
  if (integer && std::isfinite(found) && found != std::trunc(found)) return {};
  return {found, false};
}

enum class Cast { kNone, kText, kInteger };

struct Text {
  std::string value;
  bool is_missing = false;
  bool is_valid = true;
};

inline Text text_of(const Value& value, Cast cast, const Missing& missing) {
  const Text invalid{"", false, false}, absent{"", true, true};
  std::string text;
  switch (value.kind) {
    case Value::kMissing: return absent;
    case Value::kList: return invalid;
    case Value::kText:
      if (!is_utf8(value.text)) return invalid;
      text = cast == Cast::kInteger ? std::string(trimmed(value.text)) : value.text;
      break;
    case Value::kBoolean: text = value.integer ? "true" : "false"; break;
    case Value::kInteger: text = std::to_string(value.integer); break;
    case Value::kNumber:
      if (std::isnan(value.number)) return absent;
      if (cast == Cast::kText) {
        text = shortest(value.number);
      } else if (value.number == std::trunc(value.number) && std::abs(value.number) <= kExact) {
        text = std::to_string(static_cast<int64_t>(value.number));
      } else {
        return invalid;
      }
  }
  const std::string compared =
      missing.ignore_case ? lower(text) : cast == Cast::kInteger ? whole_number(text) : text;
  if (missing.has(compared)) return absent;
  if (cast == Cast::kInteger && value.kind == Value::kText) {
    if (!is_integer(text)) return invalid;
    text = whole_number(text);
  }
  return {text, false, true};
}

// '[^']*'([ \t\n\f\r]+'[^']*')+ or, without quotes, the same of [0-9.eE+-]+
inline bool lacks_commas(std::string_view text, bool quoted) {
  size_t at = 0, elements = 0;
  while (true) {
    const size_t start = at;
    if (quoted) {
      if (at >= text.size() || text[at] != '\'') return false;
      at = text.find('\'', at + 1);
      if (at == std::string_view::npos) return false;
      ++at;
    } else {
      while (at < text.size() && (is_digit(text[at]) || std::strchr(".eE+-", text[at]) != nullptr) && text[at] != '\0') ++at;
      if (at == start) return false;
    }
    ++elements;
    if (at == text.size()) return elements > 1;
    const size_t gap = at;
    while (at < text.size() && is_gap(text[at])) ++at;
    if (at == gap) return false;
  }
}

// The text with `replacement` for each `found` and the gaps around it; for each gap if `found` is empty.
inline std::string with_replaced(std::string_view text, std::string_view found, std::string_view replacement) {
  std::string result;
  size_t kept = 0;  // bytes of the result that no gap can take away
  for (size_t at = 0; at < text.size();) {
    const bool matches = found.empty() ? is_gap(text[at]) : text.compare(at, found.size(), found) == 0;
    if (!matches) {
      result += text[at++];
      continue;
    }
    while (result.size() > kept && is_gap(result.back())) result.pop_back();
    result += replacement;
    kept = result.size();
    at += found.size();
    while (at < text.size() && is_gap(text[at])) ++at;
  }
  return result;
}

inline bool is_quote(char c) { return c == '\'' || c == '"'; }

// The elements of a text that is a list; none if it is not.
inline std::optional<std::vector<Value>> split(
    const std::string& whole, const std::optional<std::string>& separator, const std::string& in_brackets) {
  if (!is_utf8(whole)) return std::nullopt;
  const std::string between = separator.value_or(",");
  const std::string_view outer = trimmed(whole);
  const bool bracketed = outer.size() >= 2 && outer.front() == '[' && outer.back() == ']' &&
                         outer.substr(1, outer.size() - 2).find_first_of("[]") == std::string_view::npos;
  std::string text = whole;
  if (bracketed) {
    text = trimmed(outer.substr(1, outer.size() - 2));
    if (!separator && lacks_commas(text, false)) {
      text = with_replaced(text, "", ",");
    } else if (!separator && lacks_commas(text, true)) {
      std::string commas;  // between quotes alone
      bool inside = false;
      for (const char c : text) {
        inside ^= c == '\'';
        if (inside || !is_gap(c)) commas += c;
        else if (commas.back() != ',') commas += ',';
      }
      text = commas;
    }
    text = with_replaced(text, in_brackets, between);
  } else if (!separator && !text.empty()) {
    return std::nullopt;
  }
  std::vector<Value> elements;
  for (size_t at = 0; !text.empty() && at != std::string::npos;) {
    const size_t stop = text.find(between, at);
    std::string piece(trimmed(std::string_view(text).substr(at, stop == std::string::npos ? stop : stop - at)));
    at = stop == std::string::npos ? stop : stop + between.size();
    if (bracketed && !piece.empty()) {
      const bool starts = is_quote(piece.front()), ends = is_quote(piece.back());
      size_t last = piece.size() - 1;
      while (last > 0 && (static_cast<unsigned char>(piece[last]) & 0xC0) == 0x80) --last;
      const size_t first = utf8_length(piece, 0);
      const auto one_line = [&](size_t from, size_t to) {
        return from > to || piece.substr(from, to - from).find('\n') == std::string::npos;
      };
      const bool alone = piece.size() == 1 && starts;
      const bool half = alone || (starts && !ends && one_line(1, last)) || (!starts && ends && one_line(first, piece.size() - 1));
      if (half) return std::nullopt;  // a quoted text that contains the separator
      if (starts && piece.front() == piece.back() && one_line(1, piece.size() - 1)) {
        piece = piece.substr(1, piece.size() - 2);
      } else if (piece == "None" || piece == "null" || piece == "nan" || piece == "NaN" || piece == "<NA>" || piece == "NaT") {
        piece.clear();
      }
    }
    elements.emplace_back(std::move(piece));
  }
  return elements;
}

// The ids of a table: those of its vocabulary, which is mapped into memory, or hashes.
class Table {
 public:
  Table(const std::string& directory, const Json& rules)
      : salt_(std::strtoull(rules.str("salt").c_str(), nullptr, 16)),
        num_embeddings_(static_cast<uint64_t>(rules.num("num_embeddings"))) {
    if (rules.at("vocabulary").is_null()) return;
    const std::string path = directory + "/" + rules.str("vocabulary");
    const int file = ::open(path.c_str(), O_RDONLY);
    struct stat about;
    if (file < 0 || ::fstat(file, &about) != 0) throw std::runtime_error(path + ": cannot be read");
    const size_t size = static_cast<size_t>(about.st_size);
    void* mapped = size < kHeader ? MAP_FAILED : ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
    ::close(file);
    if (mapped == MAP_FAILED) throw std::runtime_error(path + ": cannot be mapped into memory");
    content_ = std::shared_ptr<const char>(static_cast<const char*>(mapped), [size](const char* start) {
      ::munmap(const_cast<char*>(start), size);
    });
    uint64_t text_bytes = 0;
    std::memcpy(&count_, mapped_at(8), 8);
    std::memcpy(&text_bytes, mapped_at(16), 8);
    if (std::memcmp(mapped, "MLETVOC1", 8) != 0 || count_ + 1 != num_embeddings_ ||
        size != kHeader + 20 * count_ + 8 + text_bytes) {
      throw std::runtime_error(path + ": is damaged, or the vocabulary of another table");
    }
  }

  int64_t id_of(std::string_view text) const {
    uint64_t state = salt_ + text.size();
    for (size_t at = 0; at < text.size(); at += 8) {
      uint64_t word = 0;
      std::memcpy(&word, text.data() + at, std::min<size_t>(8, text.size() - at));
      state = mix(state ^ word);
    }
    const uint64_t hash = mix(state);
    if (content_ == nullptr) return static_cast<int64_t>(hash % num_embeddings_);
    const auto* hashes = reinterpret_cast<const uint64_t*>(mapped_at(kHeader));
    const auto* offsets = hashes + count_;
    const auto* ids = reinterpret_cast<const uint32_t*>(offsets + count_ + 1);
    const char* texts = reinterpret_cast<const char*>(ids + count_);
    for (const auto* place = std::lower_bound(hashes, hashes + count_, hash); place != hashes + count_ && *place == hash; ++place) {
      const uint32_t id = ids[place - hashes];  // values may share a hash
      if (text == std::string_view(texts + offsets[id - 1], offsets[id] - offsets[id - 1])) return id;
    }
    return 0;
  }

 private:
  static constexpr size_t kHeader = 24;
  const char* mapped_at(size_t place) const { return content_.get() + place; }

  uint64_t salt_, num_embeddings_, count_ = 0;
  std::shared_ptr<const char> content_;
};

struct Dense {
  std::string column, transform;
  bool integer = false, refuses = false;
  double stand_in = 0, mean = 0, deviation = 1;
  Missing missing;
};

struct Sparse {
  std::string column, table, weights, weight_separator, in_brackets;
  Cast cast = Cast::kNone;
  bool multi_valued = false, keeps_last = false;
  std::optional<std::string> separator;
  std::optional<size_t> max_len;
  Missing missing;
};

}  // namespace detail

// The preprocessing of a model.
class RawRows {
 public:
  // The directory has preprocessing.json and the files that it names.
  explicit RawRows(const std::string& directory) {
    std::ifstream file(directory + "/preprocessing.json", std::ios::binary);
    if (!file) throw std::runtime_error(directory + "/preprocessing.json: cannot be read");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const detail::Json rules = detail::JsonParser(text).parse();
    if (rules.num("format_version") != 1) throw std::runtime_error(directory + ": has another format_version than 1");
    for (const auto& each : rules.at("columns").list) columns_.push_back(each.text.value());
    weight_missing_ = detail::Missing(rules, "missing_weights");
    weight_missing_.ignore_case = true;
    for (const auto& each : rules.at("dense").list) dense_.push_back(dense_of(each));
    for (const auto& each : rules.at("sparse").list) sparse_.push_back(sparse_of(each));
    for (const auto& [name, each] : rules.at("tables").object) tables_.emplace(name, detail::Table(directory, each));
  }

  const std::vector<std::string>& columns() const { return columns_; }
  size_t dense_columns() const { return dense_.size(); }
  size_t features() const { return sparse_.size(); }
  bool weighted() const {  // whether a feature has weights
    return std::any_of(sparse_.begin(), sparse_.end(), [](const detail::Sparse& each) {
      return !each.weights.empty() || !each.weight_separator.empty();
    });
  }

  Request encode(const std::vector<Row>& rows) const {
    for (size_t row = 0; row < rows.size(); ++row) {
      for (const std::string& column : columns_) {
        if (rows[row].count(column) == 0) {
          throw std::invalid_argument("row " + std::to_string(row) + " lacks the column '" + column + "'; a missing value is nullptr");
        }
      }
    }
    Request found;
    found.rows = static_cast<int64_t>(rows.size());
    for (size_t row = 0; row < rows.size(); ++row) {
      for (const auto& rules : dense_) found.dense.push_back(dense_value(rows[row].at(rules.column), rules, row));
    }
    for (const auto& rules : sparse_) {
      const detail::Table& table = tables_.at(rules.table);
      for (size_t row = 0; row < rows.size(); ++row) {
        const auto [texts, weights] = values(rows[row], rules, row);
        for (const std::string& text : texts) found.ids.push_back(table.id_of(text));
        found.lengths.push_back(static_cast<int64_t>(texts.size()));
        for (size_t i = 0; weighted() && i < texts.size(); ++i) found.weights.push_back(weights.empty() ? 1.0f : weights[i]);
      }
    }
    return found;
  }

 private:
  using Json = detail::Json;

  [[noreturn]] static void invalid(size_t row, const std::string& column, const Value& value, const std::string& expected) {
    throw std::invalid_argument(
        "row " + std::to_string(row) + ": column '" + column + "' is " + detail::shown(value) + " instead of " + expected);
  }

  static detail::Dense dense_of(const Json& rules) {
    detail::Dense found;
    found.column = rules.str("column");
    found.transform = rules.str("transform");
    found.integer = rules.yes("integer");
    found.missing = detail::Missing(rules, "missing_texts");
    found.missing.ignore_case = rules.yes("ignore_case");
    for (const auto& each : rules.at("missing_numbers").list) found.missing.numbers.push_back(each.number.value());
    found.mean = rules.at("mean").number.value_or(0);
    found.deviation = rules.at("deviation").number.value_or(1);
    const Json& missing = rules.at("missing");
    found.refuses = missing.text == "refuse";
    found.stand_in = missing.text == "mean" ? found.mean : missing.number.value_or(0);
    return found;
  }

  static detail::Sparse sparse_of(const Json& rules) {
    detail::Sparse found;
    found.column = rules.str("column");
    found.table = rules.str("table");
    const std::string cast = rules.str_or_empty("cast");
    found.cast = cast == "integer" ? detail::Cast::kInteger : cast == "text" ? detail::Cast::kText : detail::Cast::kNone;
    found.missing = detail::Missing(rules, "missing_texts");
    found.missing.ignore_case = rules.yes("ignore_case");
    found.multi_valued = rules.yes("multi_valued");
    found.separator = rules.at("separator").text;
    found.in_brackets = rules.str("separator_in_brackets");
    found.weights = rules.str_or_empty("weights");
    found.weight_separator = rules.str_or_empty("weight_separator");
    found.keeps_last = rules.str("keep") == "last";
    if (rules.at("max_len").number) found.max_len = static_cast<size_t>(*rules.at("max_len").number);
    return found;
  }

  static float dense_value(const Value& value, const detail::Dense& rules, size_t row) {
    const detail::Number found = detail::number_of(value, rules.missing, rules.integer);
    double number = found.value.value_or(NAN);
    if (!found.value && !found.is_missing && value.kind == Value::kText && detail::is_utf8(value.text)) {
      const std::string text = detail::lower(detail::trimmed(value.text));
      number = text == "false" ? 0.0 : text == "true" ? 1.0 : NAN;
    }
    if (found.is_missing) {
      if (rules.refuses) invalid(row, rules.column, value, "a number");
      number = rules.stand_in;
    } else if (!(std::abs(number) <= detail::kFloat32Max)) {
      invalid(row, rules.column, value, rules.integer ? "an integer" : "a float32 number");
    }
    if (rules.transform == "log1p") return detail::log1p_float32(number);
    if (rules.transform == "standardise") {
      number = (number - rules.mean) / rules.deviation;
      if (!(std::abs(number) <= detail::kFloat32Max)) {
        invalid(row, rules.column, value, "a number fewer deviations from the mean");
      }
    }
    return static_cast<float>(number);
  }

  static float weight(const detail::Number& found, size_t row, const std::string& column, const Value& value) {
    if (!found.value || !(std::abs(*found.value) <= detail::kFloat32Max)) {
      invalid(row, column, value, "a list with float32 weights");
    }
    return static_cast<float>(*found.value);
  }

  static std::optional<std::vector<Value>> elements_of(const Value& value, const detail::Sparse& rules) {
    switch (value.kind) {
      case Value::kMissing: return std::vector<Value>{};
      case Value::kText: return detail::split(value.text, rules.separator, rules.in_brackets);
      case Value::kList: return value.elements;
      case Value::kBoolean: return std::nullopt;
      default:
        if (!rules.separator) return std::nullopt;
        return std::vector<Value>{value};
    }
  }

  // The texts of a row that have ids, and their weights, if the feature has any.
  std::pair<std::vector<std::string>, std::vector<float>> values(const Row& row, const detail::Sparse& rules, size_t number) const {
    const Value& value = row.at(rules.column);
    if (!rules.multi_valued) {
      const detail::Text text = detail::text_of(value, rules.cast, rules.missing);
      if (!text.is_valid) invalid(number, rules.column, value, "a text or a whole number");
      return {{text.value}, {}};
    }
    auto elements = elements_of(value, rules);
    if (!elements) invalid(number, rules.column, value, "a list");
    std::vector<Value> pair_weights;
    if (!rules.weight_separator.empty()) {
      detail::Missing nothing;
      nothing.texts = {""};
      for (Value& each : *elements) {
        const std::string text = detail::text_of(each, detail::Cast::kText, nothing).value;
        const size_t place = text.rfind(rules.weight_separator);
        if (place == std::string::npos && !text.empty()) {
          invalid(number, rules.column, value, "pairs such as a" + rules.weight_separator + "0.5");
        }
        each = text.empty() ? Value("") : Value(std::string(detail::trimmed(std::string_view(text).substr(0, place))));
        pair_weights.push_back(text.empty() ? Value("") : Value(text.substr(place + rules.weight_separator.size())));
      }
    }
    std::vector<detail::Text> found;
    std::vector<size_t> present;
    for (const Value& each : *elements) {
      found.push_back(detail::text_of(each, rules.cast, rules.missing));
      if (!found.back().is_valid) invalid(number, rules.column, value, "a list of texts or whole numbers");
      if (!found.back().is_missing) present.push_back(found.size() - 1);
    }
    size_t first = 0, last = present.size();
    if (rules.max_len && last > *rules.max_len) {
      (rules.keeps_last ? first : last) = rules.keeps_last ? last - *rules.max_len : *rules.max_len;
    }
    std::vector<float> by_place;
    if (!rules.weights.empty()) by_place = weights_of(row.at(rules.weights), elements->size(), present, rules, number);
    std::vector<std::string> texts;
    std::vector<float> weights;
    for (size_t i = first; i < last; ++i) {
      texts.push_back(found[present[i]].value);
      if (!pair_weights.empty()) {
        const auto parsed = detail::number_of(pair_weights[present[i]], weight_missing_, false);
        weights.push_back(weight(parsed, number, rules.column, value));
      } else if (!by_place.empty()) {
        weights.push_back(by_place[i]);
      }
    }
    return {texts, weights};
  }

  // The weight of each present value, from a column of their own.
  std::vector<float> weights_of(
      const Value& value, size_t length, const std::vector<size_t>& present, const detail::Sparse& rules, size_t row) const {
    const auto elements = elements_of(value, rules);
    if (!elements) invalid(row, rules.weights, value, "a list of numbers");
    std::vector<detail::Number> numbers, given;
    for (const Value& each : *elements) {
      numbers.push_back(detail::number_of(each, weight_missing_, false));
      if (!numbers.back().is_missing) given.push_back(numbers.back());
    }
    if (numbers.size() == length) {  // a weight belongs to the value at its place
      given.clear();
      for (const size_t place : present) given.push_back(numbers[place]);
    } else if (given.size() != present.size()) {
      invalid(row, rules.weights, value, std::to_string(present.size()) + " weights");
    }
    std::vector<float> found;
    for (const auto& each : given) found.push_back(weight(each, row, rules.weights, value));
    return found;
  }

  std::vector<std::string> columns_;
  std::vector<detail::Dense> dense_;
  std::vector<detail::Sparse> sparse_;
  std::map<std::string, detail::Table> tables_;
  detail::Missing weight_missing_;
};

}  // namespace mlet
