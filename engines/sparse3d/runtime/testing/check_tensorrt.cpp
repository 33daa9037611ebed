// Walks the plugin through what TensorRT does with it: found, created from a file, asked, serialised, created again from
// its own field, attached, enqueued.
//
//     dm3d_check_tensorrt PLAN SITES       the second plan with an output of 64-bit cells, with the stand-in libcuda before others on LD_LIBRARY_PATH
#include <NvInfer.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "driver.hpp"
#include "dm3d_plan.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface *const *getCreators(int32_t &count);

namespace {

int failures = 0;

void expect(bool right, const char *what) {
  if (!right) std::printf("failed: %s (last error: %s)\n", what, dm3d_last_error());
  failures += !right;
}

struct Number final : IDimensionExpr {
  explicit Number(int64_t v) : value(v) {}
  int64_t getConstantValue() const noexcept override { return value; }
  int64_t value;
};
struct Builder final : IExprBuilder {
  IDimensionExpr const *constant(int64_t value) noexcept override {
    made.push_back(std::make_unique<Number>(value));
    return made.back().get();
  }
  std::vector<std::unique_ptr<Number>> made;
};

using Plugin = std::unique_ptr<IPluginV3>;

Plugin created(IPluginCreatorV3One &creator, const PluginField &field) {
  const PluginFieldCollection fields{1, &field};
  return Plugin(creator.createPlugin("backbone_3d", &fields, TensorRTPhase::kBUILD));
}

template <class Interface>
Interface &part(const Plugin &plugin, PluginCapabilityType type) {
  return *static_cast<Interface *>(plugin->getCapabilityInterface(type));
}

void check_build(const Plugin &plugin) {
  auto &core = part<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  expect(std::string(core.getPluginNamespace()) + core.getPluginName() + core.getPluginVersion() ==
             "dm3dSparseBackbone3d1",
         "the name of the node");
  auto &build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  expect(build.getNbOutputs() == 2, "bev and status");
  DataType types[2];
  expect(build.getOutputDataTypes(types, 2, nullptr, 0) == 0 && types[0] == DataType::kHALF &&
             types[1] == DataType::kINT32,
         "types of the outputs");
  DimsExprs shapes[2];
  Builder builder;
  expect(build.getOutputShapes(nullptr, 0, nullptr, 0, shapes, 2, builder) == 0 && shapes[0].nbDims == 4 &&
             shapes[0].d[1]->getConstantValue() == 2 && shapes[1].nbDims == 1 && shapes[1].d[0]->getConstantValue() == 4,
         "shapes of the outputs");
  expect(build.getWorkspaceSize(nullptr, 0, nullptr, 0) == 1500, "the workspace");
  expect(build.configurePlugin(nullptr, 1, nullptr, 2) == 0, "one input, two outputs");
  expect(build.configurePlugin(nullptr, 2, nullptr, 1) != 0, "another number of tensors");
  DynamicPluginTensorDesc tensors[3] = {};
  tensors[0].desc.type = DataType::kFLOAT;
  tensors[1].desc.type = DataType::kHALF;
  expect(build.supportsFormatCombination(0, tensors, 1, 2) && build.supportsFormatCombination(1, tensors, 1, 2),
         "linear tensors of the plan's types");
  tensors[1].desc.format = TensorFormat::kCHW2;
  tensors[2].desc.type = DataType::kFLOAT;
  expect(!build.supportsFormatCombination(1, tensors, 1, 2) && !build.supportsFormatCombination(2, tensors, 1, 2),
         "another format and another type");
}

void check_sites(const Plugin &plugin) {
  auto &build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  DataType types[3];
  expect(build.getNbOutputs() == 3 && build.getOutputDataTypes(types, 3, nullptr, 0) == 0 &&
             types[1] == DataType::kINT32 && types[2] == DataType::kINT64,
         "cells of 64 bits beside the status");
}

void check_run(const Plugin &plugin) {
  const dm3d::Driver driver;
  auto &runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  expect(Plugin(runtime.attachToContext(nullptr)) == nullptr, "nothing is attached without a context");
  dm3d::CUhandle context = nullptr;
  driver.cuDevicePrimaryCtxRetain(&context, 0);
  driver.cuCtxSetCurrent(context);
  const Plugin attached(runtime.attachToContext(nullptr));
  expect(attached != nullptr, "attached to a context");
  if (!attached) return;
  void *memory[4];
  for (int i = 0; i < 4; ++i) {
    dm3d::CUdeviceptr address = 0;
    driver.cuMemAlloc(&address, i == 3 ? 1500 : 48);
    memory[i] = reinterpret_cast<void *>(address);
  }
  auto &run = part<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
  expect(run.onShapeChange(nullptr, 1, nullptr, 2) == 0, "shapes are static");
  expect(run.enqueue(nullptr, nullptr, memory, memory + 1, memory[3], nullptr) == 0, "enqueued");
  expect(run.enqueue(nullptr, nullptr, memory, memory + 1, nullptr, nullptr) != 0, "no workspace");
  for (void *address : memory) driver.cuMemFree(reinterpret_cast<dm3d::CUdeviceptr>(address));
}

}  // namespace

int main(int count, char **words) {
  if (count != 3) return 2;
  int32_t creators = 0;
  auto &creator = *static_cast<IPluginCreatorV3One *>(getCreators(creators)[0]);
  expect(creators == 1 && creator.getFieldNames()->nbFields == 2, "one creator with two fields");
  const std::string path = words[1];
  const PluginField file("plan_file", path.data(), PluginFieldType::kCHAR, static_cast<int32_t>(path.size()));
  const Plugin plugin = created(creator, file);
  expect(plugin != nullptr, "created from a file");
  if (!plugin) return 1;
  check_build(plugin);
  const std::string sites = words[2];
  check_sites(created(creator, PluginField("plan_file", sites.data(), PluginFieldType::kCHAR,
                                           static_cast<int32_t>(sites.size()))));
  auto &runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  const Plugin again = created(creator, runtime.getFieldsToSerialize()->fields[0]);
  expect(again != nullptr, "created from its own field");
  const Plugin copy(again->clone());
  check_run(copy);
  expect(created(creator, PluginField("plan_file", "nowhere", PluginFieldType::kCHAR, 7)) == nullptr, "no such file");
  expect(created(creator, PluginField("plan", "DM3DPLAN", PluginFieldType::kINT8, 8)) == nullptr, "no plan");
  expect(created(creator, PluginField("grid", nullptr, PluginFieldType::kINT32, 0)) == nullptr, "no field of ours");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
