// C++ functions as Python's, in CPython's limited API: one compiled extension serves every Python from 3.11 on.
//
//   PyMethodDef functions[] = {function<f>("f"), kernel<g>("g"), {}};
//
// The parameters of f say what Python gives, by position: int for integers and pointers (addresses), float, bool, bytes
// or str for std::string, an iterable of them for a vector, an object of its type for a structure. What f returns
// becomes None, bool, int, str (const char*), bytes (std::string) or an object. Whatever is wrong with an argument
// raises TypeError, ValueError or OverflowError; std::invalid_argument becomes ValueError, any other exception
// RuntimeError.
#pragma once
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace snnkern {

struct Raised {};  // thrown where Python's exception is set

// The exception in flight, as Python's; always null. The end of a thread, which is an exception too, goes on.
inline PyObject* raise(const char* function) {
  try {
    throw;
  } catch (const Raised&) {
  } catch (const std::invalid_argument& error) {
    PyErr_Format(PyExc_ValueError, "%s: %s", function, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline PyObject* checked(PyObject* made) {
  if (!made) throw Raised{};
  return made;
}

struct Reference {  // an owned one
  PyObject* object;
  explicit Reference(PyObject* made) : object(checked(made)) {}
  Reference(const Reference&) = delete;
  ~Reference() { Py_DECREF(object); }
};

// ---------------------------------------------------------------- structures

template <class T>
struct Object {
  PyObject_HEAD T value;
};

// One type in a process, not in a module: however often the module is imported, its functions know its objects.
template <class T>
PyTypeObject* type_of = nullptr;
template <class T>
const char* type_name = nullptr;

template <class T>
void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<Object<T>*>(self)->value.~T();
  PyObject_Free(self);
  Py_DECREF(type);
}

// Whether Python has a type for T now, of which C++ alone makes objects. name: with its module; call: what it is to
// call an object, if anything.
template <class T>
bool add_type(const char* name, ternaryfunc call = nullptr) {
  static_assert(alignof(T) <= 8);
  if (type_of<T>) return true;
  type_name<T> = std::strrchr(name, '.') + 1;
  PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&destroy<T>)},
                         {call ? Py_tp_call : 0, reinterpret_cast<void*>(call)},
                         {0, nullptr}};
  PyType_Spec spec{name, sizeof(Object<T>), 0,
                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, slots};
  type_of<T> = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return type_of<T>;
}

template <class T>
const T& value_of(PyObject* object) {
  return reinterpret_cast<Object<T>*>(object)->value;
}

// ---------------------------------------------------------------- from Python

struct Argument {
  const char* function;
  Py_ssize_t number;  // from 1
  PyObject* object;

  [[noreturn]] void refuse(const char* wanted) const {
    const Reference name(PyType_GetName(Py_TYPE(object)));
    PyErr_Format(PyExc_TypeError, "%s: argument %zd wants %s, got %U", function, number, wanted, name.object);
    throw Raised{};
  }

  // After a conversion that failed: its TypeError and OverflowError say what is wrong, but not where.
  [[noreturn]] void refused(const char* wanted) const {
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyErr_Format(PyExc_OverflowError, "%s: argument %zd wants %s, got a number too large for it", function, number,
                   wanted);
      throw Raised{};
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw Raised{};
    PyErr_Clear();
    refuse(wanted);
  }
};

inline int64_t integer(const Argument& a) {
  if (PyBool_Check(a.object)) a.refuse("an int");
  const int64_t value = PyLong_AsLongLong(a.object);  // asks __index__
  if (value == -1 && PyErr_Occurred()) a.refused("an int of 64 bits");
  return value;
}

inline int64_t integer(const Argument& a, int64_t lowest, int64_t highest) {
  const int64_t value = integer(a);
  if (value >= lowest && value <= highest) return value;
  PyErr_Format(PyExc_OverflowError, "%s: argument %zd wants an int from %lld to %lld, got %lld", a.function, a.number,
               static_cast<long long>(lowest), static_cast<long long>(highest), static_cast<long long>(value));
  throw Raised{};
}

inline std::string bytes(const Argument& a) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_Check(a.object)) {
    PyBytes_AsStringAndSize(a.object, &data, &size);
  } else if (PyUnicode_Check(a.object)) {
    data = const_cast<char*>(PyUnicode_AsUTF8AndSize(a.object, &size));
    if (!data) {
      PyErr_Format(PyExc_ValueError, "%s: argument %zd wants text that UTF-8 has, got surrogates", a.function,
                   a.number);
      throw Raised{};
    }
  } else {
    a.refuse("bytes or str");
  }
  return {data, static_cast<size_t>(size)};
}

// Of an enumeration that begins with 0: specialised for those that functions take.
struct Enumeration {
  const char* name;
  int members;
};
template <class E>
constexpr Enumeration kEnumeration{};

// T as a function declares it; structures by reference, which the caller keeps alive.
template <class T>
decltype(auto) from(const Argument& a) {
  using Value = std::decay_t<T>;
  if constexpr (std::is_same_v<Value, Argument>) {
    return Argument(a);
  } else if constexpr (std::is_same_v<Value, bool>) {
    if (!PyBool_Check(a.object)) a.refuse("True or False");
    return a.object == Py_True;
  } else if constexpr (std::is_enum_v<Value>) {
    constexpr Enumeration e = kEnumeration<Value>;
    const int64_t value = integer(a);
    if (value < 0 || value >= e.members) {
      PyErr_Format(PyExc_ValueError, "%s: argument %zd, %s, wants 0 to %d, got %lld", a.function, a.number, e.name,
                   e.members - 1, static_cast<long long>(value));
      throw Raised{};
    }
    return Value(value);
  } else if constexpr (std::is_pointer_v<Value>) {
    return reinterpret_cast<Value>(integer(a, 0, std::numeric_limits<intptr_t>::max()));
  } else if constexpr (std::is_integral_v<Value>) {
    using Limits = std::numeric_limits<std::conditional_t<sizeof(Value) == 8, int64_t, Value>>;
    return Value(integer(a, Limits::min(), Limits::max()));
  } else if constexpr (std::is_same_v<Value, double>) {
    if (PyBool_Check(a.object)) a.refuse("a float");
    const double value = PyFloat_AsDouble(a.object);  // asks __float__, then __index__
    if (value == -1 && PyErr_Occurred()) a.refused("a float");
    return value;
  } else if constexpr (std::is_same_v<Value, std::string>) {
    return bytes(a);
  } else if constexpr (std::is_same_v<Value, std::vector<std::string>>) {
    PyObject* made = PySequence_Tuple(a.object);
    if (!made) a.refused("a list of bytes");
    const Reference items(made);
    Value found;
    for (Py_ssize_t i = 0; i < PyTuple_Size(made); ++i)
      found.push_back(bytes({a.function, a.number, PyTuple_GetItem(made, i)}));
    return found;
  } else {
    if (Py_TYPE(a.object) != type_of<Value>) a.refuse(type_name<Value>);
    return value_of<Value>(a.object);
  }
}

// ---------------------------------------------------------------- to Python

template <class T>
PyObject* object(T value) {
  Object<T>* made = PyObject_New(Object<T>, type_of<T>);
  if (made) new (&made->value) T(std::move(value));
  return reinterpret_cast<PyObject*>(made);
}

// What f() returns.
template <class F>
PyObject* to(F&& f) {
  using T = decltype(f());
  if constexpr (std::is_void_v<T>) {
    f();
    return Py_NewRef(Py_None);
  } else if constexpr (std::is_same_v<T, bool>) {
    return PyBool_FromLong(f());
  } else if constexpr (std::is_integral_v<T>) {
    return PyLong_FromLongLong(f());
  } else if constexpr (std::is_same_v<T, const char*>) {
    return PyUnicode_FromString(f());
  } else if constexpr (std::is_same_v<T, std::string>) {
    const std::string bytes = f();
    return PyBytes_FromStringAndSize(bytes.data(), Py_ssize_t(bytes.size()));
  } else {
    return object(f());
  }
}

// ---------------------------------------------------------------- functions

template <auto F>
const char* name_of = nullptr;

// f() without the interpreter's lock. It is no destructor that takes the lock back: in a thread that Python ends there,
// as it does in those that are running when it exits, that is another exception.
template <class F>
auto unlocked(F&& f) {
  PyThreadState* state = PyEval_SaveThread();
  try {
    if constexpr (std::is_void_v<decltype(f())>) {
      f();
      PyEval_RestoreThread(state);
    } else {
      auto found = f();
      PyEval_RestoreThread(state);
      return found;
    }
  } catch (const std::exception&) {
    PyEval_RestoreThread(state);
    throw;
  }
}

template <auto F, bool threaded, class R, class... A, size_t... I>
PyObject* call(PyObject* const* given, R (*)(A...), std::index_sequence<I...>) {
  const std::tuple<decltype(from<A>(Argument()))...> values{from<A>(Argument{name_of<F>, I + 1, given[I]})...};
  const auto run = [&] { return std::apply(F, values); };
  if constexpr (!threaded) {
    return to(run);
  } else {
    const int threads = std::get<sizeof...(A) - 1>(values);
    if (threads < 1) throw std::invalid_argument("threads wants 1 or more, got " + std::to_string(threads));
    return to([&] { return unlocked(run); });
  }
}

template <auto F, bool threaded, class R, class... A>
PyObject* call(PyObject* const* given, Py_ssize_t n, R (*f)(A...)) {
  if (n == sizeof...(A)) return call<F, threaded>(given, f, std::index_sequence_for<A...>());
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name_of<F>, Py_ssize_t(sizeof...(A)), n);
  return nullptr;
}

template <auto F, bool threaded = false>
PyMethodDef function(const char* name) {
  name_of<F> = name;
  PyObject* (*called)(PyObject*, PyObject* const*, Py_ssize_t) = [](auto*, auto given, auto n) -> PyObject* {
    try {
      return call<F, threaded>(given, n, F);
    } catch (...) {
      return raise(name_of<F>);
    }
  };
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called)), METH_FASTCALL, nullptr};
}

// Of which the last argument is the number of threads: runs without the interpreter's lock.
template <auto F>
PyMethodDef kernel(const char* name) {
  return function<F, true>(name);
}

// One for a process: an interpreter that shares nothing with the first refuses it.
inline PyObject* make_module(const char* name, PyMethodDef* functions) {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, name, nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

}  // namespace snnkern
