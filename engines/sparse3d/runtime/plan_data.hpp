// The plan file as plan_file.py writes it: fixed little-endian records, checked whole before anything uses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dm3d_plan.h"

namespace dm3d {

constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kKnownFeatures = 0xF;
constexpr std::size_t kAlignment = 256;
constexpr std::size_t kPointerAlignment = 16;
constexpr std::size_t kMaxArgs = 64;
constexpr std::size_t kMaxHidden = 8;
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 40;

struct Header {
  char magic[8];
  std::uint32_t version, min_reader;
  std::uint64_t features, file_bytes, workspace_bytes;
  std::uint32_t sections, zero;
  std::uint8_t digest[32];
};
struct Section {
  std::uint32_t kind, sm;
  std::uint64_t offset, bytes;
};
struct Kernel {
  std::uint64_t name_at, kinds_at;
  std::uint32_t name_bytes, kinds_bytes;
};
struct Buffer {
  std::uint64_t name_at;
  std::uint32_t name_bytes, kind;
  std::uint64_t offset, bytes;
};
struct Step {
  std::uint32_t op, index, grid[3], count;  // a memset has its word in `count`
  std::uint64_t first, bytes;               // a memset has its offset in `first`
};
struct Arg {
  std::uint32_t kind, buffer;
  std::uint64_t value;
};
struct Binding {
  std::uint64_t name_at;
  std::uint32_t name_bytes, buffer, dtype, output, rank, zero;
  std::uint64_t shape[6];
};
struct StatusHead {
  std::uint32_t buffer, words;
  std::uint64_t offset;
};
struct Word {
  std::uint64_t name_at;
  std::uint32_t name_bytes, kind;
  std::uint64_t capacity;
};
struct Cubin {
  std::uint64_t symbol_at, image_at, image_bytes;
  std::uint32_t symbol_bytes, shared, threads, hidden;
};
static_assert(sizeof(Header) == 80 && sizeof(Section) == 24 && sizeof(Kernel) == 24 && sizeof(Buffer) == 32);
static_assert(sizeof(Step) == 40 && sizeof(Arg) == 16 && sizeof(Binding) == 80 && sizeof(StatusHead) == 16);
static_assert(sizeof(Word) == 24 && sizeof(Cubin) == 40);
#ifdef __BYTE_ORDER__
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "plan files are little endian");
#endif

enum BufferKind : std::uint32_t { kWorkspace, kConstant, kInput, kOutput };
enum Op : std::uint32_t { kLaunch, kMemset };
enum ArgKind : std::uint32_t { kPointer, kI32, kI64, kF32 };

// What a call refuses, caught where the C interface begins.
struct Refusal {
  dm3d_result result;
  std::string what;
};
[[noreturn]] void refuse(dm3d_result result, const char *format, ...) __attribute__((format(printf, 2, 3)));

struct Bytes {
  const std::uint8_t *data = nullptr;
  std::size_t size = 0;
};

// Records of one kind in the file's bytes; they need not be aligned there.
template <class Record>
class Records {
 public:
  Records() = default;
  explicit Records(Bytes bytes) : bytes_(bytes) {
    if (bytes.size % sizeof(Record) != 0)
      refuse(DM3D_BAD_PLAN, "a table of %zu bytes has no whole records of %zu", bytes.size, sizeof(Record));
  }
  std::size_t size() const { return bytes_.size / sizeof(Record); }
  Record operator[](std::size_t index) const {
    Record record;
    std::memcpy(&record, bytes_.data + index * sizeof(Record), sizeof(Record));
    return record;
  }

 private:
  Bytes bytes_;
};

class PlanData {
 public:
  PlanData(const void *bytes, std::size_t size);
  PlanData(const PlanData &) = delete;
  PlanData &operator=(const PlanData &) = delete;

  struct Image {
    std::string symbol;
    Bytes bytes;
    std::uint32_t shared, threads, hidden;
  };

  std::uint64_t workspace_bytes = 0;
  Records<Kernel> kernels;
  Records<Buffer> buffers;
  Records<Step> steps;
  Records<Arg> args;
  Records<Binding> bindings;
  Records<Word> words;
  StatusHead status{};
  Bytes constants;
  std::vector<std::string> binding_names, word_names;

  bool has_images(std::uint32_t sm) const;
  std::vector<Image> images(std::uint32_t sm) const;
  std::string architectures() const;
  std::string kernel_name(std::size_t index) const;

 private:
  void check_header(Header &header) const;
  void find_sections(const Header &header);
  void check_buffers() const;
  void check_bindings();
  void check_steps() const;
  void check_args(std::size_t step, const Step &launch, std::string_view kinds) const;
  void check_status(Bytes section);
  Bytes neutral(std::uint32_t kind) const;
  std::string_view text(Bytes section, std::uint64_t at, std::uint64_t size, const char *what) const;

  std::vector<std::uint8_t> file_;
  std::vector<std::pair<Section, Bytes>> sections_;
  Bytes strings_;
};

std::uint64_t bytes_of_binding(const Binding &binding);
const char *name_of_dtype(std::uint32_t dtype);

}  // namespace dm3d
