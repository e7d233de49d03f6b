#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sslops {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
// AMX needs the kernel's leave to use its tile registers (arch_prctl), once a process.
bool amx_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool avx512_bf16 = a & (1u << 5);
#if defined(SSLOPS_EMULATE_AMX)
  return avx512_bf16;
#elif defined(__linux__)
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool amx_bf16 = d & (1u << 22), amx_tile = d & (1u << 24);
  constexpr int kReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return amx_bf16 && amx_tile && avx512_bf16 && syscall(SYS_arch_prctl, kReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
  Isa best = Isa::portable;
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::amx})
    if (isa_supported(isa)) best = isa;
  return best;
}

Isa& chosen() {
  static Isa isa = best_isa();
  return isa;
}

}  // namespace

bool isa_supported(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  static const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // clang's builtin does not know it
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool amx = avx512 && amx_usable();
  return isa == Isa::avx2 ? avx2 : isa == Isa::avx512 ? avx512 : amx;
#else
  return false;
#endif
}

Isa current_isa() { return chosen(); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void set_isa(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx})
    if (name == isa_name(isa)) {
      if (!isa_supported(isa)) throw std::invalid_argument("this machine has no " + name);
      chosen() = isa;
      return;
    }
  throw std::invalid_argument("unknown instruction set: " + name);
}

}  // namespace sslops
