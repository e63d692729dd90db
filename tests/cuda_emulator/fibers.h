// What the emulator's threads stand on: stacks that are switched by hand, and memory between guards.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {
namespace {

// A guard is only address space: it is wide, so that a wild index lands in it and not in the memory of the test's own
// process.
constexpr size_t kStackBytes = 64 << 10, kPage = 4096, kGuard = 64 << 20;

// ---- switching stacks -------------------------------------------------------------------------------------------

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};

asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(Context* from, Context* to);

void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;  // entry sees the alignment that a call gives
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
void switch_to(Context& from, Context& to) { emulator_switch(&from, &to); }
#else
struct Context {
  ucontext_t state;
};

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack, context.state.uc_stack.ss_size = kStackBytes, context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

// ---- guarded memory ---------------------------------------------------------------------------------------------

struct Guarded {
  char* mapping = nullptr;
  size_t mapped = 0;
  char* data = nullptr;
  size_t bytes = 0;
};

size_t to_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// `inside` bytes (whole pages) between two guards that may not be touched.
char* fenced(size_t inside, size_t guard) {
  void* mapping = mmap(nullptr, inside + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) abort();
  char* data = static_cast<char*>(mapping) + guard;
  if (mprotect(data, inside, PROT_READ | PROT_WRITE)) abort();
  return data;
}

// `bytes` that end (but for what `alignment` needs) at memory which may not be touched; such memory before, too. All
// 0xff.
Guarded guarded(size_t bytes, size_t alignment) {
  Guarded g;
  const size_t inside = to_pages(bytes + alignment);
  char* start = fenced(inside, kGuard);
  memset(start, 0xff, inside);
  g.mapping = start - kGuard, g.mapped = inside + 2 * kGuard;
  g.data = start + inside - (bytes + alignment - 1) / alignment * alignment;
  g.bytes = bytes;
  return g;
}

// Whether nothing was written between the data and its guards.
bool untouched_around(const Guarded& g) {
  for (const char* p = g.mapping + kGuard; p < g.data; ++p)
    if (*p != static_cast<char>(0xff)) return false;
  for (const char* p = g.data + g.bytes; p < g.mapping + g.mapped - kGuard; ++p)
    if (*p != static_cast<char>(0xff)) return false;
  return true;
}

// May the memory between the guards be touched?
void allow(const Guarded& g, int what) { mprotect(g.mapping + kGuard, g.mapped - 2 * kGuard, what); }

}  // namespace
}  // namespace emulator
