// Loading and launching what NVRTC compiled, by the driver that is on the machine: nothing of CUDA is needed to build.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace snnkern {

// A kernel of a compiled image, loaded for a device and for good.
struct CudaKernel {
  CudaKernel(const std::string& image, const std::string& name, int device);  // throws std::runtime_error
  void* function;
  void* context;  // the device's primary one, which PyTorch uses too
};

constexpr int kMostConstants = 4, kMostWords = 40;

// A launch of it but for stream and tensors. The kernel takes `constants`, structures by value, and last one structure
// of 8-byte words, above all addresses.
class CudaLaunch {
 public:
  CudaLaunch(const CudaKernel& kernel, unsigned across, unsigned down, unsigned threads, unsigned shared,
             std::vector<std::string> constants);
  void operator()(void* stream, const int64_t* words) const;  // does not wait; throws std::runtime_error

 private:
  CudaKernel kernel_;
  unsigned across_, down_, threads_, shared_;
  std::vector<std::string> constants_;
};

}  // namespace snnkern
