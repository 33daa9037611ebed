// Declarations of the part of TensorRT's plugin interface that dm3d_tensorrt.cpp uses, written from its documentation,
// so that the adapter is compiled and called where TensorRT is not. It proves nothing about TensorRT itself.
#pragma once

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st *;

namespace nvinfer1 {

using AsciiChar = char;
enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kINT64 = 8 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };
enum class PluginFieldType : int32_t { kFLOAT16 = 0, kFLOAT32 = 1, kINT8 = 3, kINT32 = 5, kCHAR = 6 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};
struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min, max, opt;
};
struct PluginField {
  AsciiChar const *name;
  void const *data;
  PluginFieldType type;
  int32_t length;
  PluginField(AsciiChar const *n = nullptr, void const *d = nullptr, PluginFieldType t = PluginFieldType::kCHAR,
              int32_t l = 0) noexcept
      : name(n), data(d), type(t), length(l) {}
};
struct PluginFieldCollection {
  int32_t nbFields;
  PluginField const *fields;
};

class IDimensionExpr {
 public:
  virtual int64_t getConstantValue() const noexcept = 0;
  virtual ~IDimensionExpr() noexcept = default;
};
struct DimsExprs {
  int32_t nbDims;
  IDimensionExpr const *d[Dims::MAX_DIMS];
};
class IExprBuilder {
 public:
  virtual IDimensionExpr const *constant(int64_t value) noexcept = 0;
  virtual ~IExprBuilder() noexcept = default;
};

class ILoggerFinder {};
class IPluginResourceContext {};
class IVersionedInterface {
 public:
  virtual ~IVersionedInterface() noexcept = default;
};
class IPluginCapability : public IVersionedInterface {};
class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
 public:
  virtual IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
  virtual IPluginV3 *clone() noexcept = 0;
};
class IPluginV3OneCore : public IPluginCapability {
 public:
  virtual AsciiChar const *getPluginName() const noexcept = 0;
  virtual AsciiChar const *getPluginVersion() const noexcept = 0;
  virtual AsciiChar const *getPluginNamespace() const noexcept = 0;
};
class IPluginV3OneBuild : public IPluginCapability {
 public:
  virtual int32_t configurePlugin(DynamicPluginTensorDesc const *in, int32_t nbInputs,
                                  DynamicPluginTensorDesc const *out, int32_t nbOutputs) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType *outputTypes, int32_t nbOutputs, DataType const *inputTypes,
                                     int32_t nbInputs) const noexcept = 0;
  virtual int32_t getOutputShapes(DimsExprs const *inputs, int32_t nbInputs, DimsExprs const *shapeInputs,
                                  int32_t nbShapeInputs, DimsExprs *outputs, int32_t nbOutputs,
                                  IExprBuilder &exprBuilder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const *inOut, int32_t nbInputs,
                                         int32_t nbOutputs) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(DynamicPluginTensorDesc const *, int32_t, DynamicPluginTensorDesc const *,
                                  int32_t) const noexcept {
    return 0;
  }
};
class IPluginV3OneRuntime : public IPluginCapability {
 public:
  virtual int32_t onShapeChange(PluginTensorDesc const *in, int32_t nbInputs, PluginTensorDesc const *out,
                                int32_t nbOutputs) noexcept = 0;
  virtual int32_t enqueue(PluginTensorDesc const *inputDesc, PluginTensorDesc const *outputDesc,
                          void const *const *inputs, void *const *outputs, void *workspace,
                          cudaStream_t stream) noexcept = 0;
  virtual IPluginV3 *attachToContext(IPluginResourceContext *context) noexcept = 0;
  virtual PluginFieldCollection const *getFieldsToSerialize() noexcept = 0;
};
class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  virtual IPluginV3 *createPlugin(AsciiChar const *name, PluginFieldCollection const *fc,
                                  TensorRTPhase phase) noexcept = 0;
  virtual PluginFieldCollection const *getFieldNames() noexcept = 0;
  virtual AsciiChar const *getPluginName() const noexcept = 0;
  virtual AsciiChar const *getPluginVersion() const noexcept = 0;
  virtual AsciiChar const *getPluginNamespace() const noexcept = 0;
};

}  // namespace nvinfer1
