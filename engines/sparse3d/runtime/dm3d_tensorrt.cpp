// The node dm3d::SparseBackbone3d as a TensorRT plugin: IPluginV3 around the C interface, TensorRT 10.0 to 11.x.
//
// The ONNX node names its plan by the attribute `plan_file`; the engine carries the plan itself, as the field `plan`.
#include <NvInfer.h>

#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "dm3d_plan.h"

namespace {

using namespace nvinfer1;
using Blob = std::shared_ptr<const std::vector<char>>;
using Dynamic = DynamicPluginTensorDesc const *;
using Static = PluginTensorDesc const *;

template <class Interface>
struct Named : Interface {
  AsciiChar const *getPluginName() const noexcept override { return "SparseBackbone3d"; }
  AsciiChar const *getPluginVersion() const noexcept override { return "1"; }
  AsciiChar const *getPluginNamespace() const noexcept override { return "dm3d"; }
};

DataType type_of(const dm3d_binding &binding) {  // the planner binds fp32, fp16, i64 and i32
  const std::string name = binding.dtype;
  return name == "fp32"   ? DataType::kFLOAT
         : name == "fp16" ? DataType::kHALF
         : name == "i64"  ? DataType::kINT64
                          : DataType::kINT32;
}

class SparseBackbone final : public IPluginV3, public Named<IPluginV3OneCore>, public IPluginV3OneBuild,
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

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(bindings_.size()) - inputs_; }
  int32_t configurePlugin(Dynamic, int32_t inputs, Dynamic, int32_t outputs) noexcept override {
    return inputs != inputs_ || outputs != getNbOutputs();
  }
  bool supportsFormatCombination(int32_t place, Dynamic all, int32_t, int32_t) noexcept override {
    return all[place].desc.format == TensorFormat::kLINEAR && all[place].desc.type == type_of(bindings_[place]);
  }
  int32_t getOutputDataTypes(DataType *types, int32_t count, DataType const *, int32_t) const noexcept override {
    for (int32_t i = 0; i < count; ++i) types[i] = type_of(bindings_[inputs_ + i]);
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const *, int32_t, DimsExprs const *, int32_t, DimsExprs *shapes, int32_t count,
                          IExprBuilder &builder) noexcept override {
    for (int32_t i = 0; i < count; ++i) {
      const dm3d_binding &binding = bindings_[inputs_ + i];
      shapes[i].nbDims = static_cast<int32_t>(binding.rank);
      for (uint32_t axis = 0; axis < binding.rank; ++axis)
        shapes[i].d[axis] = builder.constant(static_cast<int64_t>(binding.shape[axis]));
    }
    return 0;
  }
  size_t getWorkspaceSize(Dynamic, int32_t, Dynamic, int32_t) const noexcept override {
    return dm3d_plan_workspace_bytes(plan_.get());
  }

  int32_t onShapeChange(Static, int32_t, Static, int32_t) noexcept override { return 0; }
  IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override {
    auto attached = made_of(blob_);
    return attached && dm3d_plan_prepare(attached->plan_.get()) == DM3D_OK ? attached.release() : nullptr;
  }
  int32_t enqueue(Static, Static, void const *const *inputs, void *const *outputs, void *workspace,
                  cudaStream_t stream) noexcept override {
    for (int32_t i = 0; i < inputs_; ++i) addresses_[i] = const_cast<void *>(inputs[i]);
    for (int32_t i = 0; i < getNbOutputs(); ++i) addresses_[inputs_ + i] = outputs[i];
    return dm3d_plan_enqueue(plan_.get(), stream, addresses_.data(), static_cast<uint32_t>(addresses_.size()),
                             workspace, dm3d_plan_workspace_bytes(plan_.get()));
  }
  PluginFieldCollection const *getFieldsToSerialize() noexcept override { return &fields_; }

 private:
  SparseBackbone(const Blob &blob, dm3d_plan *plan)
      : blob_(blob),
        plan_(plan, &dm3d_plan_destroy),
        bindings_(dm3d_plan_binding_count(plan)),
        addresses_(bindings_.size()) {
    for (uint32_t i = 0; i < bindings_.size(); ++i) {
      dm3d_plan_binding(plan, i, &bindings_[i]);
      inputs_ += !bindings_[i].is_output;
    }
  }

  const Blob blob_;
  const std::unique_ptr<dm3d_plan, decltype(&dm3d_plan_destroy)> plan_;
  std::vector<dm3d_binding> bindings_;
  std::vector<void *> addresses_;
  int32_t inputs_ = 0;
  const PluginField field_{"plan", blob_->data(), PluginFieldType::kINT8, static_cast<int32_t>(blob_->size())};
  const PluginFieldCollection fields_{1, &field_};
};

struct Creator final : Named<IPluginCreatorV3One> {
  IPluginV3 *createPlugin(AsciiChar const *, PluginFieldCollection const *given, TensorRTPhase) noexcept override {
    Blob blob;
    for (const PluginField *field = given->fields; field != given->fields + given->nbFields; ++field) {
      const std::string name = field->name;
      const auto *data = static_cast<const char *>(field->data);
      if (name == "plan") blob = std::make_shared<const std::vector<char>>(data, data + field->length);
      if (name == "plan_file") {
        const std::string path(data, static_cast<size_t>(field->length));
        std::ifstream file(path.c_str(), std::ios::binary);  // a field's text may end in zeros
        blob = std::make_shared<const std::vector<char>>(std::istreambuf_iterator<char>(file),
                                                         std::istreambuf_iterator<char>());
      }
    }
    return SparseBackbone::made_of(blob).release();
  }
  PluginFieldCollection const *getFieldNames() noexcept override { return &fields_; }

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
