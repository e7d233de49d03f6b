// One source, one object per instruction set, one choice at run time.
// Each csrc/cpu/<op>.cpp is compiled with SSLOPS_ISA naming the set and defines one table of function pointers.
#pragma once
#include <string>

#include "bound.h"

#if defined(__x86_64__)
#define SSLOPS_EACH_ISA(X) X(portable) X(avx2) X(avx512) X(amx)
#else
#define SSLOPS_EACH_ISA(X) X(portable)
#endif

namespace sslops {

enum class Isa { portable, avx2, avx512, amx };

bool isa_supported(Isa isa);
Isa current_isa();
// For tests and for comparing: use a lower set than the machine has. Throws std::invalid_argument if it has not got it.
void set_isa(const std::string& name);
const char* isa_name(Isa isa);

}  // namespace sslops

// Declares `Table` for every ISA and `const Table& name()`, the one to call now.
#define SSLOPS_DECLARE_ONE(isa) \
  namespace isa {               \
  extern const Table table;     \
  }
#define SSLOPS_PICK_ONE(isa) \
  case Isa::isa:             \
    return isa::table;
#define SSLOPS_DECLARE_TABLE           \
  SSLOPS_EACH_ISA(SSLOPS_DECLARE_ONE)  \
  inline const Table& table() {        \
    switch (current_isa()) {           \
      SSLOPS_EACH_ISA(SSLOPS_PICK_ONE) \
      default:                         \
        return portable::table;        \
    }                                  \
  }
