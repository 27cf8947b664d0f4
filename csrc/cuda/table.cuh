// Pointers to the gradients as a kernel argument: nothing is copied to the device, and a CUDA graph keeps them.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../surgery.h"

namespace dtr::cuda {

// Some of the segments, cut into chunks of columns, each the work of one block at a time. Many segments, or many
// gradients, take several tables and so several launches.
struct Table {
    // Every driver takes 4096 bytes of arguments.
    static constexpr int kSegments = 64;
    static constexpr int kRows = 352;

    int segments = 0;
    int rows_per_segment;    // K, and one more where there is an output
    int64_t columns;         // of a chunk; the last one of a segment may have fewer
    uint64_t aligned = 0;    // bit s: every row of segment s begins at a multiple of 16 bytes
    int64_t first[kSegments + 1] = {0};  // the number of chunks before each segment
    int64_t sizes[kSegments];
    void* rows[kRows];

    __host__ __device__ int64_t chunks() const { return first[segments]; }

    template <class T>
    __device__ T* row(int segment, int k) const {
        return static_cast<T*>(rows[segment * rows_per_segment + k]);
    }

    // Calls f(chunk, segment, begin, end) for the block's share of the chunks.
    template <class F>
    __device__ void for_each_chunk(F f) const {
        int segment = 0;
        for (int64_t chunk = blockIdx.x; chunk < chunks(); chunk += gridDim.x) {
            while (chunk >= first[segment + 1]) ++segment;
            const int64_t begin = (chunk - first[segment]) * columns, size = sizes[segment];
            f(chunk, segment, begin, size - begin < columns ? size : begin + columns);
        }
    }
};
static_assert(sizeof(Table) <= 4000, "leaves room for the other arguments");

inline int64_t chunks_of(int64_t size, int64_t columns) { return (size + columns - 1) / columns; }

// Calls f(table) for all segments with elements; stops at the first that does not return null.
template <class F>
const char* for_each_table(const Gradients& g, void* const* out, int64_t columns, F f) {
    Table empty;
    empty.rows_per_segment = static_cast<int>(g.K) + (out ? 1 : 0);
    empty.columns = columns;
    const int most_segments = std::min(Table::kSegments, Table::kRows / empty.rows_per_segment);
    Table table = empty;
    for (int64_t s = 0; s < g.segments; ++s) {
        if (g.sizes[s] == 0) continue;
        if (table.segments == most_segments) {
            if (const char* error = f(table)) return error;
            table = empty;
        }
        void** row = table.rows + table.segments * table.rows_per_segment;
        std::copy(g.data + s * g.K, g.data + (s + 1) * g.K, row);
        if (out) row[g.K] = out[s];
        const bool aligned = std::all_of(row, row + table.rows_per_segment,
                                         [](void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
        table.aligned |= uint64_t{aligned} << table.segments;
        table.sizes[table.segments] = g.sizes[s];
        table.first[table.segments + 1] = table.chunks() + chunks_of(g.sizes[s], columns);
        ++table.segments;
    }
    return table.segments ? f(table) : nullptr;
}

}  // namespace dtr::cuda
