// Runs a body on several threads of the pool that torch itself uses, so that the two never compete for cores.
#pragma once

namespace bbopd::cpu {

// Calls `body(slot)` once for each slot from 0 to slots - 1, and returns when all are done. Which thread runs a slot
// does not matter to what the slot computes. The body must not throw.
void parallel(int slots, void (*body)(void* context, int slot), void* context);

template <class Body>
void parallel(int slots, Body body) {
  parallel(slots, [](void* context, int slot) { (*static_cast<Body*>(context))(slot); }, &body);
}

}  // namespace bbopd::cpu
