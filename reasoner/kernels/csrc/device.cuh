// The device as the kernels see it: every PTX instruction and every built-in behind a function with two bodies.
//
// Under nvcc the bodies are CUDA; under g++ they call emulator.h. A kernel that uses only these functions is one source
// for both. Launchers are `extern "C" int name(..., void* stream)`; they return 0, or an error that `error_text`
// explains.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#include "emulator.h"
#define KERNEL(threads) void
#define DEVICE inline
#define UNROLL
#endif

using i64 = long long;
constexpr unsigned everyone = 0xffffffffu;

struct Grid { int x, y = 1, z = 1; };

// ---- where a thread is -------------------------------------------------------------------------------------------
#ifdef __CUDACC__
DEVICE int thread() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE int blocks_y() { return gridDim.y; }
DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}
#else
DEVICE int thread() { return emulator::machine.current->index; }
DEVICE int threads() { return static_cast<int>(emulator::machine.fibers.size()); }
DEVICE int block_x() { return emulator::machine.block.x; }
DEVICE int block_y() { return emulator::machine.block.y; }
DEVICE int block_z() { return emulator::machine.block.z; }
DEVICE int blocks_x() { return emulator::machine.grid.x; }
DEVICE int blocks_y() { return emulator::machine.grid.y; }
DEVICE unsigned char* shared_memory() { return emulator::machine.shared_start; }
#endif
DEVICE int lane() { return thread() % 32; }
DEVICE int warp() { return thread() / 32; }

// ---- launching ---------------------------------------------------------------------------------------------------
#ifdef __CUDACC__
template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, size_t shared, void* stream, A... arguments) {
    if (shared > 48 << 10) {
        auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared));
        if (error) return error;
    }
    dim3 blocks(grid.x, grid.y, grid.z);
    kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
    return cudaGetLastError();
}
extern "C" const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#else
template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, size_t shared, void*, A... arguments) {
    return emulator::run({grid.x, grid.y, grid.z}, threads, shared, [=] { kernel(static_cast<P>(arguments)...); });
}
extern "C" const char* error_text(int) { return emulator::machine.error; }
#endif

// ---- waiting for each other --------------------------------------------------------------------------------------
#ifdef __CUDACC__
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
template <class T> DEVICE T from_lane(T value, int source) { return __shfl_sync(everyone, value, source); }
template <class T> DEVICE T from_lane_xor(T value, int mask) { return __shfl_xor_sync(everyone, value, mask); }
DEVICE unsigned lanes_where(bool condition) { return __ballot_sync(everyone, condition); }
DEVICE int count_bits(unsigned mask) { return __popc(mask); }
#else
DEVICE void barrier() { emulator::block_barrier(); }
DEVICE void warp_barrier() { emulator::exchange("", 0); }
template <class T> DEVICE T from_lane(T value, int source) {
    T result;
    memcpy(&result, emulator::exchange(&value, sizeof value)[source], sizeof result);
    return result;
}
template <class T> DEVICE T from_lane_xor(T value, int mask) { return from_lane(value, lane() ^ mask); }
DEVICE unsigned lanes_where(bool condition) {
    auto slots = emulator::exchange(&condition, sizeof condition);
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<unsigned>(slots[i][0] != 0) << i;
    return mask;
}
DEVICE int count_bits(unsigned mask) { return __builtin_popcount(mask); }
#endif

template <class T> DEVICE T warp_sum(T value) {
    UNROLL for (int mask = 16; mask; mask >>= 1) value += from_lane_xor(value, mask);
    return value;
}
DEVICE float warp_max(float value) {
    UNROLL for (int mask = 16; mask; mask >>= 1) {
        float other = from_lane_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

// The sum over a block, given to every thread. `scratch`: 33 numbers of shared memory, free for the next sum at once
// and for anything else after a barrier.
template <class T> DEVICE T block_sum(T value, T* scratch) {
    value = warp_sum(value);
    if (lane() == 0) scratch[warp()] = value;
    barrier();
    if (warp() == 0) {
        value = warp_sum(lane() < threads() / 32 ? scratch[lane()] : T(0));
        if (lane() == 0) scratch[32] = value;
    }
    barrier();
    return scratch[32];
}

// ---- numbers -----------------------------------------------------------------------------------------------------
struct alignas(2) bf16 { uint16_t bits; };
struct alignas(16) Four { float at[4]; };
struct alignas(16) Eight { bf16 at[8]; };

constexpr float minus_infinity = -__builtin_huge_valf();
constexpr float log2e = 1.4426950408889634f, ln2 = 0.6931471805599453f;

DEVICE float reinterpret_float(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, 4);
    return value;
#endif
}
DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return reinterpret_float(static_cast<uint32_t>(value.bits) << 16); }

template <class T> DEVICE T from_float(float value);
template <> DEVICE float from_float<float>(float value) { return value; }
template <> DEVICE bf16 from_float<bf16>(float value) {  // to nearest, ties to even; NaN stays NaN
    bf16 result;
#ifdef __CUDACC__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    uint32_t bits;
    memcpy(&bits, &value, 4);
    result.bits = value != value ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
    return result;
}

#ifdef __CUDACC__
DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float rsqrt_of(float x) { return rsqrtf(x); }
DEVICE float log_of(float x) { return logf(x); }
template <class T> DEVICE void add_atomic(T* where, T value) { atomicAdd(where, value); }
#else
DEVICE float exp2_fast(float x) { return std::exp2(x); }
DEVICE float rsqrt_of(float x) { return 1.0f / std::sqrt(x); }
DEVICE float log_of(float x) { return std::log(x); }
template <class T> DEVICE void add_atomic(T* where, T value) { *where += value; }
#endif
DEVICE float exp_fast(float x) { return exp2_fast(x * log2e); }
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

// ---- memory ------------------------------------------------------------------------------------------------------
// Vector accesses: the address must be a multiple of the vector's size.
template <class V> DEVICE V load_vector(const void* from) {
#ifndef __CUDACC__
    if (reinterpret_cast<uintptr_t>(from) % sizeof(V)) emulator::fail("misaligned vector load");
#endif
    return *static_cast<const V*>(from);
}
template <class V> DEVICE void store_vector(void* to, V value) {
#ifndef __CUDACC__
    if (reinterpret_cast<uintptr_t>(to) % sizeof(V)) emulator::fail("misaligned vector store");
#endif
    *static_cast<V*>(to) = value;
}

// Eight neighbours as floats, of which `count` exist; `vectors`: the address is a multiple of 16 bytes and all eight
// exist.
template <class T> DEVICE void load_eight(const T* from, float (&out)[8], int count, bool vectors) {
    if (vectors && count >= 8) {
        if constexpr (sizeof(T) == 2) {
            Eight eight = load_vector<Eight>(from);
            UNROLL for (int j = 0; j < 8; ++j) out[j] = to_float(eight.at[j]);
        } else {
            Four low = load_vector<Four>(from), high = load_vector<Four>(from + 4);
            UNROLL for (int j = 0; j < 4; ++j) out[j] = low.at[j], out[j + 4] = high.at[j];
        }
    } else {
        UNROLL for (int j = 0; j < 8; ++j) out[j] = j < count ? to_float(from[j]) : 0.0f;
    }
}
template <class T> DEVICE void store_eight(T* to, const float (&values)[8], int count, bool vectors) {
    if (vectors && count >= 8) {
        if constexpr (sizeof(T) == 2) {
            Eight eight;
            UNROLL for (int j = 0; j < 8; ++j) eight.at[j] = from_float<bf16>(values[j]);
            store_vector(to, eight);
        } else {
            Four low, high;
            UNROLL for (int j = 0; j < 4; ++j) low.at[j] = values[j], high.at[j] = values[j + 4];
            store_vector(to, low), store_vector(to + 4, high);
        }
    } else {
        UNROLL for (int j = 0; j < 8; ++j) if (j < count) to[j] = from_float<T>(values[j]);
    }
}

// 16 bytes from global to shared memory, visible after copies_wait and a barrier. `from` null: zeros.
DEVICE void copy_async(void* to_shared, const void* from) {
#ifdef __CUDACC__
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
    if (from) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else store_vector(to_shared, uint4{0, 0, 0, 0});
#else
    if (reinterpret_cast<uintptr_t>(to_shared) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        emulator::fail("misaligned copy");
    emulator::copy_async(to_shared, from, 16);
#endif
}
DEVICE void copies_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    ++emulator::machine.current->group;
#endif
}
template <int groups_left> DEVICE void copies_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#else
    emulator::copies_arrive(groups_left);
#endif
}

// ---- tensor cores ------------------------------------------------------------------------------------------------
// Four 8x8 tiles of 16-bit numbers from shared memory. Lane i gives the address of row i%8 of tile i/8 (16 bytes) and
// gets, of every tile, two neighbours of row lane/4 at columns 2*(lane%4)...; `transposed` gives the transpose of each
// tile.
template <bool transposed> DEVICE void load_tiles(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
#else
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("misaligned tile row");
    auto slots = emulator::exchange(&row, sizeof row);
    for (int tile = 0; tile < 4; ++tile) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            int r = lane() / 4, c = lane() % 4 * 2 + j;
            const uint16_t* source;
            memcpy(&source, slots[tile * 8 + (transposed ? c : r)], sizeof source);
            pair[j] = source[transposed ? r : c];
        }
        memcpy(&out[tile], pair, 4);
    }
#endif
}

// c(16x8, float) += a(16x16, bf16, by rows) * b(16x8, bf16, by columns): mma.sync.m16n8k16 (PTX ISA, "Warp-level matrix
// instructions"). With g = lane/4, t = lane%4: a holds (g | g+8, 2t..2t+1 | 2t+8..) as a[row half + 2*column half], b
// holds (2t..2t+1 | +8, column g), c holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    auto slots = emulator::exchange(mine, sizeof mine);
    auto element = [&](int owner, int reg, int half) {
        bf16 value;
        memcpy(&value, slots[owner] + reg * 4 + half * 2, 2);
        return to_float(value);
    };
    int g = lane() / 4, t = lane() % 4;
    for (int row_half = 0; row_half < 2; ++row_half)
        for (int j = 0; j < 2; ++j) {
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k)
                sum += element(g * 4 + k % 8 / 2, row_half + 2 * (k / 8), k % 2) *
                       element((2 * t + j) * 4 + k % 8 / 2, 4 + k / 8, k % 2);
            c[row_half * 2 + j] += sum;
        }
#endif
}
DEVICE uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(from_float<bf16>(low).bits) | static_cast<uint32_t>(from_float<bf16>(high).bits) << 16;
}
