// The node dm3d::SparseBackbone3d as a TensorRT plugin: IPluginV3 around the C interface, TensorRT 10.0 to 11.x.
//
// The ONNX node names its plan by the attribute `plan_file`; the engine carries the plan itself, as the field `plan`.
#include <NvInfer.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dm3d_plan.h"

namespace {

using namespace nvinfer1;
using Blob = std::shared_ptr<const std::vector<char>>;
using Plan = std::unique_ptr<dm3d_plan, decltype(&dm3d_plan_destroy)>;

constexpr char kName[] = "SparseBackbone3d", kVersion[] = "1", kNamespace[] = "dm3d";
constexpr std::pair<const char *, DataType> kTypes[] = {{"fp32", DataType::kFLOAT}, {"fp16", DataType::kHALF},
                                                        {"i64", DataType::kINT64},  {"i32", DataType::kINT32},
                                                        {"i8", DataType::kINT8},    {"u8", DataType::kUINT8}};

DataType type_of(const dm3d_binding &binding) {
  const auto same = [&](const auto &entry) { return std::strcmp(entry.first, binding.dtype) == 0; };
  return std::find_if(std::begin(kTypes), std::end(kTypes), same)->second;
}

class SparseBackbone final : public IPluginV3,
                             public IPluginV3OneCore,
                             public IPluginV3OneBuild,
                             public IPluginV3OneRuntime {
 public:
  // Null where the plan is refused.
  static std::unique_ptr<SparseBackbone> made_of(const Blob &blob) {
    dm3d_plan *plan = nullptr;
    if (!blob || dm3d_plan_load(blob->data(), blob->size(), &plan) != DM3D_OK) return nullptr;
    return std::unique_ptr<SparseBackbone>(new SparseBackbone(blob, plan));
  }

  IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
    if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild *>(this);
    if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime *>(this);
    return static_cast<IPluginV3OneCore *>(this);
  }
  IPluginV3 *clone() noexcept override { return made_of(blob_).release(); }
  AsciiChar const *getPluginName() const noexcept override { return kName; }
  AsciiChar const *getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const *getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(bindings_.size()) - inputs_; }
  int32_t configurePlugin(DynamicPluginTensorDesc const *, int32_t inputs, DynamicPluginTensorDesc const *,
                          int32_t outputs) noexcept override {
    return inputs == inputs_ && outputs == getNbOutputs() ? 0 : 1;
  }
  bool supportsFormatCombination(int32_t place, DynamicPluginTensorDesc const *tensors, int32_t,
                                 int32_t) noexcept override {
    return tensors[place].desc.format == TensorFormat::kLINEAR && tensors[place].desc.type == type_of(bindings_[place]);
  }
  int32_t getOutputDataTypes(DataType *types, int32_t outputs, DataType const *, int32_t) const noexcept override {
    for (int32_t i = 0; i < outputs; ++i) types[i] = type_of(bindings_[inputs_ + i]);
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const *, int32_t, DimsExprs const *, int32_t, DimsExprs *shapes, int32_t outputs,
                          IExprBuilder &builder) noexcept override {
    for (int32_t i = 0; i < outputs; ++i) {
      const dm3d_binding &binding = bindings_[inputs_ + i];
      shapes[i].nbDims = static_cast<int32_t>(binding.rank);
      for (int32_t axis = 0; axis < shapes[i].nbDims; ++axis)
        shapes[i].d[axis] = builder.constant(static_cast<int64_t>(binding.shape[axis]));
    }
    return 0;
  }
  size_t getWorkspaceSize(DynamicPluginTensorDesc const *, int32_t, DynamicPluginTensorDesc const *,
                          int32_t) const noexcept override {
    return dm3d_plan_workspace_bytes(plan_.get());
  }

  int32_t onShapeChange(PluginTensorDesc const *, int32_t, PluginTensorDesc const *, int32_t) noexcept override {
    return 0;
  }
  IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override {
    std::unique_ptr<SparseBackbone> attached = made_of(blob_);
    if (!attached || dm3d_plan_prepare(attached->plan_.get()) != DM3D_OK) return nullptr;
    return attached.release();
  }
  int32_t enqueue(PluginTensorDesc const *, PluginTensorDesc const *, void const *const *inputs, void *const *outputs,
                  void *workspace, cudaStream_t stream) noexcept override {
    for (int32_t i = 0; i < inputs_; ++i) addresses_[i] = const_cast<void *>(inputs[i]);
    for (int32_t i = 0; i < getNbOutputs(); ++i) addresses_[inputs_ + i] = outputs[i];
    return dm3d_plan_enqueue(plan_.get(), stream, addresses_.data(), static_cast<uint32_t>(addresses_.size()),
                             workspace, dm3d_plan_workspace_bytes(plan_.get()));
  }
  PluginFieldCollection const *getFieldsToSerialize() noexcept override {
    field_ = PluginField("plan", blob_->data(), PluginFieldType::kINT8, static_cast<int32_t>(blob_->size()));
    fields_ = {1, &field_};
    return &fields_;
  }

 private:
  SparseBackbone(Blob blob, dm3d_plan *plan)
      : blob_(std::move(blob)),
        plan_(plan, &dm3d_plan_destroy),
        bindings_(dm3d_plan_binding_count(plan)),
        addresses_(bindings_.size()) {
    for (uint32_t i = 0; i < bindings_.size(); ++i) {
      dm3d_plan_binding(plan, i, &bindings_[i]);
      inputs_ += !bindings_[i].is_output;
    }
  }

  Blob blob_;
  Plan plan_;
  std::vector<dm3d_binding> bindings_;
  std::vector<void *> addresses_;
  int32_t inputs_ = 0;
  PluginField field_;
  PluginFieldCollection fields_{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  IPluginV3 *createPlugin(AsciiChar const *, PluginFieldCollection const *given, TensorRTPhase) noexcept override {
    Blob blob;
    for (int32_t i = 0; i < given->nbFields; ++i) {
      const PluginField &field = given->fields[i];
      const auto *data = static_cast<const char *>(field.data);
      if (std::strcmp(field.name, "plan") == 0) {
        blob = std::make_shared<const std::vector<char>>(data, data + field.length);
      } else if (std::strcmp(field.name, "plan_file") == 0) {
        const auto length = static_cast<size_t>(field.length);
        std::ifstream file(std::string(data, strnlen(data, length)), std::ios::binary);
        const std::istreambuf_iterator<char> begin(file), end;
        blob = std::make_shared<const std::vector<char>>(begin, end);
      }
    }
    return SparseBackbone::made_of(blob).release();
  }
  PluginFieldCollection const *getFieldNames() noexcept override { return &fields_; }
  AsciiChar const *getPluginName() const noexcept override { return kName; }
  AsciiChar const *getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const *getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const PluginField known_[2] = {{"plan", nullptr, PluginFieldType::kINT8, 0},
                                 {"plan_file", nullptr, PluginFieldType::kCHAR, 0}};
  const PluginFieldCollection fields_{2, known_};
};

}  // namespace

// What TensorRT looks up in a plugin library.
extern "C" DM3D_API void setLoggerFinder(ILoggerFinder *) {}
extern "C" DM3D_API IPluginCreatorInterface *const *getCreators(int32_t &count) {
  static Creator creator;
  static IPluginCreatorInterface *const creators[] = {&creator};
  count = 1;
  return creators;
}
