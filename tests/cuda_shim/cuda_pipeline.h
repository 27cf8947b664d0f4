// Asynchronous copies into shared memory: at once, or only when they are waited for.
#pragma once
#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) std::abort();
    if (shim::device.backward)
        std::memcpy(to, from, bytes);
    else
        shim::current->copies.back().push_back({to, from, bytes});
}

inline void __pipeline_commit() { shim::current->copies.emplace_back(); }

inline void __pipeline_wait_prior(size_t latest) {
    auto& copies = shim::current->copies;
    for (; copies.size() > latest + 1; copies.pop_front())
        for (const shim::Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}
