// A libcuda.so.1 for machines without a GPU: it executes nothing. Device memory is host memory; modules, launches with
// every argument, and fills are written to the file that DM3D_CUDA_LOG names. The arguments of a launch are counted and
// measured by the image itself: by the parameter table of a real cubin (.nv.info), or by the kinds in a sample image.
// DM3D_CUDA_SM is the GPU (default 87); DM3D_CUDA_FAIL names a function that fails. With DM3D_CUDA_QUIET set it reads no
// image and no address and records nothing.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr int kOutOfMemory = 2, kInvalidImage = 200, kNotFound = 500, kIllegalAddress = 700;

using Sizes = std::vector<unsigned>;

struct Module {
  std::map<std::string, Sizes> kernels;  // "" stands for any name
};

struct Function {
  std::size_t number;
  Sizes sizes;
};

int context_marker;

std::map<std::uint64_t, std::size_t> memory;
std::deque<Module> modules;
std::deque<Function> functions;
const bool quiet = std::getenv("DM3D_CUDA_QUIET") != nullptr;
void *current_context = quiet ? &context_marker : nullptr;

std::FILE *log_file() {
  static std::FILE *file = [] {
    const char *path = std::getenv("DM3D_CUDA_LOG");
    return path && !quiet ? std::fopen(path, "w") : nullptr;
  }();
  return file;
}

template <class... Values>
void record(const char *format, Values... values) {
  if (log_file() == nullptr) return;
  std::fprintf(log_file(), format, values...);
  std::fflush(log_file());
}

unsigned long long hex(std::uint64_t value) { return value; }

bool fails(const char *name) {
  const char *chosen = std::getenv("DM3D_CUDA_FAIL");
  return chosen != nullptr && std::strcmp(chosen, name) == 0;
}

template <class T>
T at(const std::uint8_t *bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// Parameter sizes from the sections .nv.info.<symbol>: EIATTR_KPARAM_INFO records hold ordinal and size of each.
void read_cubin(const std::uint8_t *elf, Module &module) {
  const std::uint8_t *headers = elf + at<std::uint64_t>(elf + 40);
  const auto size = at<std::uint16_t>(elf + 58), count = at<std::uint16_t>(elf + 60), names = at<std::uint16_t>(elf + 62);
  const auto place = [&](unsigned index) { return elf + at<std::uint64_t>(headers + index * size + 24); };
  for (unsigned index = 0; index < count; ++index) {
    const std::string name(reinterpret_cast<const char *>(place(names)) + at<std::uint32_t>(headers + index * size));
    if (name.rfind(".nv.info.", 0) != 0) continue;
    Sizes &sizes = module.kernels[name.substr(9)];
    const std::uint8_t *entry = place(index);
    const std::uint8_t *end = entry + at<std::uint64_t>(headers + index * size + 32);
    while (entry + 4 <= end) {
      if (entry[1] == 0x17) {
        const auto ordinal = at<std::uint16_t>(entry + 8);
        if (sizes.size() <= ordinal) sizes.resize(ordinal + 1u);
        sizes[ordinal] = at<std::uint32_t>(entry + 12) >> 18;
      }
      entry += 4 + (entry[0] == 4 ? at<std::uint16_t>(entry + 2) : 0);
    }
  }
}

void read_image(const std::uint8_t *image, Module &module) {
  if (std::memcmp(image, "\177ELFdm3d", 8) != 0) return read_cubin(image, module);
  for (const std::uint8_t *kind = image + 8; *kind != 0; ++kind)
    module.kernels[""].push_back(*kind == 'i' || *kind == 'f' ? 4 : 8);
}

bool owned(std::uint64_t address, std::size_t bytes) {
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return false;
  const auto [start, size] = *--next;
  return address - start <= size && bytes <= size - (address - start);
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return fails("cuInit") ? 100 : 0; }

int cuGetErrorName(int code, const char **name) {
  static const std::map<int, const char *> names = {{kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                    {100, "CUDA_ERROR_NO_DEVICE"},
                                                    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE"},
                                                    {kNotFound, "CUDA_ERROR_NOT_FOUND"},
                                                    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"}};
  const auto found = names.find(code);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? 1 : 0;
}

int cuDeviceGet(int *device, int) { return *device = 0; }

int cuDeviceGetAttribute(int *value, int attribute, int) {
  const char *chosen = std::getenv("DM3D_CUDA_SM");
  const int sm = chosen ? std::atoi(chosen) : 87;
  *value = attribute == 75 ? sm / 10 : sm % 10;
  return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int) {
  *context = &context_marker;
  return 0;
}

int cuCtxSetCurrent(void *context) {
  current_context = context;
  return 0;
}

int cuCtxGetCurrent(void **context) {
  *context = current_context;
  return 0;
}

int cuCtxGetDevice(int *device) { return *device = 0; }

int cuStreamCreate(void **stream, unsigned) {
  *stream = reinterpret_cast<void *>(0x57);
  return 0;
}

int cuModuleLoadData(void **module, const void *image) {
  if (fails("cuModuleLoadData")) return kOutOfMemory;
  if (!quiet && std::memcmp(image, "\177ELF", 4) != 0) return kInvalidImage;
  Module &made = modules.emplace_back();
  if (!quiet) read_image(static_cast<const std::uint8_t *>(image), made);
  *module = &made;
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *symbol) {
  if (fails("cuModuleGetFunction")) return kNotFound;
  const auto &kernels = static_cast<Module *>(module)->kernels;
  const auto found = kernels.count(symbol) ? kernels.find(symbol) : kernels.find("");
  if (!quiet && found == kernels.end()) return kNotFound;
  Function &made = functions.emplace_back(Function{functions.size(), quiet ? Sizes{} : found->second});
  record("function %zu %s %zu\n", made.number, symbol, made.sizes.size());
  *function = &made;
  return 0;
}

int cuModuleUnload(void *) {
  record("unload\n");
  if (quiet) modules.clear(), functions.clear();
  return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  record("attribute %zu %d %d\n", static_cast<Function *>(function)->number, attribute, value);
  return fails("cuFuncSetAttribute") ? kOutOfMemory : 0;
}

int cuMemAlloc_v2(std::uint64_t *address, std::size_t bytes) {
  if (fails("cuMemAlloc")) return kOutOfMemory;
  void *made = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (made == nullptr) return kOutOfMemory;
  std::memset(made, 0, bytes);
  *address = reinterpret_cast<std::uint64_t>(made);
  memory[*address] = bytes;
  record("alloc %llx %zu\n", hex(*address), bytes);
  return 0;
}

int cuMemFree_v2(std::uint64_t address) {
  record("free %llx\n", hex(address));
  if (memory.erase(address) == 0) return kIllegalAddress;
  std::free(reinterpret_cast<void *>(address));
  return 0;
}

int cuMemcpyHtoD_v2(std::uint64_t address, const void *source, std::size_t bytes) {
  if (!owned(address, bytes)) return kIllegalAddress;
  std::memcpy(reinterpret_cast<void *>(address), source, bytes);
  record("upload %llx %zu\n", hex(address), bytes);
  return fails("cuMemcpyHtoD") ? kIllegalAddress : 0;
}

int cuMemcpyDtoH_v2(void *target, std::uint64_t address, std::size_t bytes) {
  if (!owned(address, bytes)) return kIllegalAddress;
  std::memcpy(target, reinterpret_cast<void *>(address), bytes);
  return 0;
}

int cuMemcpyDtoHAsync_v2(void *target, std::uint64_t address, std::size_t bytes, void *) {
  if (quiet) std::memset(target, 0xA5, bytes);
  if (quiet) return 0;
  return fails("cuMemcpyDtoHAsync") ? kIllegalAddress : cuMemcpyDtoH_v2(target, address, bytes);
}

int cuMemsetD32Async(std::uint64_t address, unsigned word, std::size_t count, void *stream) {
  if (quiet) return 0;
  if (fails("cuMemsetD32Async") || !owned(address, 4 * count)) return kIllegalAddress;
  for (std::size_t i = 0; i < count; ++i) std::memcpy(reinterpret_cast<void *>(address + 4 * i), &word, 4);
  record("memset %llx %x %zu %p\n", hex(address), word, count, stream);
  return 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **) {
  if (fails("cuLaunchKernel")) return kIllegalAddress;
  const auto *launched = static_cast<Function *>(function);
  record("launch %zu %u,%u,%u %u,%u,%u %u %p", launched->number, gx, gy, gz, bx, by, bz, shared, stream);
  for (std::size_t i = 0; i < launched->sizes.size(); ++i) {
    std::uint64_t value = 0;
    std::memcpy(&value, arguments[i], launched->sizes[i]);
    record(" %u:%llx", launched->sizes[i], hex(value));
  }
  record("\n");
  return 0;
}

int cuStreamSynchronize(void *) { return fails("cuStreamSynchronize") ? kIllegalAddress : 0; }

// A graph is a mark in the log: what it captured was recorded when it was enqueued. Every event is a millisecond apart.
int cuStreamBeginCapture_v2(void *stream, int) {
  record("capture %p\n", stream);
  return 0;
}
int cuStreamEndCapture(void *, void **graph) {
  record("captured\n");
  *graph = &context_marker;
  return 0;
}
int cuGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long) {
  *ready = graph;
  return 0;
}
int cuGraphLaunch(void *, void *) {
  record("graph\n");
  return 0;
}
int cuGraphExecDestroy(void *) { return 0; }
int cuGraphDestroy(void *) { return 0; }
int cuEventCreate(void **event, unsigned) {
  *event = &context_marker;
  return 0;
}
int cuEventDestroy_v2(void *) { return 0; }
int cuEventRecord(void *, void *) { return 0; }
int cuEventSynchronize(void *) { return 0; }
int cuEventElapsedTime(float *milliseconds, void *, void *) {
  *milliseconds = 1;
  return 0;
}

}  // extern "C"
