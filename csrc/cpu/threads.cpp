#include "cpu/threads.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace bbopd::cpu {
namespace {

// The entry points of GNU's OpenMP, which LLVM's and Intel's offer as well: whichever one torch has loaded into the
// process.
struct OpenMp {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Number = int (*)();
  Parallel parallel = nullptr;
  Number thread = nullptr, threads = nullptr;
  OpenMp() {
    parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    threads = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  }
  bool is_there() const { return parallel != nullptr && thread != nullptr && threads != nullptr; }
};

const OpenMp& openmp() {
  static const OpenMp found;
  return found;
}

struct Team {
  int slots;
  void (*body)(void*, int);
  void* context;
};

// The team may be smaller than asked for: every thread takes each so-many-th slot.
void run_share(void* pointer) {
  const Team& team = *static_cast<Team*>(pointer);
  for (int slot = openmp().thread(); slot < team.slots; slot += openmp().threads()) team.body(team.context, slot);
}

}  // namespace

void parallel(int slots, void (*body)(void*, int), void* context) {
  if (slots <= 1) {
    for (int slot = 0; slot < slots; ++slot) body(context, slot);
    return;
  }
  Team team{slots, body, context};
  if (openmp().is_there()) {
    openmp().parallel(run_share, &team, static_cast<unsigned>(slots), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int slot = 1; slot < slots; ++slot) others.emplace_back([=] { body(context, slot); });
  body(context, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace bbopd::cpu
