// The CUDA driver interface by dlopen: the few declarations that are needed, so that no CUDA headers are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dm3d {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = std::uint64_t;
using CUhandle = void *;  // context, module, function, stream

constexpr int kMaxDynamicSharedAttribute = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kMajorAttribute = 75;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kMinorAttribute = 76;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR

struct Driver {
  CUresult (*cuInit)(unsigned);
  CUresult (*cuGetErrorName)(CUresult, const char **);
  CUresult (*cuDeviceGet)(CUdevice *, int);
  CUresult (*cuDeviceGetAttribute)(int *, int, CUdevice);
  CUresult (*cuDevicePrimaryCtxRetain)(CUhandle *, CUdevice);
  CUresult (*cuCtxSetCurrent)(CUhandle);
  CUresult (*cuCtxGetCurrent)(CUhandle *);
  CUresult (*cuCtxGetDevice)(CUdevice *);
  CUresult (*cuModuleLoadData)(CUhandle *, const void *);
  CUresult (*cuModuleUnload)(CUhandle);
  CUresult (*cuModuleGetFunction)(CUhandle *, CUhandle, const char *);
  CUresult (*cuFuncSetAttribute)(CUhandle, int, int);
  CUresult (*cuMemAlloc)(CUdeviceptr *, std::size_t);
  CUresult (*cuMemFree)(CUdeviceptr);
  CUresult (*cuMemcpyHtoD)(CUdeviceptr, const void *, std::size_t);
  CUresult (*cuMemcpyDtoH)(void *, CUdeviceptr, std::size_t);
  CUresult (*cuMemcpyDtoHAsync)(void *, CUdeviceptr, std::size_t, CUhandle);
  CUresult (*cuMemsetD32Async)(CUdeviceptr, unsigned, std::size_t, CUhandle);
  CUresult (*cuLaunchKernel)(CUhandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUhandle,
                             void **, void **);
  CUresult (*cuStreamCreate)(CUhandle *, unsigned);
  CUresult (*cuStreamSynchronize)(CUhandle);

  Driver();  // throws Refusal
  void check(CUresult code, const char *what) const;
};

}  // namespace dm3d
