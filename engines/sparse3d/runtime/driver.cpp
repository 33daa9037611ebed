#include "driver.hpp"

#include <dlfcn.h>

#include "plan_data.hpp"

namespace dm3d {

namespace {

template <class Function>
void bind(void *library, Function *&function, const char *name) {
  function = reinterpret_cast<Function *>(dlsym(library, name));
  if (function == nullptr) refuse(DM3D_NO_DRIVER, "libcuda.so.1 lacks %s", name);
}

}  // namespace

// The library stays open: contexts of the process outlive a plan.
Driver::Driver() {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) refuse(DM3D_NO_DRIVER, "%s", dlerror());
  bind(library, cuInit, "cuInit");
  bind(library, cuGetErrorName, "cuGetErrorName");
  bind(library, cuDeviceGet, "cuDeviceGet");
  bind(library, cuDeviceGetAttribute, "cuDeviceGetAttribute");
  bind(library, cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  bind(library, cuCtxSetCurrent, "cuCtxSetCurrent");
  bind(library, cuCtxGetCurrent, "cuCtxGetCurrent");
  bind(library, cuCtxGetDevice, "cuCtxGetDevice");
  bind(library, cuModuleLoadData, "cuModuleLoadData");
  bind(library, cuModuleUnload, "cuModuleUnload");
  bind(library, cuModuleGetFunction, "cuModuleGetFunction");
  bind(library, cuFuncSetAttribute, "cuFuncSetAttribute");
  bind(library, cuMemAlloc, "cuMemAlloc_v2");
  bind(library, cuMemFree, "cuMemFree_v2");
  bind(library, cuMemcpyHtoD, "cuMemcpyHtoD_v2");
  bind(library, cuMemcpyDtoH, "cuMemcpyDtoH_v2");
  bind(library, cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
  bind(library, cuMemsetD32Async, "cuMemsetD32Async");
  bind(library, cuLaunchKernel, "cuLaunchKernel");
  bind(library, cuStreamCreate, "cuStreamCreate");
  bind(library, cuStreamSynchronize, "cuStreamSynchronize");
  check(cuInit(0), "cuInit");
}

void Driver::check(CUresult code, const char *what) const {
  if (code == 0) return;
  const char *name = nullptr;
  if (cuGetErrorName(code, &name) != 0 || name == nullptr) name = "an unknown error";
  refuse(DM3D_DRIVER_ERROR, "%s failed with %s (%d)", what, name, code);
}

}  // namespace dm3d
