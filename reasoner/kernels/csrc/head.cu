// RL head: what one pass over a block of logits gives.
//
// Layout: z (rows, columns) float32, contiguous: the logits of all tokens for the vocabulary entries start ..
//         start+columns. target (rows) int64: the vocabulary entry of each token; a negative one marks a row to leave
//         out. state (4, rows) float32: running max m, sum of e^(x-m), sum of (x-m) e^(x-m), logit of the target, with
//         x = z / temperature.
// Limits: rows and columns up to 2^31 - 1.
// Source: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); the entropy rides on the same pass:
//         H = log S - W / S, with S and W the two sums. The matrix products around it are left to the BLAS.
#include "device.cuh"

namespace {

constexpr int block = 256;

struct Statistics { float max, sum, weighted; };

DEVICE Statistics merge(Statistics a, Statistics b) {
    float max = b.max > a.max ? b.max : a.max;
    if (max == minus_infinity) return {max, a.sum + b.sum, a.weighted + b.weighted};
    auto moved = [max](Statistics s) -> Statistics {
        if (s.max == minus_infinity) return {max, s.sum, s.weighted};  // empty: zeros, or the NaN of a bad row
        float shift = s.max - max, factor = exp_fast(shift);
        return {max, s.sum * factor, (s.weighted + shift * s.sum) * factor};
    };
    a = moved(a), b = moved(b);
    return {max, a.sum + b.sum, a.weighted + b.weighted};
}

DEVICE Statistics of_four(const float* x, int count) {
    float max = minus_infinity;
    UNROLL for (int j = 0; j < 4; ++j) if (j < count && x[j] > max) max = x[j];
    Statistics result{max, 0.0f, 0.0f};
    UNROLL for (int j = 0; j < 4; ++j) {
        if (j >= count || x[j] == minus_infinity) continue;  // e^-inf = 0, and 0 * -inf must not become NaN
        float shift = x[j] - max, e = exp_fast(shift);
        result.sum += e, result.weighted += shift * e;
    }
    return result;
}

KERNEL(block) statistics(const float* z, const i64* target, float* state, int rows, int columns, i64 start,
                         float inverse_temperature) {
    int row = block_x();
    const float* line = z + static_cast<i64>(row) * columns;
    Statistics mine{minus_infinity, 0.0f, 0.0f};
    bool vectors = columns % 4 == 0;
    for (int first = thread() * 4; first < columns; first += block * 4) {
        float x[4];
        int count = columns - first < 4 ? columns - first : 4;
        if (vectors) {
            Four four = load_vector<Four>(line + first);
            UNROLL for (int j = 0; j < 4; ++j) x[j] = four.at[j] * inverse_temperature;
        } else {
            UNROLL for (int j = 0; j < 4; ++j)
                x[j] = j < count ? line[first + j] * inverse_temperature : minus_infinity;
        }
        mine = merge(mine, of_four(x, count));
    }
    auto across_warp = [](Statistics s) {
        UNROLL for (int mask = 16; mask; mask >>= 1)
            s = merge(s, {from_lane_xor(s.max, mask), from_lane_xor(s.sum, mask), from_lane_xor(s.weighted, mask)});
        return s;
    };
    Statistics* of_warps = reinterpret_cast<Statistics*>(shared_memory());
    mine = across_warp(mine);
    if (lane() == 0) of_warps[warp()] = mine;
    barrier();
    if (warp() > 0) return;
    mine = across_warp(lane() < block / 32 ? of_warps[lane()] : Statistics{minus_infinity, 0.0f, 0.0f});
    if (lane() > 0) return;
    mine = merge({state[row], state[rows + row], state[2 * static_cast<i64>(rows) + row]}, mine);
    state[row] = mine.max, state[rows + row] = mine.sum, state[2 * static_cast<i64>(rows) + row] = mine.weighted;
    i64 column = target[row] - start;
    if (target[row] >= 0 && column >= 0 && column < columns)
        state[3 * static_cast<i64>(rows) + row] = line[column] * inverse_temperature;
}

// Overwrites z by the gradient of  sum(by_logprob * logprob + by_entropy * entropy)  with respect to the logits:
//     d logprob / d z_j = (1[j = target] - p_j) / temperature,   d entropy / d z_j = -p_j (log p_j + H) / temperature.
// Out = bf16 fills the first half of each row. Tile by tile everything is read, then a barrier, then written: a write
// at byte 2j never meets a float that is still to be read.
template <class Out>
KERNEL(block) gradient(float* z, const i64* target, const float* lse, const float* entropy, const float* by_logprob,
                       const float* by_entropy, int columns, i64 start, float inverse_temperature) {
    int row = block_x();
    float* line = z + static_cast<i64>(row) * columns;
    Out* out = reinterpret_cast<Out*>(line);
    i64 column = target[row] - start;
    bool kept = target[row] >= 0;
    float log_sum = lse[row], mean = entropy[row];
    float a = by_logprob[row] * inverse_temperature, b = by_entropy[row] * inverse_temperature;
    bool vectors = columns % 4 == 0;
    for (int tile = 0; tile < columns; tile += block * 4) {
        int first = tile + thread() * 4;
        float x[4];
        if (vectors && first < columns) {
            Four four = load_vector<Four>(line + first);
            UNROLL for (int j = 0; j < 4; ++j) x[j] = four.at[j];
        } else {
            UNROLL for (int j = 0; j < 4; ++j) x[j] = first + j < columns ? line[first + j] : 0.0f;
        }
        UNROLL for (int j = 0; j < 4; ++j) {
            float logprob = x[j] * inverse_temperature - log_sum, p = exp_fast(logprob);
            float spread = p > 0.0f ? p * (logprob + mean) : 0.0f;  // 0 * -inf is 0 here
            float value = a * ((first + j == column ? 1.0f : 0.0f) - p) - b * (p != p ? p : spread);
            x[j] = kept ? value : 0.0f;
        }
        barrier();
        UNROLL for (int j = 0; j < 4; ++j) if (first + j < columns) out[first + j] = from_float<Out>(x[j]);
    }
}

}  // namespace

extern "C" int head_statistics(const float* z, const i64* target, float* state, i64 rows, i64 columns, i64 start,
                               float inverse_temperature, void* stream) {
    return launch(statistics, {static_cast<int>(rows)}, block, block / 32 * sizeof(Statistics), stream, z, target,
                  state, rows, columns, start, inverse_temperature);
}

extern "C" int head_gradient(float* z, const i64* target, const float* lse, const float* entropy,
                             const float* by_logprob, const float* by_entropy, i64 rows, i64 columns, i64 start,
                             i64 to_bf16, float inverse_temperature, void* stream) {
    return launch(to_bf16 ? gradient<bf16> : gradient<float>, {static_cast<int>(rows)}, block, 0, stream, z, target,
                  lse, entropy, by_logprob, by_entropy, columns, start, inverse_temperature);
}
