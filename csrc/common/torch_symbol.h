// libtorch as it is in the process, so that nothing links to it: `import sslops` imports torch before the core.
#pragma once
#include <dlfcn.h>

namespace sslops {

// The address of an extern "C" symbol, null if this version of torch has no such.
inline void* torch_symbol(const char* name) {
#ifdef __APPLE__
  void* const library = dlopen("libtorch_cpu.dylib", RTLD_LAZY | RTLD_NOLOAD);
#else
  void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
#endif
  return library ? dlsym(library, name) : nullptr;
}

}  // namespace sslops
