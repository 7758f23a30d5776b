// Draws one token per row from softmax(logits / temperature) and gives its log-probability, in one pass.
//
// Layout: logits (rows, columns) float32 or bf16; seeds (rows) int64; token (rows) int64; logprob (rows) float32, in
// nats. Limits: columns below 2^31. An entry of -inf is never drawn; a row of NaN gives token 0 with log-probability
// NaN. Source: Gumbel-max: the argmax of logit + Gumbel noise is a draw from the softmax. The noise of (seed, column)
//         is a hash, so a draw depends on nothing but its row and seed: not on the batch, the device or the order of
//         work. Its 24 bits make entries below about 3e-8 rarer than they should be. Greedy: no noise.
#include "device.cuh"

namespace {

constexpr int block = 256;

DEVICE uint32_t mix(uint32_t h) {  // a bijection with low bias (Ellis, hash-prospector)
    h ^= h >> 16, h *= 0x7feb352du;
    h ^= h >> 15, h *= 0x846ca68bu;
    return h ^ h >> 16;
}
DEVICE float gumbel(i64 seed, int column) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    uint32_t h = mix(mix(static_cast<uint32_t>(column) + low * 0x9e3779b9u) ^ high);
    return -log_of(-log_of((static_cast<float>(h >> 8) + 0.5f) * 0x1p-24f));
}

struct Draw {
    float max, sum;         // of the softmax so far
    float rank, logit;      // of the best entry: with and without noise
    int column;
};

DEVICE Draw merge(Draw a, Draw b) {
    float max = b.max > a.max ? b.max : a.max;
    auto moved = [max](Draw d) {  // to the new max; an empty part holds 0, or the NaN of a bad row
        return d.max == minus_infinity ? d.sum : d.sum * exp_fast(d.max - max);
    };
    float sum = max == minus_infinity ? a.sum + b.sum : moved(a) + moved(b);
    bool second = b.rank > a.rank || (b.rank == a.rank && b.column < a.column);
    Draw best = second ? b : a;
    return {max, sum, best.rank, best.logit, best.column};
}

DEVICE Draw across_warp(Draw d) {
    UNROLL for (int mask = 16; mask; mask >>= 1)
        d = merge(d, {from_lane_xor(d.max, mask), from_lane_xor(d.sum, mask), from_lane_xor(d.rank, mask),
                      from_lane_xor(d.logit, mask), from_lane_xor(d.column, mask)});
    return d;
}

template <class T>
KERNEL(block) draw(const T* logits, const i64* seeds, i64* token, float* logprob, int columns,
                   float inverse_temperature, int greedy) {
    const T* line = logits + static_cast<i64>(block_x()) * columns;
    Draw nothing{minus_infinity, 0.0f, minus_infinity, minus_infinity, columns}, mine = nothing;
    for (int column = thread(); column < columns; column += block) {
        float x = to_float(line[column]) * inverse_temperature;
        if (x == minus_infinity) continue;
        float rank = x != x ? minus_infinity : greedy ? x : x + gumbel(seeds[block_x()], column);
        mine = merge(mine, {x, 1.0f, rank, x, x != x ? columns : column});
        if (x != x) mine.sum = x;
    }
    Draw* of_warps = reinterpret_cast<Draw*>(shared_memory());
    mine = across_warp(mine);
    if (lane() == 0) of_warps[warp()] = mine;
    barrier();
    if (warp() > 0) return;
    mine = across_warp(lane() < block / 32 ? of_warps[lane()] : nothing);
    if (lane() > 0) return;
    token[block_x()] = mine.column < columns ? mine.column : 0;
    logprob[block_x()] = mine.logit - mine.max - log_of(mine.sum);
}

template <class T>
int start(const void* logits, const i64* seeds, i64* token, float* logprob, i64 rows, i64 columns,
          float inverse_temperature, i64 greedy, void* stream) {
    return launch(draw<T>, {static_cast<int>(rows)}, block, block / 32 * sizeof(Draw), stream,
                  static_cast<const T*>(logits), seeds, token, logprob, columns, inverse_temperature, greedy);
}

}  // namespace

extern "C" int sample_draw(const void* logits, const i64* seeds, i64* token, float* logprob, i64 rows, i64 columns,
                           i64 greedy, i64 half, float inverse_temperature, void* stream) {
    return (half ? start<bf16> : start<float>)(logits, seeds, token, logprob, rows, columns, inverse_temperature,
                                               greedy, stream);
}
