// Runs a CUDA kernel on a CPU, so that the same source can be tested where there is no GPU.
//
// Threads of a block are fibers that switch only at barriers, warp exchanges and the end; blocks run one after another.
// What it shows: wrong results; reads of shared memory nobody wrote (it is filled with NaN bits); missing barriers (the
// order of threads is drawn from a seed, and warps run ahead of each other as far as barriers let them); barriers that
// not every thread reaches (reported as a deadlock); writes past the end of shared memory; asynchronous copies that are
// read too early or overwrite what is still in use (each lands at once or when waited for, by the seed); misaligned
// vector accesses. What it cannot show: speed, bank conflicts, registers and spills, memory fences between blocks, real
// hangs.
#pragma once
#include <sys/mman.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>
#if !defined(__x86_64__) && !defined(PORTABLE_FIBERS)
#define PORTABLE_FIBERS
#endif
#ifdef PORTABLE_FIBERS
#include <ucontext.h>
#endif

namespace emulator {

constexpr int warp_size = 32, most_threads = 1024, slot_bytes = 64;
constexpr size_t stack_bytes = 64 << 10, canary_bytes = 64;

struct Dim { int x, y, z; };

// ---- fibers ------------------------------------------------------------------------------------------------------
#ifndef PORTABLE_FIBERS
// Saves the callee-saved registers on the old stack and takes them from the new one: all that a switch needs.
extern "C" void reasoner_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden reasoner_switch
.globl reasoner_switch
.type reasoner_switch, @function
reasoner_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size reasoner_switch, .-reasoner_switch
)");

struct Context {
    void* stack_pointer = nullptr;
    void start(char* stack, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + stack_bytes) - 2;
        *--top = nullptr;  // where `entry` would return to; also puts the stack at the alignment a call leaves
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer = top;
    }
    void leave_for(Context& other) { reasoner_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;
    void start(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = stack_bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void leave_for(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct PendingCopy { void* to; const void* from; int bytes, group; };

struct Fiber {
    Context context;
    int index = 0;
    bool done = false;
    const unsigned* gate = nullptr;  // waits until *gate differs from `seen`
    unsigned seen = 0;
    std::vector<PendingCopy> copies;
    int group = 0;
};

struct Barrier { unsigned generation = 0; int arrived = 0; };

struct Warp {
    Barrier barrier;
    // Two sets, because a lane may arrive at the next exchange while another still reads this one.
    alignas(16) unsigned char slots[2][warp_size][slot_bytes];
};

struct Machine {
    uint64_t random = 1;
    Context scheduler;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    unsigned char* shared_start = nullptr;
    char* stacks = nullptr;
    Fiber* current = nullptr;
    Barrier block_barrier;
    int alive = 0;
    Dim grid{}, block{};
    std::function<void()> body;
    char error[256] = "";
    long long copied_bytes = 0;

    uint32_t next() {  // xorshift64*
        random ^= random >> 12, random ^= random << 25, random ^= random >> 27;
        return static_cast<uint32_t>((random * 0x2545F4914F6CDD1DULL) >> 32);
    }
    template <class T> void shuffle(std::vector<T>& items) {
        for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next() % i]);
    }
};
inline Machine machine;

inline void wait_at(const unsigned* gate) {
    Fiber& me = *machine.current;
    me.gate = gate, me.seen = *gate;
    me.context.leave_for(machine.scheduler);
}

[[noreturn]] inline void fail(const char* what) {
    if (!machine.error[0])
        snprintf(machine.error, sizeof machine.error, "%s in block (%d, %d, %d), thread %d", what, machine.block.x,
                 machine.block.y, machine.block.z, machine.current->index);
    machine.current->done = true;
    machine.current->context.leave_for(machine.scheduler);
    abort();
}

inline void arrive(Barrier& barrier, int expected) {
    if (++barrier.arrived == expected) {
        barrier.arrived = 0, ++barrier.generation;
    } else {
        wait_at(&barrier.generation);
    }
}

inline void block_barrier() { arrive(machine.block_barrier, machine.alive); }

// Every lane gives `bytes` bytes and gets the 32 slots in which all of them lie.
inline const unsigned char (*exchange(const void* mine, int bytes))[slot_bytes] {
    Warp& warp = machine.warps[machine.current->index / warp_size];
    unsigned set = warp.barrier.generation & 1;
    memcpy(warp.slots[set][machine.current->index % warp_size], mine, bytes);
    arrive(warp.barrier, warp_size);
    return warp.slots[set];
}

inline void land(const PendingCopy& copy) {
    copy.from ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes);
}

// a real one may land at any time until it is waited for
inline void copy_async(void* to, const void* from, int bytes) {
    PendingCopy copy{to, from, bytes, machine.current->group};
    if (from) machine.copied_bytes += bytes;
    machine.next() % 2 ? land(copy) : machine.current->copies.push_back(copy);
}

inline void copies_arrive(int groups_left) {  // all groups of this thread but the newest `groups_left`
    Fiber& me = *machine.current;
    size_t kept = 0;
    for (PendingCopy& copy : me.copies) {
        if (copy.group >= me.group - groups_left) me.copies[kept++] = copy;
        else land(copy);
    }
    me.copies.resize(kept);
}

inline void entry() {
    machine.body();
    Fiber& me = *machine.current;
    me.done = true;
    --machine.alive;  // a thread that has left counts as arrived at the barriers of the block, as on the device
    if (machine.alive && machine.block_barrier.arrived == machine.alive)
        machine.block_barrier.arrived = 0, ++machine.block_barrier.generation;
    me.context.leave_for(machine.scheduler);
    abort();
}

// Lets every lane of a warp that can go on do so once; whether any could.
inline bool run_round(int warp) {
    Machine& m = machine;
    int lanes[warp_size];
    for (int i = 0; i < warp_size; ++i) lanes[i] = i;
    for (int i = warp_size; i > 1; --i) std::swap(lanes[i - 1], lanes[m.next() % i]);
    bool moved = false;
    for (int lane : lanes) {
        Fiber& fiber = m.fibers[warp * warp_size + lane];
        if (fiber.done || (fiber.gate && *fiber.gate == fiber.seen)) continue;
        moved = true;
        fiber.gate = nullptr;
        m.current = &fiber;
        m.scheduler.leave_for(fiber.context);
        if (m.error[0]) return true;
    }
    return moved;
}

inline bool run_block(int threads, size_t shared_bytes) {
    Machine& m = machine;
    memset(m.shared_start, 0xFF, shared_bytes);  // NaN as float and as bf16
    memset(m.shared_start + shared_bytes, 0xA5, canary_bytes);
    m.alive = threads;
    m.block_barrier = {};
    m.warps.assign(threads / warp_size, {});
    m.fibers.clear();
    m.fibers.resize(threads);
    for (int i = 0; i < threads; ++i) {
        m.fibers[i].index = i;
        m.fibers[i].context.start(m.stacks + i * stack_bytes, entry);
    }
    // Warps take turns of one round or of as many as they can, so that some run far ahead of others; lanes are
    // shuffled.
    std::vector<int> turns(threads / warp_size);
    std::iota(turns.begin(), turns.end(), 0);
    while (m.alive) {
        bool moved = false;
        m.shuffle(turns);
        for (int warp : turns) {
            bool once = m.next() % 2;
            while (run_round(warp)) {
                moved = true;
                if (m.error[0]) return false;
                if (once) break;
            }
        }
        if (!moved) {
            snprintf(m.error, sizeof m.error,
                     "deadlock in block (%d, %d, %d): %d of %d threads wait, %d at the block's barrier", m.block.x,
                         m.block.y, m.block.z, m.alive, threads, m.block_barrier.arrived);
            return false;
        }
    }
    for (size_t i = 0; i < canary_bytes; ++i)
        if (m.shared_start[shared_bytes + i] != 0xA5) {
            snprintf(m.error, sizeof m.error, "write past the %zu bytes of shared memory in block (%d, %d, %d)",
                     shared_bytes, m.block.x, m.block.y, m.block.z);
            return false;
        }
    return true;
}

inline int run(Dim grid, int threads, size_t shared_bytes, std::function<void()> body) {
    Machine& m = machine;
    m.error[0] = 0;
    if (threads % warp_size || threads > most_threads || shared_bytes > (227 << 10)) {
        snprintf(m.error, sizeof m.error, "%d threads with %zu bytes of shared memory", threads, shared_bytes);
        return -1;
    }
    if (!m.stacks)
        m.stacks = static_cast<char*>(mmap(nullptr, most_threads * stack_bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    m.grid = grid, m.body = std::move(body);
    m.shared.resize(shared_bytes + canary_bytes + 128);
    m.shared_start = m.shared.data() + (128 - reinterpret_cast<uintptr_t>(m.shared.data()) % 128);
    std::vector<int> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    m.shuffle(blocks);
    for (int i : blocks) {
        m.block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        if (!run_block(threads, shared_bytes)) return -1;
    }
    return 0;
}

}  // namespace emulator

extern "C" inline __attribute__((used, visibility("default"))) void set_thread_order(long long seed) {
    emulator::machine.random = 0x9E3779B97F4A7C15ULL * (2 * static_cast<uint64_t>(seed) + 1);
}
// Bytes that asynchronous copies have read from global memory since the last time this was asked.
extern "C" inline __attribute__((used, visibility("default"))) long long take_copied_bytes() {
    long long bytes = emulator::machine.copied_bytes;
    emulator::machine.copied_bytes = 0;
    return bytes;
}
