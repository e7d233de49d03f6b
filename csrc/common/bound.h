// What Python calls: functions of a table, each with its name.
#pragma once
#include <tuple>

#pragma GCC diagnostic ignored "-Wparentheses"  // of what nvcc makes of a pointer to a member

namespace sslops {

// A function of a table and the name that Python knows it by: a table's `bound()` lists them.
template <typename Table, typename Result, typename... Arguments>
struct Bound {
  const char* name;
  Result (*Table::*function)(Arguments...);
};
template <typename Table, typename Result, typename... Arguments>
Bound(const char*, Result (*Table::*)(Arguments...)) -> Bound<Table, Result, Arguments...>;

// A CUDA stream: the last argument of what is launched on one.
struct Stream {
  void* handle;
};

}  // namespace sslops
