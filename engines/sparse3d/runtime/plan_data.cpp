#include "plan_data.hpp"

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <iterator>

#include "sha256.hpp"

namespace dm3d {

namespace {

enum SectionKind : std::uint32_t {
  kKernels = 1, kBuffers, kSteps, kArgs, kBindings, kStatusWords, kStrings, kNotes, kConstants, kCubins
};
constexpr std::size_t kMaxSections = 64;
constexpr struct {
  const char *name;
  std::uint64_t bytes;
} kDtypes[] = {{"fp32", 4}, {"fp16", 2}, {"i64", 8}, {"i32", 4}, {"i8", 1}, {"u8", 1}};
constexpr char kLetters[] = "pilf";  // of ArgKind, in its order

std::uint64_t aligned(std::uint64_t at) { return (at + kAlignment - 1) / kAlignment * kAlignment; }

bool within(std::uint64_t at, std::uint64_t size, std::uint64_t room) { return at <= room && size <= room - at; }

}  // namespace

void refuse(dm3d_result result, const char *format, ...) {
  char text[240];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Refusal{result, text};
}

const char *name_of_dtype(std::uint32_t dtype) { return kDtypes[dtype].name; }

std::uint64_t bytes_of_binding(const Binding &binding) {
  std::uint64_t bytes = kDtypes[binding.dtype].bytes;
  for (std::uint32_t axis = 0; axis < binding.rank; ++axis) {
    if (binding.shape[axis] == 0 || binding.shape[axis] > kMaxBytes / bytes) return 0;
    bytes *= binding.shape[axis];
  }
  return bytes;
}

PlanData::PlanData(const void *bytes, std::size_t size)
    : file_(static_cast<const std::uint8_t *>(bytes), static_cast<const std::uint8_t *>(bytes) + size) {
  Header header;
  check_header(header);
  find_sections(header);
  workspace_bytes = header.workspace_bytes;
  if (workspace_bytes > kMaxBytes) refuse(DM3D_BAD_PLAN, "the workspace has %" PRIu64 " bytes", workspace_bytes);
  strings_ = neutral(kStrings);
  kernels = Records<Kernel>(neutral(kKernels));
  buffers = Records<Buffer>(neutral(kBuffers));
  steps = Records<Step>(neutral(kSteps));
  args = Records<Arg>(neutral(kArgs));
  bindings = Records<Binding>(neutral(kBindings));
  constants = neutral(kConstants);
  neutral(kNotes);
  check_buffers();
  check_bindings();
  check_steps();
  check_status(neutral(kStatusWords));
  for (const auto &section : sections_)
    if (section.first.kind == kCubins) images(section.first.sm);
}

void PlanData::check_header(Header &header) const {
  if (file_.size() < sizeof header || std::memcmp(file_.data(), "DM3DPLAN", 8) != 0)
    refuse(DM3D_BAD_PLAN, "its %zu bytes do not begin like a launch plan", file_.size());
  std::memcpy(&header, file_.data(), sizeof header);
  if (header.min_reader > kVersion)
    refuse(DM3D_NEWER_PLAN, "it needs a reader of version %u; this one reads %u", header.min_reader, kVersion);
  if (header.file_bytes != file_.size())
    refuse(DM3D_BAD_PLAN, "it should have %" PRIu64 " bytes and has %zu", header.file_bytes, file_.size());
  constexpr std::size_t digest_at = offsetof(Header, digest);
  static constexpr std::uint8_t zeros[sizeof header.digest] = {};
  Sha256 sha;
  sha.update(file_.data(), digest_at);
  sha.update(zeros, sizeof zeros);
  sha.update(file_.data() + sizeof header, file_.size() - sizeof header);
  const Digest found = sha.finish();
  if (std::memcmp(found.data(), header.digest, found.size()) != 0)
    refuse(DM3D_BAD_PLAN, "its bytes do not have the digest that is written in it");
  if (header.features & ~kKnownFeatures)
    refuse(DM3D_NEWER_PLAN, "it needs features that this version does not know: bits %#" PRIx64,
           header.features & ~kKnownFeatures);
}

void PlanData::find_sections(const Header &header) {
  std::uint64_t end = sizeof header + std::uint64_t{sizeof(Section)} * header.sections;
  if (header.zero != 0 || header.sections > kMaxSections || end > file_.size())
    refuse(DM3D_BAD_PLAN, "its table of %u sections does not fit", header.sections);
  const Records<Section> table(Bytes{file_.data() + sizeof header, sizeof(Section) * header.sections});
  for (std::size_t i = 0; i < table.size(); ++i) {
    const Section section = table[i];
    const auto same = [&](const auto &other) {
      return other.first.kind == section.kind && other.first.sm == section.sm;
    };
    const bool fits = section.offset == aligned(end) && within(section.offset, section.bytes, file_.size());
    if (!fits || std::any_of(sections_.begin(), sections_.end(), same) ||
        std::any_of(file_.begin() + static_cast<std::ptrdiff_t>(end),
                    file_.begin() + static_cast<std::ptrdiff_t>(section.offset), [](std::uint8_t b) { return b; }))
      refuse(DM3D_BAD_PLAN, "its section %u overlaps, repeats or leaves the file", section.kind);
    sections_.push_back({section, Bytes{file_.data() + section.offset, static_cast<std::size_t>(section.bytes)}});
    end = section.offset + section.bytes;
  }
  if (end != file_.size())
    refuse(DM3D_BAD_PLAN, "it has %" PRIu64 " bytes after its last section", file_.size() - end);
}

Bytes PlanData::neutral(std::uint32_t kind) const {
  for (const auto &section : sections_)
    if (section.first.kind == kind && section.first.sm == 0) return section.second;
  refuse(DM3D_BAD_PLAN, "it lacks the section %u", kind);
}

std::string_view PlanData::text(Bytes section, std::uint64_t at, std::uint64_t size, const char *what) const {
  if (!within(at, size, section.size)) refuse(DM3D_BAD_PLAN, "the text of %s leaves its section", what);
  return {reinterpret_cast<const char *>(section.data) + at, static_cast<std::size_t>(size)};
}

void PlanData::check_buffers() const {
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const Buffer buffer = buffers[i];
    text(strings_, buffer.name_at, buffer.name_bytes, "a buffer");
    const std::uint64_t room = buffer.kind == kWorkspace  ? workspace_bytes
                               : buffer.kind == kConstant ? constants.size
                                                          : buffer.bytes;
    const bool sized = buffer.bytes > 0 && buffer.bytes <= kMaxBytes && buffer.offset % kAlignment == 0;
    if (buffer.kind > kOutput || !sized || !within(buffer.offset, buffer.bytes, room))
      refuse(DM3D_BAD_PLAN, "buffer %zu has %" PRIu64 " bytes at %" PRIu64 " of %" PRIu64, i, buffer.bytes,
             buffer.offset, room);
  }
}

void PlanData::check_bindings() {
  std::vector<bool> bound(buffers.size());
  bool outputs = false;
  for (std::size_t i = 0; i < bindings.size(); ++i) {
    const Binding binding = bindings[i];
    const std::uint32_t kind = binding.output ? kOutput : kInput;
    const bool known = binding.buffer < buffers.size() && binding.dtype < std::size(kDtypes) && binding.rank <= 6 &&
                       binding.output <= 1 && binding.output >= outputs && !bound[binding.buffer];
    if (!known || buffers[binding.buffer].kind != kind ||
        buffers[binding.buffer].bytes != bytes_of_binding(binding))
      refuse(DM3D_BAD_PLAN, "binding %zu does not fit buffer %u", i, binding.buffer);
    bound[binding.buffer] = true;
    outputs = binding.output;
    binding_names.emplace_back(text(strings_, binding.name_at, binding.name_bytes, "a binding"));
  }
  for (std::size_t i = 0; i < buffers.size(); ++i)
    if (buffers[i].kind >= kInput && !bound[i]) refuse(DM3D_BAD_PLAN, "buffer %zu is bound to nothing", i);
}

void PlanData::check_steps() const {
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const Step step = steps[i];
    if (step.op == kMemset) {
      const bool fills = step.index < buffers.size() && buffers[step.index].kind != kConstant &&
                         buffers[step.index].kind != kInput && step.first % 4 == 0 && step.bytes % 4 == 0 &&
                         step.bytes > 0 && within(step.first, step.bytes, buffers[step.index].bytes);
      if (!fills) refuse(DM3D_BAD_PLAN, "step %zu fills what is not its to fill", i);
      continue;
    }
    if (step.op != kLaunch || step.index >= kernels.size())
      refuse(DM3D_BAD_PLAN, "step %zu launches kernel %u of %zu", i, step.index, kernels.size());
    const std::uint32_t *grid = step.grid;
    if (grid[0] < 1 || grid[0] > 0x7FFFFFFF || grid[1] < 1 || grid[1] > 65535 || grid[2] < 1 || grid[2] > 65535)
      refuse(DM3D_BAD_PLAN, "step %zu has the grid %u, %u, %u", i, grid[0], grid[1], grid[2]);
    const Kernel kernel = kernels[step.index];
    text(strings_, kernel.name_at, kernel.name_bytes, "a kernel");
    check_args(i, step, text(strings_, kernel.kinds_at, kernel.kinds_bytes, "a signature"));
  }
}

void PlanData::check_args(std::size_t step, const Step &launch, std::string_view kinds) const {
  if (launch.count != kinds.size() || kinds.size() > kMaxArgs || !within(launch.first, launch.count, args.size()))
    refuse(DM3D_BAD_PLAN, "step %zu passes %u arguments where %zu are taken", step, launch.count, kinds.size());
  for (std::size_t j = 0; j < kinds.size(); ++j) {
    const Arg arg = args[launch.first + j];
    const bool right = arg.kind <= kF32 && kinds[j] == kLetters[arg.kind];
    const bool points = arg.kind != kPointer ||
                        (arg.buffer < buffers.size() && arg.value % kPointerAlignment == 0 &&
                         arg.value < buffers[arg.buffer].bytes);
    if (!right || !points) refuse(DM3D_BAD_PLAN, "argument %zu of step %zu is wrong", j, step);
  }
}

void PlanData::check_status(Bytes section) {
  if (section.size == 0) return;
  if (section.size < sizeof status) refuse(DM3D_BAD_PLAN, "the status has %zu bytes", section.size);
  std::memcpy(&status, section.data, sizeof status);
  words = Records<Word>(Bytes{section.data + sizeof status, section.size - sizeof status});
  const bool lies = status.buffer < buffers.size() && status.words == words.size() && status.words > 0 &&
                    status.offset % 4 == 0 && buffers[status.buffer].kind != kConstant &&
                    buffers[status.buffer].kind != kInput &&
                    within(status.offset, 4 * std::uint64_t{status.words}, buffers[status.buffer].bytes);
  if (!lies) refuse(DM3D_BAD_PLAN, "the status lies outside its buffer");
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (words[i].kind > DM3D_CUTOFF_M) refuse(DM3D_BAD_PLAN, "status word %zu is of an unknown kind", i);
    word_names.emplace_back(text(strings_, words[i].name_at, words[i].name_bytes, "a status word"));
  }
}

bool PlanData::has_images(std::uint32_t sm) const {
  return std::any_of(sections_.begin(), sections_.end(),
                     [&](const auto &s) { return s.first.kind == kCubins && s.first.sm == sm; });
}

std::vector<PlanData::Image> PlanData::images(std::uint32_t sm) const {
  const auto found = std::find_if(sections_.begin(), sections_.end(),
                                  [&](const auto &s) { return s.first.kind == kCubins && s.first.sm == sm; });
  if (found == sections_.end()) refuse(DM3D_NO_IMAGE, "it holds no kernels for sm_%u", sm);
  const Bytes section = found->second;
  if (section.size / sizeof(Cubin) < kernels.size())
    refuse(DM3D_BAD_PLAN, "sm_%u has too few images for %zu kernels", sm, kernels.size());
  const Records<Cubin> records(Bytes{section.data, kernels.size() * sizeof(Cubin)});
  std::vector<Image> images;
  for (std::size_t i = 0; i < records.size(); ++i) {
    const Cubin cubin = records[i];
    const bool runs = cubin.threads >= 32 && cubin.threads <= 1024 && cubin.threads % 32 == 0 &&
                      cubin.shared < (1u << 20) && cubin.hidden <= kMaxHidden && cubin.image_bytes > 0;
    if (!runs || !within(cubin.image_at, cubin.image_bytes, section.size))
      refuse(DM3D_BAD_PLAN, "image %zu for sm_%u is wrong", i, sm);
    images.push_back({std::string(text(section, cubin.symbol_at, cubin.symbol_bytes, "a symbol")),
                      Bytes{section.data + cubin.image_at, static_cast<std::size_t>(cubin.image_bytes)},
                      cubin.shared, cubin.threads, cubin.hidden});
  }
  return images;
}

std::string PlanData::architectures() const {
  std::string names;
  for (const auto &section : sections_)
    if (section.first.kind == kCubins) names += (names.empty() ? "sm_" : ", sm_") + std::to_string(section.first.sm);
  return names.empty() ? "none" : names;
}

std::string PlanData::kernel_name(std::size_t index) const {
  return std::string(text(strings_, kernels[index].name_at, kernels[index].name_bytes, "a kernel"));
}

}  // namespace dm3d
