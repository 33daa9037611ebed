// Mutates a plan file and lets the runtime judge each mutant: a result is demanded, a crash is the finding.
//
//     dm3d_fuzz_plan PLAN COUNT SEED
//
// Half of the mutants get the size and the digest that they should have, so that the checks behind the digest are met.
// Mutants that are accepted are prepared, enqueued and asked for their status against the stand-in libcuda.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "dm3d_plan.h"
#include "plan_data.hpp"
#include "sha256.hpp"

namespace {

using Random = std::mt19937_64;
using File = std::vector<std::uint8_t>;

constexpr std::uint64_t kInteresting[] = {0, 1, 2, 3, 4, 8, 15, 16, 64, 255, 256, 65535, 65536, 0x7FFFFFFF, 0x80000000,
                                          0xFFFFFFFF, std::uint64_t{1} << 40, std::uint64_t{1} << 63, ~std::uint64_t{0}};

void mutate(File &file, Random &random) {
  if (file.empty()) return;
  const std::uint64_t kind = random() % 16;
  const std::size_t at = random() % file.size();
  if (kind == 0) {
    file.resize(at);
  } else if (kind == 1) {
    file.insert(file.end(), random() % 300, static_cast<std::uint8_t>(random()));
  } else if (kind == 2) {
    const std::size_t from = random() % file.size();
    const std::size_t size = random() % (file.size() - std::max(at, from));
    std::memmove(file.data() + at, file.data() + from, size);
  } else if (kind < 6) {
    file[at] = static_cast<std::uint8_t>(file[at] ^ (1u << random() % 8));
  } else {
    // A number where numbers are: aligned to 4, small or at the edge of what a type holds.
    const std::uint64_t edge = kInteresting[random() % std::size(kInteresting)] + random() % 3 - 1;
    const std::uint64_t value = random() % 4 ? edge : random() % (2 * file.size());
    const std::size_t size = random() % 2 ? 4 : 8;
    const std::size_t place = at / 4 * 4;
    if (place + size <= file.size()) std::memcpy(file.data() + place, &value, size);
  }
}

void stamp(File &file) {
  dm3d::Header header;
  if (file.size() < sizeof header) return;
  std::memcpy(&header, file.data(), sizeof header);
  header.file_bytes = file.size();
  std::memset(header.digest, 0, sizeof header.digest);
  std::memcpy(file.data(), &header, sizeof header);
  dm3d::Sha256 sha;
  sha.update(file.data(), file.size());
  const dm3d::Digest digest = sha.finish();
  std::memcpy(file.data() + offsetof(dm3d::Header, digest), digest.data(), digest.size());
}

dm3d_result judged(const File &file) {
  dm3d_plan *plan = nullptr;
  dm3d_result result = dm3d_plan_load(file.data(), file.size(), &plan);
  if (result != DM3D_OK) return result;
  result = dm3d_plan_prepare(plan);
  if (result == DM3D_OK) {
    std::vector<void *> addresses(dm3d_plan_binding_count(plan), reinterpret_cast<void *>(0x10000));
    const auto count = static_cast<std::uint32_t>(addresses.size());
    void *workspace = reinterpret_cast<void *>(0x20000);
    const std::uint64_t bytes = dm3d_plan_workspace_bytes(plan);
    dm3d_binding binding;
    for (std::uint32_t i = 0; i < count && result == DM3D_OK; ++i) result = dm3d_plan_binding(plan, i, &binding);
    dm3d_status status;
    if (result == DM3D_OK) result = dm3d_plan_enqueue(plan, nullptr, addresses.data(), count, workspace, bytes);
    if (result == DM3D_OK) result = dm3d_plan_status(plan, nullptr, addresses.data(), count, workspace, bytes, &status);
  }
  dm3d_plan_destroy(plan);
  return result;
}

}  // namespace

int main(int count, char **words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s PLAN COUNT SEED\n", words[0]);
    return 2;
  }
  std::ifstream input(words[1], std::ios::binary);
  const File whole{std::istreambuf_iterator<char>(input), std::istreambuf_iterator<char>()};
  const std::uint64_t mutants = std::strtoull(words[2], nullptr, 10);
  Random random(std::strtoull(words[3], nullptr, 10));
  if (judged(whole) != DM3D_OK) {
    std::fprintf(stderr, "the plan itself is refused: %s\n", dm3d_last_error());
    return 1;
  }
  std::uint64_t results[9] = {}, unstamped_accepted = 0;
  for (std::uint64_t i = 0; i < mutants; ++i) {
    File file = whole;
    for (std::uint64_t times = 1 + random() % 4; times > 0; --times) mutate(file, random);
    const bool stamped = random() % 2 == 0;
    if (stamped) stamp(file);
    const dm3d_result result = judged(file);
    results[result] += 1;
    if (result == DM3D_OK && !stamped && file != whole) unstamped_accepted += 1;
  }
  std::printf("%llu mutated plans, no crash\n", static_cast<unsigned long long>(mutants));
  for (int result = 0; result < 9; ++result)
    if (results[result])
      std::printf("  %llu: %s\n", static_cast<unsigned long long>(results[result]),
                  dm3d_result_text(static_cast<dm3d_result>(result)));
  if (unstamped_accepted == 0) return 0;
  std::fprintf(stderr, "%llu changed plans passed the digest\n", static_cast<unsigned long long>(unstamped_accepted));
  return 1;
}
