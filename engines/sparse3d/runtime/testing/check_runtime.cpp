// Every refusal of the C interface but those of damaged files, which fuzz_plan.cpp makes.
//
//     dm3d_check_runtime PLAN        with the stand-in libcuda before others on LD_LIBRARY_PATH
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <vector>

#include "dm3d_plan.h"
#include "driver.hpp"
#include "plan_data.hpp"
#include "sha256.hpp"

namespace {

int failures = 0, checks = 0;

void expect(bool right, const char *what) {
  ++checks;
  if (right) return;
  ++failures;
  std::printf("failed: %s (last error: %s)\n", what, dm3d_last_error());
}

void expect(dm3d_result found, dm3d_result wanted, const char *sentence, const char *what) {
  expect(found == wanted && std::strstr(dm3d_last_error(), sentence) != nullptr, what);
}

dm3d_result enqueue(dm3d_plan *plan, const std::vector<void *> &bindings, void *workspace, std::uint64_t bytes) {
  return dm3d_plan_enqueue(plan, nullptr, bindings.data(), static_cast<std::uint32_t>(bindings.size()), workspace, bytes);
}

dm3d_result with_failure(const char *function, dm3d_result (*call)(dm3d_plan *), dm3d_plan *plan) {
  setenv("DM3D_CUDA_FAIL", function, 1);
  const dm3d_result result = call(plan);
  unsetenv("DM3D_CUDA_FAIL");
  return result;
}

void check_digest() {
  static constexpr std::uint8_t abc[] = {0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40,
                                         0xde, 0x5d, 0xae, 0x22, 0x23, 0xb0, 0x03, 0x61, 0xa3, 0x96, 0x17,
                                         0x7a, 0x9c, 0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad};
  dm3d::Sha256 sha;
  sha.update("abc", 3);
  expect(std::memcmp(sha.finish().data(), abc, sizeof abc) == 0, "SHA-256 of abc is that of FIPS 180-4");
}

void check_loading(const std::vector<char> &bytes) {
  dm3d_plan *plan = nullptr;
  expect(dm3d_plan_load(nullptr, 4, &plan), DM3D_BAD_ARGUMENT, "bytes are null", "null bytes");
  expect(dm3d_plan_load(bytes.data(), bytes.size(), nullptr), DM3D_BAD_ARGUMENT, "place for the plan", "null place");
  expect(dm3d_plan_load(bytes.data(), std::numeric_limits<std::size_t>::max() / 2 + 1, &plan), DM3D_BAD_ARGUMENT,
         "larger than any plan", "a size beyond memory");
  expect(dm3d_plan_load(bytes.data(), 10, &plan), DM3D_BAD_PLAN, "10 bytes do not begin", "ten bytes");
  expect(dm3d_plan_load(nullptr, 0, &plan), DM3D_BAD_PLAN, "its 0 bytes do not begin", "an empty file");
  expect(dm3d_plan_load(bytes.data(), bytes.size() - 1, &plan), DM3D_BAD_PLAN, "it should have", "one byte short");
  expect(plan == nullptr, "no plan comes of a refused file");
  std::vector<char> newer = bytes;
  newer[12] = 7;
  expect(dm3d_plan_load(newer.data(), newer.size(), &plan), DM3D_NEWER_PLAN, "reader of version 7", "a newer plan");
  expect(dm3d_plan_prepare(nullptr), DM3D_BAD_ARGUMENT, "plan is null", "prepare nothing");
  dm3d_plan_destroy(nullptr);
}

void check_preparing(dm3d_plan *plan) {
  expect(enqueue(plan, {}, nullptr, 0), DM3D_NOT_PREPARED, "prepare has not", "enqueue before prepare");
  expect(dm3d_plan_prepare(plan), DM3D_NO_DRIVER, "no CUDA context is current", "no context");
  const dm3d::Driver driver;
  dm3d::CUhandle context = nullptr;
  driver.cuDevicePrimaryCtxRetain(&context, 0);
  driver.cuCtxSetCurrent(context);
  setenv("DM3D_CUDA_SM", "90", 1);
  expect(dm3d_plan_prepare(plan), DM3D_NO_IMAGE, "this GPU is sm_90, the plan holds kernels for: sm_", "another GPU");
  unsetenv("DM3D_CUDA_SM");
  const char *calls[] = {"cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuMemAlloc", "cuMemcpyHtoD"};
  for (const char *name : calls)
    expect(with_failure(name, dm3d_plan_prepare, plan), DM3D_DRIVER_ERROR, "failed with CUDA_ERROR_", name);
  expect(with_failure("cuInit", dm3d_plan_prepare, plan), DM3D_DRIVER_ERROR, "cuInit failed with", "cuInit");
  expect(dm3d_plan_prepare(plan) == DM3D_OK, "prepare after failures");
  expect(dm3d_plan_prepare(plan) == DM3D_OK, "prepare again");
}

void check_bindings(dm3d_plan *plan) {
  dm3d_binding binding;
  expect(dm3d_plan_binding(plan, 0, &binding) == DM3D_OK && std::strcmp(binding.name, "features") == 0 &&
             std::strcmp(binding.dtype, "fp32") == 0 && binding.rank == 2 && binding.shape[0] == 4 &&
             binding.shape[1] == 3 && binding.bytes == 48 && !binding.is_output,
         "the first binding");
  expect(dm3d_plan_binding(plan, 1, &binding) == DM3D_OK && binding.is_output, "the second binding");
  expect(dm3d_plan_binding(plan, 3, &binding), DM3D_BAD_ARGUMENT, "no such binding", "a binding too many");
  expect(dm3d_plan_binding(plan, 0, nullptr), DM3D_BAD_ARGUMENT, "the place for the binding is null", "null place");
  expect(dm3d_plan_workspace_bytes(plan) == 1500 && dm3d_plan_workspace_bytes(nullptr) == 0, "workspace bytes");
  expect(dm3d_plan_binding_count(plan) == 3 && dm3d_plan_binding_count(nullptr) == 0, "count of bindings");
}

std::vector<void *> device;  // features, bev, status, workspace

void check_enqueueing(dm3d_plan *plan) {
  const dm3d::Driver driver;
  for (const std::size_t bytes : {48, 48, 16, 1500}) {
    dm3d::CUdeviceptr address = 0;
    driver.cuMemAlloc(&address, bytes);
    device.push_back(reinterpret_cast<void *>(address));
  }
  const std::vector<void *> bound(device.begin(), device.begin() + 3);
  expect(enqueue(plan, bound, device[3], 1500) == DM3D_OK, "enqueue");
  expect(enqueue(nullptr, bound, device[3], 1500), DM3D_BAD_ARGUMENT, "plan is null", "enqueue nothing");
  expect(enqueue(plan, {bound[0]}, device[3], 1500), DM3D_BAD_ARGUMENT, "1 bindings were given where the plan has 3",
         "one binding");
  expect(dm3d_plan_enqueue(plan, nullptr, nullptr, 3, device[3], 1500), DM3D_BAD_ARGUMENT, "bindings are null",
         "null bindings");
  expect(enqueue(plan, bound, device[3], 1499), DM3D_BAD_ARGUMENT, "smaller than 1500 bytes", "a small workspace");
  expect(enqueue(plan, bound, nullptr, 1500), DM3D_BAD_ARGUMENT, "workspace is null", "a null workspace");
  expect(enqueue(plan, bound, static_cast<char *>(device[3]) + 16, 1500), DM3D_BAD_ARGUMENT, "not aligned to 256",
         "a workspace that is not aligned");
  expect(enqueue(plan, {bound[0], static_cast<char *>(bound[1]) + 4, bound[2]}, device[3], 1500), DM3D_BAD_ARGUMENT,
         "the address of 'bev' is null or not aligned to 16", "a binding that is not aligned");
  expect(enqueue(plan, {bound[0], bound[1], nullptr}, device[3], 1500), DM3D_BAD_ARGUMENT, "address of 'status'",
         "a null binding");
  const auto again = [](dm3d_plan *p) { return enqueue(p, {device[0], device[1], device[2]}, device[3], 1500); };
  expect(with_failure("cuLaunchKernel", again, plan), DM3D_DRIVER_ERROR, "the launch of scale/64 failed with", "launch");
  expect(with_failure("cuMemsetD32Async", again, plan), DM3D_DRIVER_ERROR, "cuMemsetD32Async failed", "memset");
}

void check_status(dm3d_plan *plan) {
  dm3d_status status;
  const auto read = [&](std::int32_t input, std::int32_t conv2, std::int32_t outside, float range) {
    std::int32_t words[4] = {input, conv2, outside, 0};
    std::memcpy(&words[3], &range, sizeof range);
    std::memcpy(device[2], words, sizeof words);
    return dm3d_plan_status(plan, nullptr, device.data(), 3, device[3], 1500, &status);
  };
  expect(read(100, 60, 0, 0.0f) == DM3D_OK && status.flags == 0 && status.word_count == 4, "exactly full capacity");
  expect(std::strcmp(status.words[1].name, "conv2") == 0 && status.words[1].count == 60 &&
             status.words[1].capacity == 60 && status.words[1].kind == DM3D_COUNT,
         "a count");
  expect(read(0, 0, 0, 0.0f) == DM3D_OK && status.flags == 0, "an empty frame");
  expect(read(100, 61, 0, 0.0f) == DM3D_OK && status.flags == DM3D_FLAG_OVERFLOW && status.words[1].count == 61,
         "over capacity");
  expect(read(-1, 0, 0, 0.0f) == DM3D_OK && status.flags == DM3D_FLAG_OVERFLOW, "a negative count");
  expect(read(1, 1, 3, 0.0f) == DM3D_OK && status.flags == DM3D_FLAG_DROPPED && status.words[2].count == 3, "dropped");
  expect(read(101, 1, 3, 47.5f) == DM3D_OK && status.flags == 7 && status.words[3].metres == 47.5f, "cut off");
  const auto again = [](dm3d_plan *p) {
    dm3d_status ignored;
    return dm3d_plan_status(p, nullptr, device.data(), 3, device[3], 1500, &ignored);
  };
  for (const char *name : {"cuMemcpyDtoHAsync", "cuStreamSynchronize"})
    expect(with_failure(name, again, plan), DM3D_DRIVER_ERROR, "failed with CUDA_ERROR_ILLEGAL_ADDRESS", name);
  expect(dm3d_plan_status(plan, nullptr, device.data(), 3, device[3], 1500, nullptr), DM3D_BAD_ARGUMENT,
         "the place for the status is null", "null status");
}

}  // namespace

int main(int count, char **words) {
  if (count != 2) return 2;
  std::ifstream input(words[1], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(input), std::istreambuf_iterator<char>()};
  check_digest();
  check_loading(bytes);
  dm3d_plan *plan = nullptr;
  expect(dm3d_plan_load(bytes.data(), bytes.size(), &plan) == DM3D_OK, "load");
  check_preparing(plan);
  check_bindings(plan);
  check_enqueueing(plan);
  check_status(plan);
  const dm3d::Driver driver;
  for (void *address : device) driver.cuMemFree(reinterpret_cast<dm3d::CUdeviceptr>(address));
  dm3d_plan_destroy(plan);
  for (int result = 0; result <= 9; ++result)
    expect(std::strlen(dm3d_result_text(static_cast<dm3d_result>(result))) > 3, "a sentence for each result");
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
