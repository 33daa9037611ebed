#include "dm3d_plan.h"

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "driver.hpp"
#include "plan_data.hpp"

using dm3d::refuse;

struct dm3d_plan {
  dm3d_plan(const void *bytes, size_t size)
      : data(bytes, size), bases(data.buffers.size()), raw(data.words.size()), words(data.words.size()) {}
  dm3d_plan(const dm3d_plan &) = delete;
  dm3d_plan &operator=(const dm3d_plan &) = delete;
  ~dm3d_plan() { release(); }

  void prepare();
  void release() noexcept;
  void place(void *const *bindings, uint32_t count, void *workspace, uint64_t workspace_bytes);
  void launch(const dm3d::Step &step, dm3d_stream stream);

  struct Function {
    dm3d::CUhandle handle;
    unsigned threads, shared, hidden;
  };

  const dm3d::PlanData data;
  std::unique_ptr<const dm3d::Driver> driver;
  std::vector<dm3d::CUhandle> modules;
  std::vector<Function> functions;
  dm3d::CUdeviceptr constants = 0;
  std::vector<dm3d::CUdeviceptr> bases;  // of each buffer, in this call
  std::vector<uint32_t> raw;
  std::vector<dm3d_status_word> words;
  bool prepared = false;
};

namespace {

thread_local char last_error[256] = "";

dm3d_result told(dm3d_result result, const char *what) {
  std::strncpy(last_error, what, sizeof last_error - 1);
  return result;
}

// Every call of the C interface passes here: what was thrown becomes a result.
template <class Call>
dm3d_result guarded(const Call &call) noexcept {
  try {
    call();
    return DM3D_OK;
  } catch (const dm3d::Refusal &refusal) {
    return told(refusal.result, refusal.what.c_str());
  } catch (const std::bad_alloc &) {
    return told(DM3D_OUT_OF_MEMORY, "no host memory is left");
  }
}

void need(bool given, const char *what) {
  if (!given) refuse(DM3D_BAD_ARGUMENT, "%s", what);
}

bool is_aligned(const void *address, std::size_t alignment) {
  return address != nullptr && reinterpret_cast<std::uintptr_t>(address) % alignment == 0;
}

}  // namespace

void dm3d_plan::prepare() {
  if (prepared) return;
  release();
  driver = std::make_unique<const dm3d::Driver>();
  dm3d::CUhandle context = nullptr;
  driver->check(driver->cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (context == nullptr) refuse(DM3D_NO_DRIVER, "no CUDA context is current on this thread");
  dm3d::CUdevice device = 0;
  int major = 0, minor = 0;
  driver->check(driver->cuCtxGetDevice(&device), "cuCtxGetDevice");
  driver->check(driver->cuDeviceGetAttribute(&major, dm3d::kMajorAttribute, device), "cuDeviceGetAttribute");
  driver->check(driver->cuDeviceGetAttribute(&minor, dm3d::kMinorAttribute, device), "cuDeviceGetAttribute");
  const auto sm = static_cast<std::uint32_t>(major * 10 + minor);
  if (!data.has_images(sm))
    refuse(DM3D_NO_IMAGE, "this GPU is sm_%u, the plan holds kernels for: %s", sm, data.architectures().c_str());
  for (const auto &image : data.images(sm)) {
    dm3d::CUhandle module = nullptr;
    Function function{nullptr, image.threads, image.shared, image.hidden};
    const std::vector<std::uint8_t> aligned(image.bytes.data, image.bytes.data + image.bytes.size);
    driver->check(driver->cuModuleLoadData(&module, aligned.data()), "cuModuleLoadData");
    modules.push_back(module);
    driver->check(driver->cuModuleGetFunction(&function.handle, module, image.symbol.c_str()), "cuModuleGetFunction");
    if (image.shared > 48 * 1024)
      driver->check(driver->cuFuncSetAttribute(function.handle, dm3d::kMaxDynamicSharedAttribute,
                                               static_cast<int>(image.shared)),
                    "cuFuncSetAttribute");
    functions.push_back(function);
  }
  if (data.constants.size > 0) {
    driver->check(driver->cuMemAlloc(&constants, data.constants.size), "cuMemAlloc");
    driver->check(driver->cuMemcpyHtoD(constants, data.constants.data, data.constants.size), "cuMemcpyHtoD");
  }
  prepared = true;
}

void dm3d_plan::release() noexcept {
  for (dm3d::CUhandle module : modules) driver->cuModuleUnload(module);
  if (constants != 0) driver->cuMemFree(constants);
  modules.clear();
  functions.clear();
  constants = 0;
  prepared = false;
}

void dm3d_plan::place(void *const *bindings, uint32_t count, void *workspace, uint64_t workspace_bytes) {
  if (!prepared) refuse(DM3D_NOT_PREPARED, "dm3d_plan_prepare has not succeeded");
  if (count != data.bindings.size())
    refuse(DM3D_BAD_ARGUMENT, "%u bindings were given where the plan has %zu", count, data.bindings.size());
  need(count == 0 || bindings != nullptr, "the bindings are null");
  if (workspace_bytes < data.workspace_bytes || (data.workspace_bytes > 0 && !is_aligned(workspace, dm3d::kAlignment)))
    refuse(DM3D_BAD_ARGUMENT, "the workspace is null, not aligned to 256 or smaller than %llu bytes",
           static_cast<unsigned long long>(data.workspace_bytes));
  for (std::size_t i = 0; i < bases.size(); ++i) {
    const dm3d::Buffer buffer = data.buffers[i];
    bases[i] = (buffer.kind == dm3d::kConstant ? constants : reinterpret_cast<std::uintptr_t>(workspace)) + buffer.offset;
  }
  for (uint32_t i = 0; i < count; ++i) {
    if (!is_aligned(bindings[i], dm3d::kPointerAlignment))
      refuse(DM3D_BAD_ARGUMENT, "the address of '%s' is null or not aligned to 16", data.binding_names[i].c_str());
    bases[data.bindings[i].buffer] = reinterpret_cast<std::uintptr_t>(bindings[i]);
  }
}

void dm3d_plan::launch(const dm3d::Step &step, dm3d_stream stream) {
  std::uint64_t values[dm3d::kMaxArgs + dm3d::kMaxHidden] = {};  // what Triton hides at the end stays null
  void *pointers[dm3d::kMaxArgs + dm3d::kMaxHidden];
  const Function &function = functions[step.index];
  for (std::size_t i = 0; i < step.count + function.hidden; ++i) pointers[i] = &values[i];
  for (std::size_t i = 0; i < step.count; ++i) {
    const dm3d::Arg arg = data.args[step.first + i];
    values[i] = arg.kind == dm3d::kPointer ? bases[arg.buffer] + arg.value : arg.value;
  }
  const dm3d::CUresult code =
      driver->cuLaunchKernel(function.handle, step.grid[0], step.grid[1], step.grid[2], function.threads, 1, 1,
                             function.shared, stream, pointers, nullptr);
  if (code != 0) driver->check(code, ("the launch of " + data.kernel_name(step.index)).c_str());
}

dm3d_result dm3d_plan_load(const void *bytes, size_t size, dm3d_plan **plan) {
  return guarded([&] {
    need(plan != nullptr, "the place for the plan is null");
    *plan = nullptr;
    need(bytes != nullptr || size == 0, "the plan's bytes are null");  // an empty file is a truncated one
    need(size <= dm3d::kMaxBytes, "the plan's size is larger than any plan");
    *plan = new dm3d_plan(bytes, size);
  });
}

dm3d_result dm3d_plan_prepare(dm3d_plan *plan) {
  return guarded([&] {
    need(plan != nullptr, "the plan is null");
    plan->prepare();
  });
}

uint64_t dm3d_plan_workspace_bytes(const dm3d_plan *plan) { return plan ? plan->data.workspace_bytes : 0; }

uint32_t dm3d_plan_binding_count(const dm3d_plan *plan) {
  return plan ? static_cast<uint32_t>(plan->data.bindings.size()) : 0;
}

dm3d_result dm3d_plan_binding(const dm3d_plan *plan, uint32_t index, dm3d_binding *binding) {
  return guarded([&] {
    need(plan != nullptr && binding != nullptr, "the plan or the place for the binding is null");
    need(index < plan->data.bindings.size(), "there is no such binding");
    const dm3d::Binding found = plan->data.bindings[index];
    *binding = {plan->data.binding_names[index].c_str(), dm3d::name_of_dtype(found.dtype), static_cast<int>(found.output),
                found.rank, {}, dm3d::bytes_of_binding(found)};
    std::memcpy(binding->shape, found.shape, sizeof found.shape);
  });
}

dm3d_result dm3d_plan_enqueue(dm3d_plan *plan, dm3d_stream stream, void *const *bindings, uint32_t count,
                              void *workspace, uint64_t workspace_bytes) {
  return guarded([&] {
    need(plan != nullptr, "the plan is null");
    plan->place(bindings, count, workspace, workspace_bytes);
    for (std::size_t i = 0; i < plan->data.steps.size(); ++i) {
      const dm3d::Step step = plan->data.steps[i];
      if (step.op == dm3d::kLaunch) {
        plan->launch(step, stream);
      } else {
        const dm3d::CUdeviceptr at = plan->bases[step.index] + step.first;
        plan->driver->check(plan->driver->cuMemsetD32Async(at, step.count, step.bytes / 4, stream), "cuMemsetD32Async");
      }
    }
  });
}

dm3d_result dm3d_plan_status(dm3d_plan *plan, dm3d_stream stream, void *const *bindings, uint32_t count,
                             void *workspace, uint64_t workspace_bytes, dm3d_status *status) {
  return guarded([&] {
    need(plan != nullptr && status != nullptr, "the plan or the place for the status is null");
    plan->place(bindings, count, workspace, workspace_bytes);
    *status = {0, static_cast<uint32_t>(plan->words.size()), plan->words.data()};
    const dm3d::Driver &driver = *plan->driver;
    if (!plan->raw.empty())
      driver.check(driver.cuMemcpyDtoHAsync(plan->raw.data(),
                                            plan->bases[plan->data.status.buffer] + plan->data.status.offset,
                                            4 * plan->raw.size(), stream),
                   "cuMemcpyDtoHAsync");
    driver.check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
    for (std::size_t i = 0; i < plan->words.size(); ++i) {
      const dm3d::Word word = plan->data.words[i];
      dm3d_status_word &out = plan->words[i];
      out = {plan->data.word_names[i].c_str(), static_cast<dm3d_word_kind>(word.kind), 0, 0.0f, word.capacity};
      if (word.kind == DM3D_CUTOFF_M) {
        std::memcpy(&out.metres, &plan->raw[i], sizeof out.metres);
        if (out.metres != 0.0f) status->flags |= DM3D_FLAG_CUT_OFF;
        continue;
      }
      std::memcpy(&out.count, &plan->raw[i], sizeof out.count);
      const bool over = out.count < 0 || static_cast<uint64_t>(out.count) > word.capacity;
      if (word.kind == DM3D_COUNT && over) status->flags |= DM3D_FLAG_OVERFLOW;
      if (word.kind == DM3D_DROPPED && out.count != 0) status->flags |= DM3D_FLAG_DROPPED;
    }
  });
}

void dm3d_plan_destroy(dm3d_plan *plan) { delete plan; }

const char *dm3d_result_text(dm3d_result result) {
  switch (result) {
    case DM3D_OK: return "done";
    case DM3D_BAD_ARGUMENT: return "an argument of the call is wrong";
    case DM3D_BAD_PLAN: return "the plan file is truncated, changed or contradicts itself";
    case DM3D_NEWER_PLAN: return "the plan file needs a newer runtime";
    case DM3D_NO_IMAGE: return "the plan holds no kernels for this GPU";
    case DM3D_NO_DRIVER: return "there is no usable CUDA driver or no current context";
    case DM3D_DRIVER_ERROR: return "the CUDA driver refused a call";
    case DM3D_OUT_OF_MEMORY: return "no host memory is left";
    case DM3D_NOT_PREPARED: return "the plan is not prepared";
  }
  return "unknown result";
}

const char *dm3d_last_error(void) { return last_error; }
