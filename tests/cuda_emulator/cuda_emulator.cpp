// The scheduler of cuda_emulator.h: fibers, barriers, warp exchanges, guarded memory.
#include "cuda_emulator.h"

#include "fibers.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <random>
#include <unordered_map>
#include <vector>

// where this library begins and ends, from the linker
extern "C" const char __ehdr_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

namespace emulator {
namespace {

// ---- the state of a launch --------------------------------------------------------------------------------------

struct Barrier {
  int arrived = 0, live = 0, count = 0, last_count = 0;
  unsigned generation = 0;
};

struct Warp {
  char values[2][kWarp * kExchangeBytes];
  const char* kind = nullptr;
  int arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  char data[16];
  int bytes, given, group;
};

struct Block {
  Guarded memory;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  Place place;
  Block* block = nullptr;
  Warp* warp = nullptr;
  const unsigned* waits_for = nullptr;
  unsigned seen = 0;
  bool done = false;
  std::vector<Copy> copies;
  int group = 0;
};

struct Launch {
  Body body;
  void* argument;
  Context scheduler;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier cluster;
};

enum Order { kForward, kReverse, kRandom, kBlockByBlock };
Order order = kForward;
unsigned order_seed = 0;
int limit = 232448;  // of sm_90
Launch* launch_ = nullptr;
Fiber* now = nullptr;
sigjmp_buf way_out;
char problem[512];
std::vector<char*> stacks;
std::unordered_map<void*, Guarded> buffers;
char damage[256];  // what was found when a buffer was freed

void wait_for(const unsigned& generation, unsigned seen) {
  Fiber* mine = now;
  mine->waits_for = &generation, mine->seen = seen;
  switch_to(mine->context, launch_->scheduler);
  mine->waits_for = nullptr;
}

void release(Barrier& b) { b.last_count = b.count, b.arrived = 0, b.count = 0, ++b.generation; }

int arrive(Barrier& b, bool predicate) {
  const unsigned generation = b.generation;
  ++b.arrived, b.count += predicate;
  if (b.arrived == b.live)
    release(b);
  else
    wait_for(b.generation, generation);
  return b.last_count;
}

void leave(Barrier& b) {
  --b.live;
  if (b.live > 0 && b.arrived == b.live) release(b);
}

void entry() {
  launch_->body(launch_->argument);
  if (!now->copies.empty()) fail("a thread ended with a cp.async that it never waited for");
  now->done = true;
  leave(now->block->barrier);
  leave(launch_->cluster);
  if (launch_->blocks.size() > 1 && now->block->barrier.live == 0) allow(now->block->memory, PROT_NONE);
  switch_to(now->context, launch_->scheduler);
}

void on_fault(int, siginfo_t* info, void*) {
  if (!now) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const char* at = static_cast<const char*>(info->si_addr);
  const Place& p = now->place;
  long nearest = 1L << 40;
  const char* what = "memory";
  auto consider = [&](const Guarded& g, const char* name) {
    if (at < g.mapping || at >= g.mapping + g.mapped) return;
    nearest = at - g.data, what = name;
  };
  for (const Block& block : launch_->blocks)
    consider(block.memory, block.barrier.live ? "shared memory" : "the shared memory of a block that has ended");
  size_t bytes = 0;
  for (const auto& [data, g] : buffers) {
    consider(g, "a buffer");
    if (at >= g.mapping && at < g.mapping + g.mapped) bytes = g.bytes;
  }
  snprintf(problem, sizeof(problem), "out of bounds: byte %ld of %s (%zu bytes), thread (%u, %u), block (%u, %u, %u)",
           nearest, what, bytes, p.thread.x, p.thread.y, p.block.x, p.block.y, p.block.z);
  siglongjmp(way_out, 1);
}

// Fault handling for the time of a launch.
class Guard {
 public:
  Guard() {
    static char* alternate = static_cast<char*>(malloc(64 << 10));
    const stack_t mine{alternate, 0, 64 << 10};
    sigaltstack(&mine, &stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~Guard() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  stack_t stack_;
  struct sigaction segv_, bus_;
};

std::vector<size_t> arranged(size_t count, std::mt19937& random) {
  std::vector<size_t> index(count);
  for (size_t i = 0; i < count; ++i) index[i] = order == kReverse ? count - 1 - i : i;
  if (order == kRandom) std::shuffle(index.begin(), index.end(), random);
  return index;
}

void start(Launch& l, dim3 blocks, size_t first_block, unsigned threads, size_t shared_bytes, dim3 grid) {
  for (size_t rank = 0; rank < l.blocks.size(); ++rank) {
    Block& block = l.blocks[rank];
    allow(block.memory, PROT_READ | PROT_WRITE);
    memset(block.memory.data, 0xff, (shared_bytes + 15) / 16 * 16);
    block.barrier = Barrier{};
    block.barrier.live = static_cast<int>(threads);
    block.warps.assign(threads / kWarp, Warp{});
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = l.fibers[rank * threads + t];
      const size_t b = first_block + rank;
      fiber.place = {dim3(t, 0, 0),
                     dim3(b % blocks.x, b / blocks.x % blocks.y, b / blocks.x / blocks.y),
                     dim3(threads),
                     grid,
                     static_cast<int>(t % kWarp),
                     static_cast<int>(rank)};
      fiber.block = &block, fiber.warp = &block.warps[t / kWarp];
      fiber.waits_for = nullptr, fiber.done = false, fiber.group = 0;
      fiber.copies.clear();
      prepare(fiber.context, fiber.stack, entry);
    }
  }
  l.cluster = Barrier{};
  l.cluster.live = static_cast<int>(l.fibers.size());
}

// Every thread of turn [first, end) that need not wait runs once. -> whether one did.
bool take_turns(Launch& l, const std::vector<size_t>& turn, size_t first, size_t end, size_t& left) {
  bool progress = false;
  for (size_t t = first; t < end; ++t) {
    Fiber& fiber = l.fibers[turn[t]];
    if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
    now = &fiber;
    switch_to(l.scheduler, fiber.context);
    now = nullptr;
    progress = true;
    left -= fiber.done;
  }
  return progress;
}

// Until every thread is done.
void schedule(Launch& l, std::mt19937& random) {
  size_t left = l.fibers.size();
  std::vector<size_t> turn = arranged(l.fibers.size(), random);
  const size_t together = order == kBlockByBlock ? turn.size() / l.blocks.size() : turn.size();
  while (left) {
    bool progress = false;
    if (order == kRandom) std::shuffle(turn.begin(), turn.end(), random);
    for (size_t first = 0; first < turn.size(); first += together)
      while (take_turns(l, turn, first, first + together, left)) {
        progress = true;
        if (order != kBlockByBlock) break;
      }
    if (!progress) fail("deadlock: %zu threads wait for others that have ended or wait elsewhere", left);
  }
}

int barriers_of(const Launch& l) {
  unsigned all = 0;
  for (const Block& block : l.blocks) all += block.barrier.generation;
  return static_cast<int>(all);
}

template <class T> bool within(const void* address, const T* first, size_t bytes) {
  const char *at = static_cast<const char*>(address), *start = reinterpret_cast<const char*>(first);
  return at >= start && at < start + bytes;
}

}  // namespace

bool running() { return now != nullptr; }

Memory memory_of(const void* address) {
  if (within(address, now->stack, kStackBytes)) return Memory::kRegisters;
  for (const Block& block : launch_->blocks) {
    if (within(address, block.memory.mapping, block.memory.mapped)) return Memory::kShared;
    if (within(address, block.warps.data(), block.warps.size() * sizeof(Warp))) return Memory::kRegisters;
  }
  if (within(address, launch_->fibers.data(), launch_->fibers.size() * sizeof(Fiber))) return Memory::kRegisters;
  // of the thread that launched: the arguments; of this library: constants
  const char* stack = static_cast<const char*>(launch_->argument);
  if (within(address, stack - (64 << 10), 1 << 20)) return Memory::kRegisters;
  if (within(address, &__ehdr_start, &_end - &__ehdr_start)) return Memory::kRegisters;
  return Memory::kGlobal;
}

const Place& here() { return now->place; }
char* shared() { return now->block->memory.data; }
char* shared_of(int rank) { return launch_->blocks.at(rank).memory.data; }
void barrier() { arrive(now->block->barrier, false); }
void cluster_barrier() { arrive(launch_->cluster, false); }
int barrier_count(bool predicate) { return arrive(now->block->barrier, predicate); }
int shared_limit() { return limit; }

void copy_async(void* to, const void* from, int bytes, int given) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) || given < 0 || given > bytes)
    fail("cp.async of %d bytes, %d given", bytes, given);
  if (reinterpret_cast<uintptr_t>(to) % bytes || (given && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async is misaligned");
  Copy copy{to, {}, bytes, given, now->group};
  if (on_copy) on_copy(__builtin_return_address(0), to, from, bytes, given);
  if (given) memcpy(copy.data, from, given);
  memset(to, 0xff, bytes);
  now->copies.push_back(copy);
}
void copy_async_commit() { ++now->group; }
void copy_async_wait(int pending) {
  auto& copies = now->copies;
  if (on_wait) {
    int bytes = 0;
    for (const Copy& copy : copies) bytes += copy.given;
    on_wait(bytes);
  }
  size_t kept = 0;
  for (const Copy& copy : copies)
    if (copy.group < now->group - pending)
      memcpy(copy.to, copy.data, copy.bytes);
    else
      copies[kept++] = copy;
  copies.resize(kept);
}

const char* exchange(const char* kind, unsigned mask, const void* mine, int bytes) {
  if (mask != 0xffffffffu) fail("%s: only the full mask is allowed, got %08x", kind, mask);
  Warp& warp = *now->warp;
  if (warp.arrived == 0)
    warp.kind = kind;
  else if (strcmp(warp.kind, kind))
    fail("lanes of one warp met in %s and in %s", warp.kind, kind);
  const unsigned generation = warp.generation;
  char* values = warp.values[generation & 1];
  if (bytes) memcpy(values + now->place.lane * kExchangeBytes, mine, bytes);
  if (++warp.arrived == kWarp)
    warp.arrived = 0, ++warp.generation;
  else
    wait_for(warp.generation, generation);
  return values;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(problem, sizeof(problem), format, arguments);
  va_end(arguments);
  siglongjmp(way_out, 1);
}

const char* run(const void* kernel, Body body, void* argument, dim3 blocks, unsigned threads, unsigned cluster,
                size_t shared_bytes) {
  const size_t count = static_cast<size_t>(blocks.x) * blocks.y * blocks.z;
  if (threads % kWarp || threads == 0 || threads > 1024)
    return "a block must have a multiple of 32 threads, at most 1024";
  if (count == 0 || blocks.y > 65535 || blocks.z > 65535) return "invalid configuration argument: the grid";
  if (shared_bytes > static_cast<size_t>(limit)) return "more shared memory than a block may have";
  if (cluster == 0 || blocks.x % cluster) return "the grid is not a multiple of the cluster";
  if (damage[0]) return damage;
  Launch launch{body, argument};
  launch.blocks.resize(cluster);
  launch.fibers.resize(static_cast<size_t>(cluster) * threads);
  while (stacks.size() < launch.fibers.size()) stacks.push_back(fenced(kStackBytes, kPage));
  for (size_t i = 0; i < launch.fibers.size(); ++i) launch.fibers[i].stack = stacks[i];
  for (Block& block : launch.blocks) block.memory = guarded(shared_bytes, 16);
  launch_ = &launch;
  if (on_launch) on_launch(kernel, {blocks, threads, shared_bytes});
  std::mt19937 random(order_seed);
  const std::vector<size_t> turn = arranged(count / cluster, random);
  const Guard guard;
  volatile bool failed = false;
  if (sigsetjmp(way_out, 1) == 0) {
    for (const size_t i : turn) {
      start(launch, blocks, i * cluster, threads, shared_bytes, blocks);
      schedule(launch, random);
      if (on_blocks_ended) on_blocks_ended(barriers_of(launch));
    }
  } else {
    failed = true;
  }
  now = nullptr, launch_ = nullptr;
  for (Block& block : launch.blocks) munmap(block.memory.mapping, block.memory.mapped);
  return failed ? problem : nullptr;
}

}  // namespace emulator

// ---- what tests call --------------------------------------------------------------------------------------------

#pragma GCC visibility push(default)
extern "C" {

// 0 forward, 1 reverse, 2 random with this seed: of the blocks, and of the threads of a block. 3: forward, and of the
// blocks of a cluster each goes as far as it can alone.
void emulator_order(int kind, unsigned seed) {
  emulator::order = static_cast<emulator::Order>(kind), emulator::order_seed = seed;
}

void emulator_shared_limit(int bytes) { emulator::limit = bytes; }

// Memory between guards, full of 0xff. `alignment` in bytes.
void* emulator_allocate(size_t bytes, size_t alignment) {
  const emulator::Guarded g = emulator::guarded(bytes, alignment);
  emulator::buffers[g.data] = g;
  return g.data;
}

void emulator_free(void* data) {
  const auto found = emulator::buffers.find(data);
  if (found == emulator::buffers.end()) return;
  if (!emulator::untouched_around(found->second))
    snprintf(emulator::damage, sizeof(emulator::damage), "a buffer of %zu bytes was written beyond its end",
             found->second.bytes);
  munmap(found->second.mapping, found->second.mapped);
  emulator::buffers.erase(found);
}

// What was found when buffers were freed, or nullptr; forgotten by the call.
const char* emulator_damage() {
  static char last[sizeof(emulator::damage)];
  memcpy(last, emulator::damage, sizeof(last));
  emulator::damage[0] = 0;
  return last[0] ? last : nullptr;
}
}
