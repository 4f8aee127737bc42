// The entry points: choose an instruction set, cut the work into tasks, run them.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#if defined(HOMKV_HAVE_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "abi.h"
#include "kernels.hpp"
#include "pool.hpp"

namespace homkv {

#define HOMKV_DECLARE(isa) \
  namespace isa {          \
  extern const Kernels kernels; \
  }
HOMKV_DECLARE(portable)
#if defined(HOMKV_HAVE_AVX512)
HOMKV_DECLARE(avx512)
#endif
#if defined(HOMKV_HAVE_AVX2)
HOMKV_DECLARE(avx2)
#endif
#if defined(HOMKV_HAVE_NEON)
HOMKV_DECLARE(neon)
#endif

namespace {

#if defined(HOMKV_HAVE_NEON)
bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Apple processor that runs arm64
#endif
}
#endif

// Kernels this machine can run, best first.
std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(HOMKV_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&avx512::kernels);
#endif
#if defined(HOMKV_HAVE_AVX2)
  // Every processor with AVX2 and FMA has F16C; older compilers cannot ask for it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&avx2::kernels);
#endif
#if defined(HOMKV_HAVE_NEON)
  if (has_dot_product()) found.push_back(&neon::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> found = find_kernels();
  return found;
}

const Kernels* choose(int isa) {
  const auto& found = all_kernels();
  if (isa < 0) return found.front();
  return isa < (int)found.size() ? found[isa] : nullptr;
}

bool in_range(int32_t x, int32_t stop) { return x >= 0 && x < stop; }

bool indices_fit(const homkv_attend_args& a) {
  for (int b = 0; b < a.batch; b++) {
    if (!in_range(a.num_pages[b], a.max_pages + 1) || !in_range(a.exact_len[b], a.exact_tokens + 1) ||
        !in_range(a.slots[b], a.num_slots))
      return false;
    for (int p = 0; p < a.num_pages[b]; p++)
      if (!in_range(a.page_table[(size_t)b * a.max_pages + p], a.num_blocks)) return false;
  }
  return true;
}

bool indices_fit(const homkv_encode_args& a) {
  if (!a.block_ids) return a.num_pages <= a.num_blocks;
  for (int i = 0; i < a.num_pages; i++)
    if (!in_range(a.block_ids[i], a.num_blocks)) return false;
  return true;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Scratch of one attend call: per kv head of a sequence, one partial per split of its pages and one for exact tokens.
struct Plan {
  const homkv_attend_args& args;
  int splits = 0, tiles, width;
  size_t part_floats;
  std::unique_ptr<float[]> scratch;
  std::vector<Partial> parts;  // [pair][split]; all rows

  explicit Plan(const homkv_attend_args& a) : args(a), tiles(ceil_div(a.rows, TILE_ROWS)) {
    for (int b = 0; b < a.batch; b++) splits = std::max(splits, ceil_div(a.num_pages[b], a.pages_per_split));
    width = std::max(padded_offset(*a.layout, a.layout->num_v), (int)a.layout->head_dim);
    part_floats = (size_t)a.rows * (width + 2);
    scratch.reset(new float[(size_t)pairs() * (splits + 1) * part_floats]);
    for (size_t i = 0; i < (size_t)pairs() * (splits + 1); i++) {
      float* base = scratch.get() + i * part_floats;
      parts.push_back({base, base + (size_t)a.rows * width, base + (size_t)a.rows * (width + 1)});
    }
  }

  int pairs() const { return args.batch * args.heads; }
  int tasks() const { return pairs() * (splits + 1) * tiles; }

  Partial part(int pair, int split, int row, int row_floats) const {
    const Partial& all = parts[(size_t)pair * (splits + 1) + split];
    return {all.o + (size_t)row * row_floats, all.m + row, all.l + row};
  }

  void attend(const Kernels& kernels, int index) const {
    const int tile = index % tiles, split = index / tiles % (splits + 1), pair = index / tiles / (splits + 1);
    const int batch = pair / args.heads, row = tile * TILE_ROWS;
    AttendTask task{&args, batch, pair % args.heads, row, std::min(args.rows - row, TILE_ROWS), 0, 0, {}};
    if (split == splits) {
      task.last = args.exact_len[batch];
      task.out = part(pair, split, row, args.layout->head_dim);
      return kernels.attend_exact(task);
    }
    task.first = split * args.pages_per_split;
    task.last = std::min(args.num_pages[batch], task.first + args.pages_per_split);
    task.out = part(pair, split, row, padded_offset(*args.layout, args.layout->num_v));
    kernels.attend_pages(task);
  }

  void merge(const Kernels& kernels, int pair) const {
    const size_t row = (size_t)pair * args.rows;
    kernels.merge({&args, &parts[(size_t)pair * (splits + 1)], splits + 1, args.o + row * args.layout->head_dim, args.lse + row});
  }
};

}  // namespace
}  // namespace homkv

using namespace homkv;

extern "C" int homkv_abi(void) { return HOMKV_CPU_ABI; }

extern "C" const char* homkv_isa_name(int isa) {
  const Kernels* kernels = isa < 0 ? nullptr : choose(isa);
  return kernels ? kernels->name : nullptr;
}

extern "C" int homkv_attend(const homkv_attend_args* args) try {
  const Kernels* kernels = choose(args->isa);
  if (!kernels) return HOMKV_NO_ISA;
  if (!indices_fit(*args)) return HOMKV_INDEX_RANGE;
  const Plan plan(*args);
  auto attend = [&](int task) { plan.attend(*kernels, task); };
  auto merge = [&](int pair) { plan.merge(*kernels, pair); };
  run_tasks(plan.tasks(), args->threads, attend);
  run_tasks(plan.pairs(), args->threads, merge);
  return HOMKV_OK;
} catch (const std::bad_alloc&) {
  return HOMKV_NO_MEMORY;
}

extern "C" int homkv_encode(const homkv_encode_args* args) try {
  const Kernels* kernels = choose(args->isa);
  if (!kernels) return HOMKV_NO_ISA;
  if (!indices_fit(*args)) return HOMKV_INDEX_RANGE;
  const int pages = args->num_pages * args->heads, per_task = kernels->encode_lanes;
  std::vector<int> status(ceil_div(pages, per_task));
  auto encode = [&](int task) {
    const int first = task * per_task;
    status[task] = kernels->encode_pages({args, first, std::min(pages, first + per_task)});
  };
  run_tasks((int)status.size(), args->threads, encode);
  for (int found : status)
    if (found != HOMKV_OK) return found;
  return HOMKV_OK;
} catch (const std::bad_alloc&) {
  return HOMKV_NO_MEMORY;
}
