// A GPU that is not there: a kernel runs from its PTX, on the memory of this process, and every access is checked.
//
// Threads of a warp that part go on lowest instruction first, and wait for each other where an instruction names them;
// the warps of a block run one after the other from barrier to barrier, the blocks of a cluster from one of its
// barriers to the next, the clusters of a grid one after the other. float and double add, multiply, divide, square root
// and fused multiply-add round as PTX says. The .approx functions are rounded correctly here; on a GPU they err by a
// unit or two of the last place. An instruction, or a form of one, that is not written here throws when the kernel is
// parsed.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/python/function.h"

namespace {

using std::string;
using std::vector;

// ---------------------------------------------------------------- numbers

using Bits = uint64_t;  // of a register: those of its value, and zeros above

template <class T>
T as(Bits bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
Bits bits_of(T value) {
  Bits bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
Bits low(Bits bits, int bytes) { return bytes == 8 ? bits : bits & ((Bits(1) << 8 * bytes) - 1); }

double from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  double number = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : std::ldexp(exponent ? 1024 + fraction : fraction, std::max(exponent, 1) - 25);
  return half >> 15 ? -number : number;
}
uint16_t to_half(double number) {  // to nearest even
  if (std::isnan(number)) return 0x7fff;
  const int sign = std::signbit(number) << 15;
  if (std::fabs(number) >= 65520) return uint16_t(sign | 0x7c00);
  const int exponent = std::max(std::ilogb(number), -14);
  return uint16_t(sign | (((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(std::fabs(number), 10 - exponent)))));
}
uint16_t to_bfloat(double number) {
  const float narrow = float(number);
  if (std::isnan(narrow)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(narrow);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Type {
  enum Kind { pred, bits, sign, f16, bf16, f32, f64 } kind;
  int bytes;
  bool floating() const { return kind >= f16; }
  __int128 whole(Bits of) const {
    of = low(of, bytes);
    return kind == sign ? __int128(int64_t(of << (64 - 8 * bytes)) >> (64 - 8 * bytes)) : __int128(of);
  }
  double number(Bits of) const {
    if (kind == f32) return as<float>(of);
    if (kind == f64) return as<double>(of);
    return kind == f16 ? from_half(uint16_t(of)) : std::bit_cast<float>(uint32_t(of) << 16);
  }
  Bits narrow(double number) const {
    if (kind == f32) return bits_of(float(number));
    if (kind == f64) return bits_of(number);
    return kind == f16 ? to_half(number) : to_bfloat(number);
  }
};

// ---------------------------------------------------------------- code

using Lanes = uint32_t;  // of a warp, a bit each
constexpr int kWarp = 32;
using Register = std::array<Bits, kWarp>;
using Function = std::function<Bits(const Bits* operands)>;

struct Instruction {
  enum { compute, unpack, load, store, nothing, branch, leave, barrier, converge, shuffle, vote } kind = compute;
  string text, where;
  int guard = -1;
  bool unless = false;
  vector<int> to, from;  // registers; from of load and store: the address, and what is stored
  Function function;
  int bytes = 0;        // of each number moved
  int64_t offset = 0;   // of the address
  bool shared = false;  // the address is one of shared memory, not a generic one
  bool constant = false;
  bool sign = false;  // what is loaded is extended by its sign
  string mode;
  int target = 0;
};

struct Kernel;

struct Unknown {};  // an instruction, or a form of one, that is not written here
[[noreturn]] void unknown() { throw Unknown(); }
[[noreturn]] void refuse(const string& what) { throw std::invalid_argument("the emulator does not have " + what); }

constexpr Bits kSharedWindow =
    Bits(1) << 60;                          // where generic addresses of shared memory begin; nothing else lies there
constexpr unsigned kMostShared = 99 << 10;  // what every device of compute capability 8.0 and up gives a block
constexpr int kMostSharedOfClusters = 227 << 10;  // compute capability 9.0
constexpr int kSharedBase = 1024;                 // the system has the first of it
const char* const kSpecial[] = {"%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y", "%laneid"};

// One instruction's name in parts, "ld.global.nc.v4.u32", each of which somebody has to take.
struct Parts {
  vector<string> left;
  string name;
  explicit Parts(const string& op) {
    for (size_t at = 0; at <= op.size();) {
      const size_t end = std::min(op.find('.', at), op.size());
      left.push_back(op.substr(at, end - at));
      at = end + 1;
    }
    name = left.front();
    left.erase(left.begin());
  }
  bool take(const string& part) {
    const auto at = std::find(left.begin(), left.end(), part);
    if (at == left.end()) return false;
    left.erase(at);
    return true;
  }
  string one_of(std::initializer_list<const char*> parts) {
    for (const char* part : parts)
      if (take(part)) return part;
    return "";
  }
  std::optional<Type> type() {  // the last one, if it is one
    static const std::map<string, Type> types = {
        {"pred", {Type::pred, 1}}, {"b8", {Type::bits, 1}},  {"u8", {Type::bits, 1}},  {"s8", {Type::sign, 1}},
        {"b16", {Type::bits, 2}},  {"u16", {Type::bits, 2}}, {"s16", {Type::sign, 2}}, {"f16", {Type::f16, 2}},
        {"bf16", {Type::bf16, 2}}, {"b32", {Type::bits, 4}}, {"u32", {Type::bits, 4}}, {"s32", {Type::sign, 4}},
        {"f32", {Type::f32, 4}},   {"b64", {Type::bits, 8}}, {"u64", {Type::bits, 8}}, {"s64", {Type::sign, 8}},
        {"f64", {Type::f64, 8}}};
    const auto found = left.empty() ? types.end() : types.find(left.back());
    if (found == types.end()) return {};
    left.pop_back();
    return found->second;
  }
};

// f, for numbers of a type, as a function of registers' bits.
template <class T, class F>
Function on(F f) {
  return [f](const Bits* a) {
    if constexpr (std::is_invocable_v<F, T, T, T>)
      return bits_of(f(as<T>(a[0]), as<T>(a[1]), as<T>(a[2])));
    else if constexpr (std::is_invocable_v<F, T, T>)
      return bits_of(f(as<T>(a[0]), as<T>(a[1])));
    else
      return bits_of(f(as<T>(a[0])));
  };
}
template <class F>
Function on_floats(const Type& t, F f) {
  if (t.kind == Type::f32) return on<float>(f);
  if (t.kind == Type::f64) return on<double>(f);
  unknown();
}
// f(__int128, ...) of whole numbers of type t, cut off to `bytes`.
template <class F>
Function on_whole(const Type& t, int bytes, F f) {
  return [t, bytes, f](const Bits* a) {
    if constexpr (std::is_invocable_v<F, __int128, __int128, __int128>)
      return low(Bits(f(t.whole(a[0]), t.whole(a[1]), __int128(a[2]))), bytes);
    else if constexpr (std::is_invocable_v<F, __int128, __int128>)
      return low(Bits(f(t.whole(a[0]), t.whole(a[1]))), bytes);
    else
      return low(Bits(f(t.whole(a[0]))), bytes);
  };
}
template <class F>
Function on_numbers(const Type& t, F f) {
  return t.floating() ? on_floats(t, f) : on_whole(t, t.bytes, f);
}

float flushed(float x, bool ftz) { return ftz && std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

template <class F>
Function approximate(const Type& t, bool ftz, F f) {
  if (t.kind != Type::f32) unknown();
  return on<float>([f, ftz](float x) { return flushed(float(f(double(flushed(x, ftz)))), ftz); });
}

Function comparison(Parts& parts, const Type& t) {
  constexpr int less = 1, equal = 2, greater = 4, unordered = 8;
  static const std::map<string, int> accepted = {{"lt", less},
                                                 {"le", less | equal},
                                                 {"lo", less},
                                                 {"ls", less | equal},
                                                 {"eq", equal},
                                                 {"gt", greater},
                                                 {"ge", greater | equal},
                                                 {"hi", greater},
                                                 {"hs", greater | equal},
                                                 {"ne", less | greater},
                                                 {"num", less | equal | greater}};
  string how = parts.left.empty() ? "" : parts.left.front();
  if (!parts.take(how)) unknown();
  int accepts = how == "nan" ? unordered : 0;
  if (how.size() == 3 && how[2] == 'u') accepts = unordered, how.pop_back();  // ltu, leu, ...
  if (const auto found = accepted.find(how); found != accepted.end()) accepts |= found->second;
  if (!accepts || (accepts == unordered && how != "nan")) unknown();
  const string with = parts.one_of({"and", "or", "xor"});
  const auto compare = [accepts](auto a, auto b) {
    return (accepts & (a < b ? less : a == b ? equal : a > b ? greater : unordered)) != 0;
  };
  return [=](const Bits* a) -> Bits {
    const bool found = t.floating() ? compare(t.number(a[0]), t.number(a[1])) : compare(t.whole(a[0]), t.whole(a[1]));
    return with.empty() ? found : with == "and" ? found & a[2] : with == "or" ? found | a[2] : found ^ a[2];
  };
}

Function conversion(Parts& parts, const Type& of) {
  if (const string both = parts.one_of({"bf16x2", "f16x2"}); !both.empty()) {
    if (of.kind != Type::f32 || !parts.take("rn")) unknown();
    const Type half{both == "f16x2" ? Type::f16 : Type::bf16, 2};
    return [half](const Bits* a) { return half.narrow(as<float>(a[0])) << 16 | half.narrow(as<float>(a[1])); };
  }
  const auto found = parts.type();
  if (!found) unknown();
  const Type to = *found;
  const bool rounds = parts.take("rn");
  if (of.floating() && (!to.floating() || (to.bytes < of.bytes && !rounds))) unknown();
  if (of.floating()) return [=](const Bits* a) { return to.narrow(of.number(a[0])); };
  if (to.floating())
    return [=](const Bits* a) {
      return to.kind == Type::f32 ? bits_of(float(of.whole(a[0]))) : to.narrow(double(of.whole(a[0])));
    };
  return [=](const Bits* a) { return low(Bits(of.whole(a[0])), to.bytes); };
}

Function function_of(Parts& parts) {
  const string& op = parts.name;
  const auto typed = parts.type();
  if (!typed) unknown();
  const Type t = *typed;
  const int size = 8 * t.bytes;
  const auto exact = [&] { t.floating() && parts.take("rn"); };
  if (op == "mov" || op == "not")
    return [t, invert = op == "not"](const Bits* a) {
      return t.kind == Type::pred ? a[0] ^ Bits(invert) : low(invert ? ~a[0] : a[0], t.bytes);
    };
  if (op == "and") return [](const Bits* a) { return a[0] & a[1]; };
  if (op == "or") return [](const Bits* a) { return a[0] | a[1]; };
  if (op == "xor") return [](const Bits* a) { return a[0] ^ a[1]; };
  if (op == "selp") return [](const Bits* a) { return a[2] ? a[0] : a[1]; };
  if (op == "setp") return comparison(parts, t);
  if (op == "cvt") return conversion(parts, t);
  if (op == "cvta") {  // generic addresses of global memory are what they are
    const bool to = parts.take("to"), shared = parts.take("shared");
    if (!shared && !parts.take("global")) unknown();
    return [by = shared ? (to ? -kSharedWindow : kSharedWindow) : 0](const Bits* a) { return a[0] + by; };
  }
  if (op == "add" && parts.take("rm")) {
    if (t.kind != Type::f32) unknown();
    return on<float>([](float a, float b) {
      const double sum = double(a) + b, of_b = sum - a, lost = (a - (sum - of_b)) + (b - of_b);
      const float nearest = float(sum);
      return nearest > sum || (nearest == sum && lost < 0) ? std::nextafter(nearest, -INFINITY) : nearest;
    });
  }
  if (op == "add") return exact(), on_numbers(t, [](auto a, auto b) { return a + b; });
  if (op == "sub") return exact(), on_numbers(t, [](auto a, auto b) { return a - b; });
  if (op == "neg") return on_numbers(t, [](auto a) { return -a; });
  if (op == "abs") return on_numbers(t, [](auto a) { return a < 0 ? -a : a == 0 ? a * a : a; });
  if (op == "min" || op == "max") {
    if (t.floating())
      return on_floats(t, [least = op == "min"](auto a, auto b) {
        if (a == b) return std::signbit(a) == least ? a : b;  // -0 is less than 0
        return least ? std::fmin(a, b) : std::fmax(a, b);
      });
    return on_whole(t, t.bytes, [least = op == "min"](auto a, auto b) { return (a < b) == least ? a : b; });
  }
  if ((op == "mul" || op == "mad") && !t.floating()) {
    const string half = parts.one_of({"lo", "hi", "wide"});
    if (half.empty()) unknown();
    const int down = half == "hi" ? size : 0, bytes = half == "wide" ? 2 * t.bytes : t.bytes;
    if (op == "mul") return on_whole(t, bytes, [down](__int128 a, __int128 b) { return a * b >> down; });
    return on_whole(t, bytes, [down](__int128 a, __int128 b, __int128 c) { return (a * b >> down) + c; });
  }
  if (op == "mul") return exact(), on_floats(t, [](auto a, auto b) { return a * b; });
  if (op == "fma" && parts.take("rn")) return on_floats(t, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  if (op == "div" && t.floating()) {
    if (!parts.take("rn")) unknown();
    return on_floats(t, [](auto a, auto b) { return a / b; });
  }
  if (op == "div" || op == "rem")  // by zero, all bits are set: no access of memory will pass with that
    return on_whole(t, t.bytes, [rest = op == "rem"](__int128 a, __int128 b) {
      return b == 0 ? __int128(-1) : rest ? a % b : a / b;
    });
  if (op == "sqrt" && parts.take("rn")) return on_floats(t, [](auto a) { return std::sqrt(a); });
  if (op == "rcp" && parts.take("rn")) return on_floats(t, [](auto a) { return 1 / a; });
  if (parts.take("approx")) {
    const bool ftz = parts.take("ftz");
    if (op == "rcp") return approximate(t, ftz, [](double x) { return 1 / x; });
    if (op == "ex2") return approximate(t, ftz, [](double x) { return std::exp2(x); });
  }
  if (op == "popc" && t.kind == Type::bits) return [](const Bits* a) { return Bits(std::popcount(a[0])); };
  if (op == "shl") return [t, size](const Bits* a) { return a[1] < Bits(size) ? low(a[0] << a[1], t.bytes) : 0; };
  if (op == "shr")
    return [t, size](const Bits* a) { return low(Bits(t.whole(a[0]) >> std::min(a[1], Bits(size))), t.bytes); };
  if (op == "bfi")
    return [t](const Bits* a) {
      const Bits at = a[2] & 255, length = a[3] & 255;
      const Bits ones = length < 64 ? (Bits(1) << length) - 1 : ~Bits(0), mask = at < 64 ? low(ones << at, t.bytes) : 0;
      return (a[1] & ~mask) | (mask ? a[0] << at & mask : 0);
    };
  unknown();
}

struct Kernel {
  struct Parameter {
    int at, bytes;
  };

  string name;
  vector<Instruction> code;
  vector<Parameter> parameters;
  int parameter_bytes = 0, most_threads = 1024, static_shared = 0;
  unsigned cluster = 1;    // blocks in one
  vector<Bits> constants;  // what registers hold from the start
  vector<bool> meeting;    // by instruction: a label leads here
  int special = 0;         // the first of kSpecial
  std::map<string, int> registers;

  Kernel(const string& text, const string& entry) : name(entry) {
    for (const char* s : kSpecial) registers[s] = new_register(0);
    const size_t begin = text.find(".entry " + entry + "(");
    if (begin == string::npos) throw std::invalid_argument("no kernel " + entry);
    const size_t open = text.find('(', begin), close = text.find(')', open), brace = text.find('{', close);
    declare_parameters(text.substr(open + 1, close - open - 1));
    const string directives = text.substr(close, brace - close);
    if (const size_t at = directives.find(".maxntid"); at != string::npos)
      most_threads = std::atoi(directives.c_str() + at + 8);
    if (const size_t at = directives.find(".reqnctapercluster"); at != string::npos)
      cluster = std::atoi(directives.c_str() + at + 18);
    size_t end = brace;
    for (int depth = 0; end < text.size(); ++end)
      if (text[end] == '{')
        ++depth;
      else if (text[end] == '}' && --depth == 0)
        break;
    const string body = text.substr(brace + 1, end - brace - 1);
    declare_shared(text, body);
    parse(body, files_of(text));
  }

 private:
  std::map<string, int> labels_;
  vector<std::pair<int, string>> jumps_;

  int new_register(Bits value) {
    constants.push_back(value);
    return int(constants.size()) - 1;
  }

  void declare_parameters(const string& text) {
    for (const string& declared : split(text, ',')) {
      const vector<string> words = split(declared, ' ');  // .param .align 8 .b8 name[56]
      int align = 0, bytes = 0;
      for (size_t i = 1; i + 1 < words.size(); ++i)
        if (words[i] == ".align")
          align = std::stoi(words[i + 1]);
        else if (auto t = Parts(words[i]).type(); t && !bytes)
          bytes = t->bytes;
      const size_t bracket = words.back().find('[');
      align = std::max(align, bytes);
      if (bracket != string::npos) bytes *= std::stoi(words.back().substr(bracket + 1));
      parameter_bytes = (parameter_bytes + align - 1) / align * align;
      parameters.push_back({parameter_bytes, bytes});
      registers[words.back().substr(0, bracket)] = new_register(parameter_bytes);  // its address
      parameter_bytes += bytes;
    }
  }

  // .shared .align 16 .b8 name[1024]; what a launch adds, name[], lies behind the rest.
  void declare_shared(const string& text, const string& body) {
    vector<string> dynamic;
    for (size_t at = text.find(".shared .align"); at != string::npos; at = text.find(".shared .align", at + 1)) {
      const vector<string> words = split(text.substr(at, text.find(';', at) - at), ' ');
      const size_t bracket = words.back().find('[');
      const string variable = words.back().substr(0, bracket);
      if (body.find(variable) == string::npos) continue;
      const int align = std::stoi(words[2]), number = Parts(words[3]).type()->bytes;
      const int bytes = number * (bracket == string::npos ? 1 : std::atoi(words.back().c_str() + bracket + 1));
      if (!bytes) {
        dynamic.push_back(variable);
        continue;
      }
      static_shared = (static_shared + align - 1) / align * align;
      registers[variable] = new_register(kSharedBase + static_shared);
      static_shared += bytes;
    }
    if (!dynamic.empty()) static_shared = (static_shared + 15) / 16 * 16;
    for (const string& variable : dynamic) registers[variable] = new_register(kSharedBase + static_shared);
  }

  static std::map<int, string> files_of(const string& text) {  // .file 1 "path"
    std::map<int, string> files;
    for (size_t at = text.find("\t.file\t"); at != string::npos; at = text.find("\t.file\t", at + 1)) {
      const size_t open = text.find('"', at), close = text.find('"', open + 1), slash = text.rfind('/', close);
      files[std::atoi(text.c_str() + at + 7)] =
          text.substr(std::max(open, slash) + 1, close - std::max(open, slash) - 1);
    }
    return files;
  }

  static vector<string> split(const string& text, char by) {  // at `by` (' ': any white space) outside of braces
    vector<string> parts(1);
    int depth = 0;
    for (char c : text) {
      const bool space = std::isspace(static_cast<unsigned char>(c));
      depth += (c == '{') - (c == '}');
      if (depth == 0 && (c == by || (by == ' ' && space)))
        parts.emplace_back();
      else if (!space || !parts.back().empty())
        parts.back() += c;
    }
    for (string& part : parts) part.erase(part.find_last_not_of(" \t\n") + 1);
    std::erase(parts, "");
    return parts;
  }

  void parse(const string& body, const std::map<int, string>& files) {
    string where;
    for (size_t at = 0; at < body.size();) {
      const char c = body[at];
      if (std::isspace(static_cast<unsigned char>(c)) || c == '{' || c == '}' || c == ';') {
        ++at;
        continue;
      }
      if (body.compare(at, 2, "//") == 0) {
        at = std::min(body.find('\n', at), body.size());
        continue;
      }
      if (body.compare(at, 4, ".loc") == 0) {
        int file = 0, line = 0;
        if (std::sscanf(body.c_str() + at, ".loc %d %d", &file, &line) == 2 && line && files.contains(file))
          where = files.at(file) + ":" + std::to_string(line);
        at = std::min(body.find('\n', at), body.size());
        continue;
      }
      const size_t end = body.find_first_of(";:", at);
      if (end == string::npos) refuse(body.substr(at, 80));
      if (body[end] == ':' && body.compare(end, 2, "::") != 0 && body[at] == '$') {
        labels_[body.substr(at, end - at)] = int(code.size());
        at = end + 1;
        continue;
      }
      const size_t semicolon = body.find(';', at);
      if (c != '.') {
        add(body.substr(at, semicolon - at), where);
      } else if (body.compare(at, 4, ".reg") && body.compare(at, 7, ".shared") && body.compare(at, 7, ".pragma")) {
        refuse(body.substr(at, semicolon - at));  // .local: what does not fit in registers
      }
      at = semicolon + 1;
    }
    meeting.assign(code.size() + 1, false);
    for (auto& [label, at] : labels_) meeting[at] = true;
    for (auto& [at, label] : jumps_) code[at].target = labels_.at(label);
    special = registers.at(kSpecial[0]);
  }

  // A register's index: of a name, or of a constant.
  int source(const string& operand) {
    if (const auto found = registers.find(operand); found != registers.end()) return found->second;
    const bool number = std::isdigit(static_cast<unsigned char>(operand[0])) || operand[0] == '-';
    if (!number && operand[0] != '%' && operand.find_first_not_of("abcdefghijklmnopqrstuvwxyz") != string::npos)
      unknown();
    if (operand[0] == '%' && operand.find('.') != string::npos) unknown();
    Bits value = 0;
    if (number && (operand[1] == 'f' || operand[1] == 'F' || operand[1] == 'd' || operand[1] == 'D'))
      value = std::strtoull(operand.c_str() + 2, nullptr, 16);
    else if (number)
      value = operand[0] == '-' ? Bits(std::strtoll(operand.c_str(), nullptr, 0))
                                : Bits(std::strtoull(operand.c_str(), nullptr, 0));
    return registers[operand] = new_register(value);
  }
  int destination(const string& operand) { return operand == "_" ? new_register(0) : source(operand); }

  static vector<string> members(const string& operand) {  // {a, b}
    return operand[0] == '{' ? split(operand.substr(1, operand.size() - 2), ',') : vector{operand};
  }

  void add(string text, const string& where) {
    Instruction i;
    std::replace_if(text.begin(), text.end(), [](unsigned char c) { return std::isspace(c); }, ' ');
    i.text = text, i.where = where;
    try {
      if (text[0] == '@') {
        const size_t space = text.find(' ');
        i.unless = text[1] == '!';
        i.guard = source(text.substr(1 + i.unless, space - 1 - i.unless));
        text = text.substr(text.find_first_not_of(' ', space));
      }
      const size_t space = std::min(text.find(' '), text.size());
      Parts parts(text.substr(0, space));
      decode(i, parts, split(text.substr(space), ','));
      if (!parts.left.empty()) unknown();
    } catch (const Unknown&) {
      refuse(i.text);
    }
    code.push_back(std::move(i));
  }

  void decode(Instruction& i, Parts& parts, const vector<string>& operands) {
    const string& op = parts.name;
    if (op == "bra") {
      parts.take("uni");
      i.kind = Instruction::branch;
      jumps_.push_back({int(code.size()), operands.at(0)});
    } else if (op == "ret" || op == "exit") {
      i.kind = Instruction::leave;
    } else if (op == "barrier" && parts.take("cluster")) {  // both halves, one right after the other
      const bool comes = parts.take("arrive"), half = comes ? parts.take("release") : parts.take("wait");
      const bool other = comes || (parts.take("acquire") && !code.empty() && code.back().kind == Instruction::nothing);
      if (!half || !other || !parts.take("aligned") || i.guard >= 0) unknown();
      i.kind = comes ? Instruction::nothing : Instruction::barrier;
      i.mode = "cluster";
    } else if (op == "bar" || op == "barrier") {
      const bool warp = parts.take("warp");
      i.kind = warp ? Instruction::converge : Instruction::barrier;
      if (!parts.take("sync") || i.guard >= 0 || (!warp && operands != vector<string>{"0"})) unknown();
      if (warp) i.from = {source(operands.at(0))};
    } else if (op == "shfl") {
      i.kind = Instruction::shuffle;
      i.mode = parts.one_of({"up", "down", "bfly", "idx"});
      if (!parts.take("sync") || !parts.take("b32") || i.mode.empty()) unknown();
      const string& to = operands.at(0);
      if (to.find('|') != string::npos && to.substr(to.find('|')) != "|_") {
        i.to = {destination(to.substr(0, to.find('|'))), destination(to.substr(to.find('|') + 1))};
      } else {
        i.to = {destination(to.substr(0, to.find('|'))), new_register(0)};
      }
      i.from = {source(operands.at(4)), source(operands[1]), source(operands[2]), source(operands[3])};
    } else if (op == "vote") {
      i.kind = Instruction::vote;
      if (!parts.take("sync") || !parts.take("ballot") || !parts.take("b32") || i.guard >= 0) unknown();
      i.to = {destination(operands.at(0))};
      i.from = {source(operands.at(2)), source(operands[1])};
    } else if (op == "prefetch") {
      i.kind = Instruction::nothing;
      if (!parts.take("global") || !parts.take("L2")) unknown();
    } else if (op == "ld" || op == "st") {
      move(i, parts, operands);
    } else if (op == "mov" && operands.at(0)[0] == '{') {
      i.kind = Instruction::unpack;
      const vector<string> to = members(operands[0]);
      i.bytes = parts.type()->bytes / int(to.size());
      for (const string& part : to) i.to.push_back(destination(part));
      i.from = {source(operands.at(1))};
    } else if (op == "mov" && operands.at(1)[0] == '{') {
      const vector<string> of = members(operands[1]);
      for (const string& part : of) i.from.push_back(source(part));
      i.to = {destination(operands[0])};
      i.function = [bytes = parts.type()->bytes / int(of.size()), n = of.size()](const Bits* a) {
        Bits found = 0;
        for (size_t k = 0; k < n; ++k) found |= low(a[k], bytes) << 8 * bytes * k;
        return found;
      };
    } else {
      i.function = function_of(parts);
      i.to = {destination(operands.at(0))};
      for (size_t k = 1; k < operands.size(); ++k) i.from.push_back(source(operands[k]));
    }
  }

  void move(Instruction& i, Parts& parts, const vector<string>& operands) {
    const bool loads = parts.name == "ld";
    const auto type = parts.type();
    if (!type) unknown();
    i.kind = loads ? Instruction::load : Instruction::store;
    i.bytes = type->bytes, i.sign = type->kind == Type::sign;
    const string vector_of = parts.one_of({"v2", "v4", "v8"});
    for (const char* hint : {"volatile", "L1::no_allocate", "L1::evict_first", "L1::evict_last", "L2::128B", "L2::256B",
                             "cs", "cg", "ca", "wb", "wt", "lu"})
      parts.take(hint);
    i.constant = parts.take("nc");
    const string& address = operands.at(loads ? 1 : 0);  // [%rd1+16]
    const size_t plus = address.find('+');
    const string base = address.substr(1, std::min(plus, address.size() - 1) - 1);
    i.offset = plus == string::npos ? 0 : std::strtoll(address.c_str() + plus + 1, nullptr, 0);
    const vector<string> numbers = members(operands.at(loads ? 0 : 1));
    if (int(numbers.size()) != (vector_of.empty() ? 1 : vector_of[1] - '0')) unknown();
    i.from = {source(base)};
    if (parts.take("param")) {  // one number, the same for all threads
      if (!loads) unknown();
      i.mode = "param";
    } else {
      i.shared = parts.take("shared");
      if (!i.shared) parts.take("global");
    }
    for (const string& n : numbers) (loads ? i.to : i.from).push_back(loads ? destination(n) : source(n));
  }
};

// ---------------------------------------------------------------- memory, and who did what to it

struct Shadow {  // of a number; threads from 1
  uint32_t writer, written, reader[2], read[2];
  bool constant;
};

struct Region {
  Bits begin, end;
  char* bytes;
  uint8_t* initialised;  // by number; nullptr: all of it
  int granule;           // bytes of a number
  std::unique_ptr<Shadow[], decltype(&std::free)> shadow{nullptr, &std::free};

  Region(Bits begin, Bits end, char* bytes, uint8_t* initialised, int granule)
      : begin(begin), end(end), bytes(bytes), initialised(initialised), granule(granule) {
    shadow.reset(static_cast<Shadow*>(std::calloc((end - begin) / granule + 1, sizeof(Shadow))));
  }
};

struct Warp {
  vector<Register> registers;
  std::array<int, kWarp> at{};   // the next instruction
  Lanes alive = 0, waiting = 0;  // at the barrier of the block
  int barrier = -1;
  uint32_t first_thread = 0, synchronised = 0;  // of the launch, from 1; when the warp last was
};

struct Fault {
  int times = 0;
  string text;
};

struct Block {
  uint32_t first_thread, synchronised;  // of the launch, from 1; when the block last was
  vector<char> bytes;
  vector<uint8_t> initialised;
  Region shared;
  vector<Warp> warps;

  Block(uint32_t first_thread, uint32_t now, size_t shared_bytes, size_t warps)
      : first_thread(first_thread),
        synchronised(now),
        bytes(shared_bytes, char(0xff)),
        initialised(shared_bytes),
        shared(kSharedWindow + kSharedBase, kSharedWindow + kSharedBase + shared_bytes, bytes.data(),
               initialised.data(), 1),
        warps(warps) {}
};

struct Launch {
  const Kernel& kernel;
  vector<Region> regions;
  string parameters;
  unsigned across, down, threads;
  size_t shared_bytes;
  Block* block = nullptr;  // that runs
  uint32_t now = 1, cluster_first = 1, cluster_synchronised = 0;
  std::map<std::pair<const char*, const Instruction*>, Fault> faults;

  Launch(const Kernel& kernel, unsigned across, unsigned down, unsigned threads, unsigned dynamic_shared)
      : kernel(kernel),
        across(across),
        down(down),
        threads(threads),
        shared_bytes(kernel.static_shared + dynamic_shared) {}

  void fault(const char* what, const Instruction& i, const Warp& w, int lane, Bits address = 0) {
    Fault& found = faults[{what, &i}];
    if (found.times++) return;
    const uint32_t thread = w.first_thread + lane - 1;
    char place[120];
    std::snprintf(place, sizeof place, ", thread %u of block %u, address %#llx", thread % threads, thread / threads,
                  static_cast<unsigned long long>(address));
    found.text = string(what) + ": " + i.text + " (" + i.where + ")" + place;
  }

  void run() {
    for (unsigned first = 0; first < across * down; first += kernel.cluster) run_cluster(first);
  }

  void run_cluster(unsigned first) {
    vector<std::unique_ptr<Block>> blocks;
    cluster_first = 1 + first * threads, cluster_synchronised = ++now;
    for (unsigned k = 0; k < kernel.cluster; ++k) {
      blocks.push_back(
          std::make_unique<Block>(cluster_first + k * threads, now, shared_bytes, (threads + kWarp - 1) / kWarp));
      block = blocks.back().get();
      for (size_t w = 0; w < block->warps.size(); ++w) begin(block->warps[w], unsigned(w), first + k);
    }
    for (;;) {
      size_t waiting = 0;
      for (const auto& b : blocks) {
        block = b.get();
        waiting += run_block();
      }
      if (!waiting) return;
      if (waiting < blocks.size())
        throw std::runtime_error(kernel.name + ": not all blocks of the cluster come to its barrier");
      cluster_synchronised = ++now;
    }
  }

  // Until all of its threads have left, or wait for the other blocks of the cluster: true.
  bool run_block() {
    for (;;) {
      Lanes waiting = 0;
      for (Warp& w : block->warps) run_warp(w), waiting |= w.waiting;
      if (!waiting) return false;
      const Warp& some =
          *std::find_if(block->warps.begin(), block->warps.end(), [](const Warp& w) { return w.waiting; });
      const Instruction& barrier = kernel.code[some.barrier];
      for (Warp& w : block->warps) {
        const unsigned left = threads - (w.first_thread - block->first_thread);
        const Lanes all = left >= kWarp ? ~Lanes(0) : (Lanes(1) << left) - 1;
        if (w.waiting != all || w.barrier != some.barrier)
          fault("not all threads of the block come to this barrier", barrier, w, 0);
        w.waiting = 0;
      }
      block->synchronised = ++now;
      if (barrier.mode == "cluster") return true;
    }
  }

  void begin(Warp& w, unsigned index, unsigned number) {
    w.registers.resize(kernel.constants.size());
    for (size_t r = 0; r < w.registers.size(); ++r) w.registers[r].fill(kernel.constants[r]);
    const unsigned first = index * kWarp, count = std::min(threads - first, unsigned(kWarp));
    w.alive = count == kWarp ? ~Lanes(0) : (Lanes(1) << count) - 1;
    w.first_thread = block->first_thread + first, w.synchronised = now;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const unsigned values[] = {first + lane, threads, number % across, number / across, across, down, lane};
      for (size_t k = 0; k < std::size(values); ++k) w.registers[kernel.special + k][lane] = values[k];
    }
  }

  // Until all of its threads have left or wait for other warps.
  void run_warp(Warp& w) {
    Lanes parked = 0;  // they wait for others of the warp
    int branches = 0;
    for (;;) {
      const Lanes ready = w.alive & ~w.waiting & ~parked;
      if (!ready) break;
      int pc = INT32_MAX;
      for (int l = 0; l < kWarp; ++l)
        if (ready >> l & 1) pc = std::min(pc, w.at[l]);
      Lanes here = 0;
      for (int l = 0; l < kWarp; ++l)
        if ((w.alive & ~w.waiting) >> l & 1 && w.at[l] == pc) here |= Lanes(1) << l;
      parked &= ~here;
      const bool together = here == (w.alive & ~w.waiting);
      do {
        if (pc == int(kernel.code.size())) {
          w.alive &= ~here;
          here = 0;
          break;
        }
        const Instruction& i = kernel.code[pc];
        Lanes on = here;
        if (i.guard >= 0) on &= true_in(w.registers[i.guard]) ^ (i.unless ? ~Lanes(0) : 0);
        if (i.kind == Instruction::leave) {
          w.alive &= ~on;
          here &= ~on;
        } else if (i.kind == Instruction::branch) {
          if (++branches > 1'000'000) throw std::runtime_error(kernel.name + " does not come to an end");
          if (on && on != here) {
            for (int l = 0; l < kWarp; ++l)
              if (here >> l & 1) w.at[l] = on >> l & 1 ? i.target : pc + 1;
            here = 0;
            break;
          }
          if (on) {
            pc = i.target;
            continue;
          }
        } else if (i.kind == Instruction::barrier) {
          w.waiting |= here, w.barrier = pc;
          keep(w, here, pc + 1);
          here = 0;
          break;
        } else if (i.kind >= Instruction::converge) {
          if (!all_here(w, i, here)) {
            parked |= here;
            keep(w, here, pc);
            here = 0;
            break;
          }
          across_lanes(w, i, here);
        } else {
          step(w, i, on);
        }
        ++pc;
      } while (here && (together || !kernel.meeting[pc]));
      keep(w, here, pc);
    }
    if (parked)
      throw std::runtime_error(kernel.name + ": threads wait for others of their warp, which never come, at " +
                               kernel.code[w.at[std::countr_zero(parked)]].text);
  }

  static void keep(Warp& w, Lanes lanes, int pc) {
    for (int l = 0; l < kWarp; ++l)
      if (lanes >> l & 1) w.at[l] = pc;
  }
  static Lanes true_in(const Register& predicate) {
    Lanes found = 0;
    for (int l = 0; l < kWarp; ++l) found |= Lanes(predicate[l] & 1) << l;
    return found;
  }

  // Whether all threads that the instruction's mask, its first operand, names have come to it.
  bool all_here(const Warp& w, const Instruction& i, Lanes here) {
    Lanes named = 0;
    for (int l = 0; l < kWarp; ++l)
      if (here >> l & 1) {
        const Lanes mask = Lanes(w.registers[i.from[0]][l]);
        if (!(mask >> l & 1)) fault("a thread that the mask does not name", i, w, l);
        named |= mask;
      }
    return !(named & w.alive & ~here);
  }

  void across_lanes(Warp& w, const Instruction& i, Lanes here) {
    if (i.kind == Instruction::converge) {
      w.synchronised = ++now;
      return;
    }
    const Register value = w.registers[i.from[1]];
    if (i.kind == Instruction::vote) {
      const Lanes found = true_in(value) & here;
      for (int l = 0; l < kWarp; ++l)
        if (here >> l & 1) w.registers[i.to[0]][l] = found;
      return;
    }
    const Register by = w.registers[i.from[2]], clamp = w.registers[i.from[3]];
    for (int l = 0; l < kWarp; ++l) {
      if (!(here >> l & 1)) continue;
      const int b = int(by[l] & 31), segment = int(clamp[l] >> 8 & 31),
                edge = (l & segment) | int(clamp[l] & 31 & ~segment);
      int from = i.mode == "up"     ? l - b
                 : i.mode == "down" ? l + b
                 : i.mode == "bfly" ? l ^ b
                                    : (l & segment) | (b & ~segment);
      const bool inside = i.mode == "up" ? from >= edge : from <= edge;
      if (!inside) from = l;
      if (!(here >> from & 1)) fault("a shuffle from a thread that is not there", i, w, l);
      w.registers[i.to[0]][l] = value[from];
      w.registers[i.to[1]][l] = inside;
    }
  }

  void step(Warp& w, const Instruction& i, Lanes on) {
    for (int l = 0; l < kWarp; ++l) {
      if (!(on >> l & 1)) continue;
      switch (i.kind) {
        case Instruction::compute: {
          Bits in[4];
          for (size_t k = 0; k < i.from.size(); ++k) in[k] = w.registers[i.from[k]][l];
          w.registers[i.to[0]][l] = i.function(in);
          break;
        }
        case Instruction::nothing: break;
        case Instruction::unpack: {
          const Bits whole = w.registers[i.from[0]][l];
          for (size_t k = 0; k < i.to.size(); ++k) w.registers[i.to[k]][l] = low(whole >> 8 * i.bytes * k, i.bytes);
          break;
        }
        case Instruction::load: {
          const int n = int(i.to.size());
          const char* from = i.mode == "param" ? parameter(w, i, l, n * i.bytes) : access(w, i, l, n * i.bytes);
          for (int k = 0; k < n; ++k) {
            Bits found = 0;
            if (from) std::memcpy(&found, from + k * i.bytes, i.bytes);
            if (i.sign && i.bytes < 8) found = Bits(int64_t(found << (64 - 8 * i.bytes)) >> (64 - 8 * i.bytes));
            w.registers[i.to[k]][l] = found;
          }
          break;
        }
        default: {
          const int n = int(i.from.size()) - 1;
          char values[64];
          for (int k = 0; k < n; ++k) std::memcpy(values + k * i.bytes, &w.registers[i.from[1 + k]][l], i.bytes);
          if (char* to = access(w, i, l, n * i.bytes, values)) std::memcpy(to, values, n * i.bytes);
        }
      }
    }
  }

  const char* parameter(const Warp& w, const Instruction& i, int l, int bytes) {
    const Bits at = w.registers[i.from[0]][l] + i.offset;
    if (at >= parameters.size() || at + bytes > parameters.size()) return fault("out of bounds", i, w, l, at), nullptr;
    return parameters.data() + at;
  }

  // Where the bytes of lane l's access lie in this process; nullptr if they are not the kernel's. `values`: what is
  // stored.
  char* access(const Warp& w, const Instruction& i, int l, int bytes, const char* values = nullptr) {
    const Bits address = w.registers[i.from[0]][l] + i.offset + (i.shared ? kSharedWindow : 0);
    Region* r = address >= kSharedWindow ? &block->shared : nullptr;
    for (size_t k = 0; k < regions.size() && !r; ++k)
      if (regions[k].begin <= address && address < regions[k].end) r = &regions[k];
    if (!r || address < r->begin || address + bytes > r->end) return fault("out of bounds", i, w, l, address), nullptr;
    if (address % bytes) return fault("misaligned", i, w, l, address), nullptr;
    const Bits offset = address - r->begin;
    char* place = r->bytes + offset;
    const bool same = values && !std::memcmp(place, values, bytes);
    const uint32_t thread = w.first_thread + l;
    for (Bits g = offset / r->granule; g <= (offset + bytes - 1) / r->granule; ++g) {
      Shadow& s = r->shadow[g];
      if (!values && r->initialised && !r->initialised[g] && is_poison(r->bytes + g * r->granule, r->granule))
        fault("read of memory that nobody wrote", i, w, l, address);
      if (r->initialised && values) r->initialised[g] = 1;
      if (values) {
        if (s.constant) fault("write of memory that is read as constant", i, w, l, address);
        // Two threads may write the same: either value is it.
        if (!same && !ordered(w, s.writer, s.written, thread)) fault("race: two threads write", i, w, l, address);
        for (int k : {0, 1})
          if (!same && !ordered(w, s.reader[k], s.read[k], thread)) fault("race: write after read", i, w, l, address);
        s.writer = thread, s.written = now;
        s.reader[0] = s.reader[1] = 0;
      } else {
        if (i.constant && s.writer) fault("read as constant of memory that is written", i, w, l, address);
        if (!ordered(w, s.writer, s.written, thread)) fault("race: read after write", i, w, l, address);
        s.constant |= i.constant;
        if (s.reader[0] != thread) s.reader[1] = s.reader[0], s.read[1] = s.read[0];
        s.reader[0] = thread, s.read[0] = now;
      }
    }
    return place;
  }

  // What fresh memory holds: in a tensor, no copy of PyTorch's has been there.
  static bool is_poison(const char* at, int bytes) {
    return std::all_of(at, at + bytes, [](char c) { return uint8_t(c) == 0xff; });
  }

  // Whether what a thread did at a time is over for another one: a barrier lies between.
  bool ordered(const Warp& w, uint32_t before, uint32_t time, uint32_t thread) const {
    if (!before || before == thread) return true;
    if (before - block->first_thread >= threads)  // another block's
      return before - cluster_first < kernel.cluster * threads && time < cluster_synchronised;
    const bool same_warp = before >= w.first_thread && before < w.first_thread + kWarp;
    return time < block->synchronised || (same_warp && time < w.synchronised);
  }
};

// What went wrong in a launch of the kernel, by kind and instruction, in lines.
// memory: rows of begin, end, address of a byte for each number that says whether a kernel wrote it, or 0, bytes of a
// number.
string launch(const Kernel& kernel, unsigned across, unsigned down, unsigned threads, unsigned shared,
              const vector<string>& arguments, const string& memory) {
  if (!across || !down || down > 65535 || across > INT32_MAX || !threads || threads > unsigned(kernel.most_threads))
    throw std::invalid_argument(kernel.name + " cannot be launched as " + std::to_string(across) + " x " +
                                std::to_string(down) + " blocks of " + std::to_string(threads) +
                                " threads; its most are " + std::to_string(kernel.most_threads));
  const int most_shared = kernel.cluster > 1 ? kMostSharedOfClusters : kMostShared;
  if (kernel.static_shared + int(shared) > most_shared)
    throw std::invalid_argument(kernel.name + ": more shared memory than every device has");
  if (across % kernel.cluster) throw std::invalid_argument(kernel.name + ": a grid of not whole clusters");
  if (arguments.size() != kernel.parameters.size())
    throw std::invalid_argument(kernel.name + " takes " + std::to_string(kernel.parameters.size()) +
                                " arguments, not " + std::to_string(arguments.size()));
  Launch l(kernel, across, down, threads, shared);
  l.parameters.resize(kernel.parameter_bytes);
  for (size_t k = 0; k < arguments.size(); ++k) {
    const auto& p = kernel.parameters[k];
    const int given = int(arguments[k].size());  // words that are not given are 0
    if (given > p.bytes || (given < p.bytes && k + 1 < arguments.size()))
      throw std::invalid_argument(kernel.name + ": argument " + std::to_string(k) + " has " + std::to_string(given) +
                                  " bytes, the kernel wants " + std::to_string(p.bytes));
    std::memcpy(l.parameters.data() + p.at, arguments[k].data(), given);
  }
  for (size_t at = 0; at < memory.size();) {
    Bits row[4];  // of which memory has whole ones
    at += memory.copy(reinterpret_cast<char*>(row), sizeof row, at);
    l.regions.emplace_back(row[0], row[1], reinterpret_cast<char*>(row[0]), reinterpret_cast<uint8_t*>(row[2]),
                           int(row[3]));
  }
  l.run();
  string found;
  for (auto& [key, fault] : l.faults) found += fault.text + ", " + std::to_string(fault.times) + " times\n";
  return found;
}

Kernel parse(const string& ptx, const string& name) { return {ptx, name}; }

PyMethodDef functions[] = {snnkern::function<parse>("Kernel"), snnkern::function<launch>("launch"), {}};

}  // namespace

PyMODINIT_FUNC PyInit__ptx() {
  return snnkern::add_type<Kernel>("_ptx.Kernel") ? snnkern::make_module("_ptx", functions) : nullptr;
}
