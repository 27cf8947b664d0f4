// The Gram matrix. Every chunk of columns leaves K (K + 1) / 2 partial sums in the workspace, [pair, chunk]; a second
// kernel adds them. Chunks depend on the sizes alone and every sum has a fixed order, so that the bits depend neither
// on the device nor on the rows' alignment.
#pragma once
#include <cuda_pipeline.h>

#include "elements.cuh"
#include "table.cuh"

namespace dtr::cuda {

// Pairs i <= j of K rows, row by row.
__host__ __device__ constexpr int pairs_of(int K) { return K * (K + 1) / 2; }
__device__ inline int pair_number(int i, int j, int K) { return i * K - i * (i - 1) / 2 + j - i; }
__device__ inline int2 pair_at(int number, int K) {
    int i = 0;
    for (; number >= K - i; ++i) number -= K - i;
    return {i, i + number};
}

// Where a kernel leaves its partial sums.
struct Partials {
    double* sums;    // [pairs, chunks]
    int64_t chunks;  // of all tables
    int64_t before;  // chunks of the tables before this one

    __device__ void write(int pair, int64_t chunk, double sum) const { sums[pair * chunks + before + chunk] = sum; }
};

using GramKernel = void (*)(Table, Partials);

// ---- K <= 8: a thread multiplies all pairs of its columns, straight from registers.

constexpr int kGramThreads = 256;
constexpr int kFewClusters = 8;

// The sum of each warp's lanes, in lane 0.
__device__ inline double warp_sum(double x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

template <class T, int K>
__global__ void __launch_bounds__(kGramThreads) gram_kernel(const __grid_constant__ Table table, Partials partials) {
    constexpr int N = kVector<T>, kPairs = pairs_of(K), kWarps = kGramThreads / 32;
    __shared__ float products[kPairs][kGramThreads];
    const int thread = threadIdx.x;

    table.for_each_chunk([&](int64_t chunk, int segment, int64_t begin, int64_t end) {
        float sums[kPairs] = {};
        const auto add = [&](const float(&x)[K]) {
#pragma unroll
            for (int i = 0, pair = 0; i < K; ++i)
#pragma unroll
                for (int j = i; j < K; ++j, ++pair) sums[pair] += x[i] * x[j];
        };

        int64_t tile = begin;
        if (table.aligned >> segment & 1)
#pragma unroll 1
            for (; tile + kGramThreads * N <= end; tile += kGramThreads * N) {
                Pack<T, N> packs[K];
#pragma unroll
                for (int k = 0; k < K; ++k) packs[k] = load<N>(table.row<const T>(segment, k) + tile + thread * N);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    float x[K];
#pragma unroll
                    for (int k = 0; k < K; ++k) x[k] = widened(packs[k].values[n]);
                    add(x);
                }
            }
        // The same columns in the same order, one at a time.
        for (; tile < end; tile += kGramThreads * N)
#pragma unroll 1
            for (int64_t column = tile + thread * N; column < end && column < tile + (thread + 1) * N; ++column) {
                float x[K];
#pragma unroll
                for (int k = 0; k < K; ++k) x[k] = widened(table.row<const T>(segment, k)[column]);
                add(x);
            }

#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) products[pair][thread] = sums[pair];
        __syncthreads();
        for (int pair = thread / 32; pair < kPairs; pair += kWarps) {
            double sum = 0;
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) sum += products[pair][warp * 32 + thread % 32];
            sum = warp_sum(sum);
            if (thread % 32 == 0) partials.write(pair, chunk, sum);
        }
        __syncthreads();
    });
}

// ---- K > 8: tiles of columns pass through shared memory.
//
// With T4 = ceil(K / 4), a thread owns the 4 x 4 pairs of rows (a + T4 r, b + T4 s), a <= b < T4. As there are fewer of
// these than threads, several sets of threads share out the columns of a tile. A row of a tile is an odd number of
// 16-byte vectors, so that threads that read the same vector of consecutive rows hit different banks.

constexpr int kTiledThreads = 160;  // K = 16, 32, 64: 16, 4, 1 sets, with few threads left over
constexpr int kTiledBlocks = 3;     // at a time on an SM: 128 registers per thread
constexpr int kStages = 3;          // two tiles are under way while one is multiplied
constexpr int kTileVectors = 960;   // 3 x 15 KiB

template <class T>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks)
    gram_tiled_kernel(const __grid_constant__ Table table, Partials partials) {
    constexpr int N = kVector<T>;
    using Vector = Pack<T, N>;
    // Products that are added in fp32 before their sum moves on to fp64.
    constexpr int kStretch = 64;
    __shared__ union Shared {
        uint4 tiles[kStages][kTileVectors];
        double sums[16][kTiledThreads];
    } shared;

    const int K = table.rows_per_segment, T4 = (K + 3) / 4;
    const int members = pairs_of(T4), sets = kTiledThreads / members;
    const int row_vectors = (kTileVectors / (4 * T4) - 1) | 1;
    const int thread = threadIdx.x, set = thread / members;
    const int2 ab = pair_at(thread % members, T4);
    const int rounds = (row_vectors + sets - 1) / sets;

    table.for_each_chunk([&](int64_t chunk, int segment, int64_t begin, int64_t end) {
        const bool aligned = table.aligned >> segment & 1;
        const int64_t columns = row_vectors * N;
        const int tiles = static_cast<int>((end - begin + columns - 1) / columns);
        const auto vectors_of = [&](int tile) {
            const int64_t left = (end - begin - tile * columns + N - 1) / N;
            return left < row_vectors ? static_cast<int>(left) : row_vectors;
        };
        const auto fetch = [&](int tile) {
            const int vectors = tile < tiles ? vectors_of(tile) : 0;
            const int64_t from = begin + tile * columns;
            uint4* to = shared.tiles[tile % kStages];
            for (int k = thread / row_vectors, vector = thread % row_vectors; k < K;) {
                const int64_t column = from + vector * N;
                if (vector < vectors) {
                    const T* row = table.row<const T>(segment, k);
                    uint4* slot = to + k * row_vectors + vector;
                    if (aligned && column + N <= end)
                        __pipeline_memcpy_async(slot, row + column, 16);
                    else
                        for (int n = 0; n < N; ++n)
                            reinterpret_cast<T*>(slot)[n] = column + n < end ? row[column + n] : narrowed<T>(0.0f);
                }
                k += kTiledThreads / row_vectors;
                vector += kTiledThreads % row_vectors;
                if (vector >= row_vectors) {
                    vector -= row_vectors;
                    ++k;
                }
            }
            __pipeline_commit();
        };

        double totals[4][4] = {};
        float sums[4][4] = {};
        for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
        for (int tile = 0, products = 0; tile < tiles; ++tile) {
            __pipeline_wait_prior(kStages - 2);
            __syncthreads();
            fetch(tile + kStages - 1);
            const Vector* rows = reinterpret_cast<const Vector*>(shared.tiles[tile % kStages]);
            for (int vector = set; set < sets && vector < vectors_of(tile); vector += sets) {
                Vector x[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) x[r] = rows[(ab.x + T4 * r) * row_vectors + vector];
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    const Vector y = rows[(ab.y + T4 * s) * row_vectors + vector];
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int r = 0; r < 4; ++r) sums[r][s] += widened(x[r].values[n]) * widened(y.values[n]);
                }
            }
            products += rounds * N;
            if (products >= kStretch || tile + 1 == tiles) {
                products = 0;
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        totals[r][s] += sums[r][s];
                        sums[r][s] = 0;
                    }
            }
        }

        __syncthreads();
#pragma unroll
        for (int rs = 0; rs < 16; ++rs) shared.sums[rs][thread] = totals[rs / 4][rs % 4];
        __syncthreads();
        for (int n = thread; n < 16 * members; n += kTiledThreads) {
            const int rs = n / members, member = n % members;
            const int2 first = pair_at(member, T4);
            const int i = first.x + T4 * (rs / 4), j = first.y + T4 * (rs % 4);
            if (i >= K || j >= K || (first.x == first.y && i > j)) continue;
            double sum = 0;
            for (int s = 0; s < sets; ++s) sum += shared.sums[rs][s * members + member];
            partials.write(i < j ? pair_number(i, j, K) : pair_number(j, i, K), chunk, sum);
        }
        __syncthreads();
    });
}

// One block for each pair.
__global__ void __launch_bounds__(kGramThreads)
    sum_partials_kernel(int K, const double* partials, int64_t chunks, double* out) {
    __shared__ double warps[kGramThreads / 32];
    const int thread = threadIdx.x;
    double sum = 0;
#pragma unroll 4
    for (int64_t chunk = thread; chunk < chunks; chunk += kGramThreads) sum += partials[blockIdx.x * chunks + chunk];
    sum = warp_sum(sum);
    if (thread % 32 == 0) warps[thread / 32] = sum;
    __syncthreads();
    if (thread > 0) return;
    sum = 0;
    for (const double warp : warps) sum += warp;
    const int2 ij = pair_at(blockIdx.x, K);
    out[ij.x * K + ij.y] = out[ij.y * K + ij.x] = sum;
}

}  // namespace dtr::cuda
