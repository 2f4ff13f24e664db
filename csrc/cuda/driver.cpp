#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <stdexcept>
#include <utility>

namespace snnkern {
namespace {

using Status = int;  // CUresult
constexpr Status kSuccess = 0, kInvalidContext = 201;
constexpr int kMostShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr unsigned kSharedUnasked = 48 << 10;

struct Driver {
  Status (*library_load)(void** library, const void* image, int* options, void** values, unsigned n,
                         int* library_options, void** library_values, unsigned library_n);
  Status (*library_get)(void** kernel, void* library, const char* name);
  Status (*kernel_function)(void** function, void* kernel);
  Status (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                   void* stream, void** parameters, void** extra);
  Status (*device_get)(int* device, int ordinal);
  Status (*context_retain)(void** context, int device);
  Status (*context_set)(void* context);
  Status (*set_attribute)(void* function, int attribute, int value);
  Status (*error_string)(Status, const char** text);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("the NVIDIA driver cannot be loaded: ") + dlerror());
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (!function) throw std::runtime_error(std::string("the NVIDIA driver is too old: it has no ") + name);
    };
    find(library_load, "cuLibraryLoadData");
    find(library_get, "cuLibraryGetKernel");
    find(kernel_function, "cuKernelGetFunction");
    find(launch, "cuLaunchKernel");
    find(device_get, "cuDeviceGet");
    find(context_retain, "cuDevicePrimaryCtxRetain");
    find(context_set, "cuCtxSetCurrent");
    find(set_attribute, "cuFuncSetAttribute");
    find(error_string, "cuGetErrorString");
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

void check(Status status, const std::string& call) {
  if (status == kSuccess) return;
  const char* text = nullptr;
  driver().error_string(status, &text);
  throw std::runtime_error(call + ": " + (text ? text : "error") + " (" + std::to_string(status) + ")");
}

// Of a kernel's launches the one that takes most decides.
void allow_shared(void* function, unsigned shared) {
  static std::map<void*, unsigned> allowed;
  unsigned& most = allowed.try_emplace(function, kSharedUnasked).first->second;
  if (shared <= most) return;
  check(driver().set_attribute(function, kMostShared, int(shared)), "shared memory");
  most = shared;
}

}  // namespace

CudaKernel::CudaKernel(const std::string& image, const std::string& name, int device) {
  const Driver& d = driver();
  void *library = nullptr, *kernel = nullptr;
  check(d.device_get(&device, device), "choosing the device");
  check(d.context_retain(&context, device), "choosing the device");
  check(d.context_set(context), "choosing the device");  // this thread may have none yet
  check(d.library_load(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), "loading " + name);
  check(d.library_get(&kernel, library, name.c_str()), "finding " + name);
  check(d.kernel_function(&function, kernel), "loading " + name);
}

CudaLaunch::CudaLaunch(const CudaKernel& kernel, unsigned across, unsigned down, unsigned threads, unsigned shared,
                       std::vector<std::string> constants)
    : kernel_(kernel),
      across_(across),
      down_(down),
      threads_(threads),
      shared_(shared),
      constants_(std::move(constants)) {
  if (constants_.size() > kMostConstants) throw std::invalid_argument("too many constants for a launch");
  allow_shared(kernel.function, shared);
}

void CudaLaunch::operator()(void* stream, const int64_t* words) const {
  const Driver& d = driver();
  void* parameters[kMostConstants + 1];
  size_t n = 0;
  for (const std::string& constant : constants_) parameters[n++] = const_cast<char*>(constant.data());
  parameters[n] = const_cast<int64_t*>(words);
  const auto launch = [&] {
    return d.launch(kernel_.function, across_, down_, 1, threads_, 1, 1, shared_, stream, parameters, nullptr);
  };
  Status status = launch();
  if (status == kInvalidContext) {  // a thread in which nothing has used this device yet
    check(d.context_set(kernel_.context), "choosing the device");
    status = launch();
  }
  if (status != kSuccess)
    check(status, "launching " + std::to_string(across_) + " x " + std::to_string(down_) + " blocks of " +
                      std::to_string(threads_) + " threads");
}

}  // namespace snnkern
