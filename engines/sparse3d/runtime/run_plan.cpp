// Example: runs frames from files through a plan and writes what comes out.
//
//     dm3d_run_plan PLAN OUT FRAME...
//
// FRAME is a folder with one raw file per input, <name>.bin, of exactly the bytes that the plan says. Each output lands
// in OUT/<frame>/<name>.bin, and each status word in a line of standard output: `count conv2=61 capacity=60`, `dropped
// outside the grid=3`, `cutoff_m cut-off=47.5`. Without frames the plan is described, which needs no GPU.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "dm3d_plan.h"
#include "driver.hpp"
#include "plan_data.hpp"

namespace fs = std::filesystem;

namespace {

void need(dm3d_result result) {
  if (result != DM3D_OK) dm3d::refuse(result, "%s: %s", dm3d_result_text(result), dm3d_last_error());
}

std::vector<char> read_file(const fs::path &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) dm3d::refuse(DM3D_BAD_ARGUMENT, "%s cannot be read", path.c_str());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

class Run {
 public:
  Run(dm3d_plan *plan, fs::path out) : plan_(plan), out_(std::move(out)) {
    dm3d::CUdevice device = 0;
    dm3d::CUhandle context = nullptr;
    driver_.check(driver_.cuDeviceGet(&device, 0), "cuDeviceGet");
    driver_.check(driver_.cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    driver_.check(driver_.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    driver_.check(driver_.cuStreamCreate(&stream_, 0), "cuStreamCreate");
    need(dm3d_plan_prepare(plan_));
    for (std::uint32_t i = 0; i < dm3d_plan_binding_count(plan_); ++i) {
      dm3d_binding binding;
      need(dm3d_plan_binding(plan_, i, &binding));
      bindings_.push_back(binding);
      addresses_.push_back(device_memory(binding.bytes));
    }
    workspace_ = device_memory(dm3d_plan_workspace_bytes(plan_));
  }
  Run(const Run &) = delete;
  Run &operator=(const Run &) = delete;
  ~Run() {
    for (void *address : owned_) driver_.cuMemFree(reinterpret_cast<dm3d::CUdeviceptr>(address));
  }

  void frame(const fs::path &folder) {
    for (std::size_t i = 0; i < bindings_.size(); ++i)
      if (!bindings_[i].is_output) upload(folder, i);
    const auto count = static_cast<std::uint32_t>(addresses_.size());
    const std::uint64_t workspace_bytes = dm3d_plan_workspace_bytes(plan_);
    need(dm3d_plan_enqueue(plan_, stream_, addresses_.data(), count, workspace_, workspace_bytes));
    dm3d_status status;
    need(dm3d_plan_status(plan_, stream_, addresses_.data(), count, workspace_, workspace_bytes, &status));
    const fs::path target = out_ / folder.filename();
    fs::create_directories(target);
    for (std::size_t i = 0; i < bindings_.size(); ++i)
      if (bindings_[i].is_output) download(target, i);
    print(folder, status);
  }

 private:
  void *device_memory(std::uint64_t bytes) {
    if (bytes == 0) return nullptr;
    dm3d::CUdeviceptr address = 0;
    driver_.check(driver_.cuMemAlloc(&address, bytes), "cuMemAlloc");
    owned_.push_back(reinterpret_cast<void *>(address));
    return owned_.back();
  }

  void upload(const fs::path &folder, std::size_t index) {
    const fs::path path = folder / (std::string(bindings_[index].name) + ".bin");
    const std::vector<char> data = read_file(path);
    if (data.size() != bindings_[index].bytes)
      dm3d::refuse(DM3D_BAD_ARGUMENT, "%s has %zu bytes where the plan wants %llu", path.c_str(), data.size(),
                   static_cast<unsigned long long>(bindings_[index].bytes));
    const auto address = reinterpret_cast<dm3d::CUdeviceptr>(addresses_[index]);
    driver_.check(driver_.cuMemcpyHtoD(address, data.data(), data.size()), "cuMemcpyHtoD");
  }

  void download(const fs::path &folder, std::size_t index) {
    std::vector<char> data(bindings_[index].bytes);
    const auto address = reinterpret_cast<dm3d::CUdeviceptr>(addresses_[index]);
    driver_.check(driver_.cuMemcpyDtoH(data.data(), address, data.size()), "cuMemcpyDtoH");
    std::ofstream file(folder / (std::string(bindings_[index].name) + ".bin"), std::ios::binary);
    file.write(data.data(), static_cast<std::streamsize>(data.size()));
    if (!file.flush()) dm3d::refuse(DM3D_BAD_ARGUMENT, "%s cannot be written", folder.c_str());
  }

  static void print(const fs::path &folder, const dm3d_status &status) {
    std::printf("%s flags=%u\n", folder.filename().c_str(), status.flags);
    for (std::uint32_t i = 0; i < status.word_count; ++i) {
      const dm3d_status_word &word = status.words[i];
      if (word.kind == DM3D_CUTOFF_M)
        std::printf("  cutoff_m %s=%g\n", word.name, static_cast<double>(word.metres));
      else if (word.kind == DM3D_DROPPED)
        std::printf("  dropped %s=%d\n", word.name, word.count);
      else
        std::printf("  count %s=%d capacity=%llu\n", word.name, word.count,
                    static_cast<unsigned long long>(word.capacity));
    }
  }

  dm3d_plan *plan_;
  fs::path out_;
  dm3d::Driver driver_;
  dm3d::CUhandle stream_ = nullptr;
  std::vector<dm3d_binding> bindings_;
  std::vector<void *> addresses_, owned_;
  void *workspace_ = nullptr;
};

void describe(const dm3d_plan *plan) {
  std::printf("workspace %llu bytes\n", static_cast<unsigned long long>(dm3d_plan_workspace_bytes(plan)));
  for (std::uint32_t i = 0; i < dm3d_plan_binding_count(plan); ++i) {
    dm3d_binding binding;
    need(dm3d_plan_binding(plan, i, &binding));
    std::printf("%s %s %s %llu bytes\n", binding.is_output ? "output" : "input", binding.name, binding.dtype,
                static_cast<unsigned long long>(binding.bytes));
  }
}

int run(int count, char **words) {
  const std::vector<char> bytes = read_file(words[1]);
  dm3d_plan *plan = nullptr;
  need(dm3d_plan_load(bytes.data(), bytes.size(), &plan));
  const struct Owner {
    dm3d_plan *plan;
    ~Owner() { dm3d_plan_destroy(plan); }
  } owner{plan};
  if (count == 2) {
    describe(plan);
    return 0;
  }
  Run frames(plan, words[2]);
  for (int i = 3; i < count; ++i) frames.frame(words[i]);
  return 0;
}

}  // namespace

int main(int count, char **words) {
  if (count != 2 && count < 4) {
    std::fprintf(stderr, "usage: %s PLAN [OUT FRAME...]\n", words[0]);
    return 2;
  }
  try {
    return run(count, words);
  } catch (const dm3d::Refusal &refusal) {
    std::fprintf(stderr, "%s\n", refusal.what.c_str());
    return 10 + refusal.result;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
