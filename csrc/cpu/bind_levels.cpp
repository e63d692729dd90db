#include "cpu/bind_levels.h"

#include <cstdlib>
#if defined(SPCL_HAS_X86_LEVELS)
#include <cpuid.h>
#endif

namespace spcl {
namespace {

#define SPCL_KERNELS(ISA)                                                                                   \
  Kernels {                                                                                                 \
    #ISA, &ISA::contrast_forward_scratch, &ISA::contrast_forward, &ISA::contrast_backward_scratch,          \
        &ISA::contrast_backward, &ISA::streamed_forward_scratch, &ISA::streamed_forward,                    \
        &ISA::streamed_backward_scratch, &ISA::streamed_take, &ISA::streamed_backward, &ISA::streamed_give, \
        &ISA::class_moments_scratch, &ISA::class_moments, &ISA::upsampled_cross_entropy_scratch,            \
        &ISA::upsampled_cross_entropy, &ISA::upsampled_prediction_scratch, &ISA::upsampled_prediction,      \
        &ISA::upsampled_confusion_scratch, &ISA::upsampled_confusion                                        \
  }

const Kernels kLevels[] = {
    SPCL_KERNELS(baseline),
#if defined(SPCL_HAS_X86_LEVELS)
    SPCL_KERNELS(avx2),
    SPCL_KERNELS(avx512),
#endif
};

#if defined(SPCL_HAS_X86_LEVELS)
// Not every compiler's __builtin_cpu_supports knows this one.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Asks for all that X86_LEVELS in setup.py lets the compiler use.
size_t best_level() {
#if defined(SPCL_HAS_X86_LEVELS)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = [] {
    const size_t best = best_level();
    const char* asked = std::getenv("SPCL_FAST_CPU_CAPABILITY");
    for (size_t i = 0; asked && i < best; ++i)
      if (std::string(asked) == kLevels[i].name) return &kLevels[i];
    return &kLevels[best];
  }();
  return *chosen;
}

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (const Kernels& level : kLevels) names.push_back(level.name);
  return names;
}

}  // namespace spcl
